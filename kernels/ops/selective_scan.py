"""Mamba's selective scan, of its inputs after the convolution (Gu and Dao, "Mamba", 2023). For each channel:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t      [N]
    y_t = h_t . C_t + skip x_t

with A < 0 and `dt = softplus(dt + dt_bias)`. The state moves on with every token (`recurrent`: C = 1), so there is no chunk
cache.

T tokens, D width of the rows (the channels), N numbers of the state for each channel, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.recurrent import StateMetadata, pieces


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanWeights:
    """A layer's numbers for each channel, in fp32 and contiguous.

    Attributes:
        A_ND: -exp(A_log), transposed.
        skip_D: factor of a token's own input (`D` in checkpoints).
        dt_bias_D: added to dt before softplus.
    """

    A_ND: Tensor
    skip_D: Tensor
    dt_bias_D: Tensor


class SelectiveScan(Protocol):
    """See `reference`."""

    def __call__(
        self,
        x_TD: Tensor,
        dt_TD: Tensor,
        B_TN: Tensor,
        C_TN: Tensor,
        weights: ScanWeights,
        state_BND: Tensor,
        states: StateMetadata,
    ) -> Tensor:
        """Return y_TD; write the states."""
        ...


def reference(
    x_TD: Tensor,
    dt_TD: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    weights: ScanWeights,
    state_BND: Tensor,
    states: StateMetadata,
) -> Tensor:
    """Return y in x's dtype; rows that belong to no sequence hold anything.

    Args:
        x_TD: after convolution and SiLU.
        dt_TD: raw.
        B_TN, C_TN: any distance between rows.
        weights: of the layer.
        state_BND: fp32. Read from the source and written to the target of every `recurrent.Piece`.
        states: of the step.
    """
    dt_TD = F.softplus(dt_TD.float() + weights.dt_bias_D)
    y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
    for piece in pieces(states):
        state_ND = torch.zeros_like(state_BND[0]) if piece.source < 0 else state_BND[piece.source].clone()
        for t in range(piece.row, piece.row + piece.end - piece.start):
            x_D, dt_D = x_TD[t].float(), dt_TD[t]
            state_ND = (dt_D * weights.A_ND).exp() * state_ND + B_TN[t].float()[:, None] * (dt_D * x_D)
            y_TD[t] = (C_TN[t].float()[:, None] * state_ND).sum(0) + weights.skip_D * x_D
        state_BND[piece.target] = state_ND
    return y_TD
