"""Causal convolution of each channel over the positions of its sequence, then SiLU, in fp32 and rounded once:

    y[t] = silu(bias + sum_k weight[k] * x[t - K + 1 + k])

x of the K - 1 positions before a step's is the *tail*, in the blocks of the state cache (`recurrent`); before a
sequence's first token it is zero.

T tokens, D width of the rows (the channels), K taps, B blocks of the state cache.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.recurrent import StateMetadata, pieces


class CausalConv1d(Protocol):
    """See `reference`."""

    def __call__(
        self, x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, tail_BkD: Tensor, states: StateMetadata
    ) -> Tensor:
        """Return y_TD; write the tails."""
        ...


def prepare(weight_D1K: Tensor) -> Tensor:
    """Return weight_DK of a checkpoint's weight, in the order in which kernels read it: tap by tap."""
    return weight_D1K.squeeze(1).t().contiguous().t()


def reference(
    x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, tail_BkD: Tensor, states: StateMetadata
) -> Tensor:
    """Return contiguous y in x's dtype; rows that belong to no sequence hold anything.

    Args:
        x_TD: any distance between rows.
        weight_DK: any float dtype; fastest if its transpose is contiguous.
        bias_D: any float dtype.
        tail_BkD: [blocks, K - 1, D], x's dtype: inputs of the last positions, the latest last. Read from the source and
            written to the target of every `recurrent.Piece`.
        states: of the step.
    """
    taps = weight_DK.shape[1]
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    for piece in pieces(states):
        rows = slice(piece.row, piece.row + piece.end - piece.start)
        before_kD = torch.zeros_like(tail_BkD[0]) if piece.source < 0 else tail_BkD[piece.source]
        inputs_tD = torch.cat((before_kD, x_TD[rows]))
        summed_TD = torch.zeros_like(x_TD[rows], dtype=torch.float32) if bias_D is None else bias_D.float()
        for k in range(taps):
            summed_TD = summed_TD + weight_DK[:, k].float() * inputs_tD[k : k + piece.end - piece.start].float()
        y_TD[rows] = F.silu(summed_TD).to(x_TD.dtype)
        tail_BkD[piece.target] = inputs_tD[len(inputs_tD) - taps + 1 :]
    return y_TD
