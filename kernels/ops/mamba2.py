"""Mamba-2's recurrence, of its inputs after the convolution (Dao and Gu, "Transformers are SSMs", 2024). For each head:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        [N, d]
    y_t = h_t^T C_t + D x_t                           [d]

with A < 0 and `dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)`. It is computed chunk by chunk, of CHUNK positions at
multiples of CHUNK (`recurrent`), from the state at a chunk's beginning:

    y_t = exp(S_t) h^T C_t + sum_{s <= t} exp(S_t - S_s) dt_s (C_t . B_s) x_s + D x_t

where S_t is the sum of dt A from the chunk's first token to t, so that no exponent is positive. The inputs of a chunk that
is not yet full are kept in the chunk cache.

T tokens, D width of the rows, H heads of d numbers, G groups of heads that share B and C, N numbers of the state for each of
a head's d, B blocks, s positions of a block of the chunk cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.recurrent import StateMetadata, pieces
from expertwire.kernels.ops.variants import CHUNK


@dataclass(frozen=True, kw_only=True, eq=False)
class Mamba2Weights:
    """A layer's numbers for each head, in fp32, and its shapes.

    Attributes:
        A_H: -exp(A_log).
        D_H: factor of a token's own input.
        dt_bias_H: added to dt before softplus.
        num_groups, head_dim, state_size: G, d and N.
        dt_min, dt_max: limits of dt (`time_step_limit`).
    """

    A_H: Tensor
    D_H: Tensor
    dt_bias_H: Tensor
    num_groups: int
    head_dim: int
    state_size: int
    dt_min: float = 0.0
    dt_max: float = math.inf

    @property
    def widths(self) -> tuple[int, int, int]:
        """Return the widths of x, B and C in a row."""
        read = self.num_groups * self.state_size
        return self.A_H.shape[0] * self.head_dim, read, read

    @property
    def stored_width(self) -> int:
        """Return the width of rows of the chunk cache: x and B."""
        return sum(self.widths[:2])


class Mamba2Cache(NamedTuple):
    """A layer's blocks. Those of inputs hold CHUNK positions.

    Attributes:
        state_BHNd: fp32, the state cache.
        inputs_BsD: the chunk cache: rows x | B in their dtype, `stored_width` numbers.
        dt_BsH: fp32, of the chunk cache, after softplus and clamp.
    """

    state_BHNd: Tensor
    inputs_BsD: Tensor
    dt_BsH: Tensor


class Mamba2Scan(Protocol):
    """See `reference`."""

    def __call__(
        self, xBC_TD: Tensor, dt_TH: Tensor, weights: Mamba2Weights, cache: Mamba2Cache, states: StateMetadata
    ) -> Tensor:
        """Return y_TD; write the cache."""
        ...


def reference(
    xBC_TD: Tensor, dt_TH: Tensor, weights: Mamba2Weights, cache: Mamba2Cache, states: StateMetadata
) -> Tensor:
    """Return y [T, H * d] in the dtype of the rows; rows that belong to no sequence hold anything.

    Args:
        xBC_TD: rows x [H * d] | B [G * N] | C [G * N] after convolution and SiLU.
        dt_TH: raw, any float dtype, any distance between rows.
        weights: of the layer.
        cache: read and written. Of the chunk cache only what later steps read need be written: the chunk of a sequence that
            the step leaves unfinished.
        states: of the step, with `chunk_blocks_S`.
    """
    assert states.chunk_blocks_S is not None, "no blocks of the chunk cache"
    dt_TH = discretize(dt_TH, weights)
    y_TD = xBC_TD.new_empty(len(xBC_TD), weights.widths[0])
    for piece in pieces(states):
        state_HNd = torch.zeros_like(cache.state_BHNd[0])
        if piece.source >= 0:
            state_HNd.copy_(cache.state_BHNd[piece.source])
        start = piece.start
        while start < piece.end:
            end = min(piece.end, (start // CHUNK + 1) * CHUNK)
            rows = slice(piece.row + start - piece.start, piece.row + end - piece.start)
            stored, dt = _store(
                xBC_TD[rows, : weights.stored_width],
                dt_TH[rows],
                cache,
                int(states.chunk_blocks_S[piece.number]),
                start,
            )
            x_THd, B_THN, C_THN = _split(stored, xBC_TD[rows, weights.stored_width :], weights)
            y_TD[rows], after_HNd = _chunk(x_THd, B_THN, C_THN, dt, state_HNd, weights)
            state_HNd = after_HNd if end % CHUNK == 0 else state_HNd
            start = end
        cache.state_BHNd[piece.target] = state_HNd
    return y_TD


def discretize(dt_TH: Tensor, weights: Mamba2Weights) -> Tensor:
    """Return fp32 steps."""
    return F.softplus(dt_TH.float() + weights.dt_bias_H).clamp(weights.dt_min, weights.dt_max)


def _store(xB_TD: Tensor, dt_TH: Tensor, cache: Mamba2Cache, block: int, start: int) -> tuple[Tensor, Tensor]:
    """Store a chunk's tokens from position `start` on; return those of the chunk up to the last of them."""
    at = start % CHUNK
    cache.inputs_BsD[block, at : at + len(xB_TD)] = xB_TD
    cache.dt_BsH[block, at : at + len(dt_TH)] = dt_TH
    chunk = slice(0, at + len(xB_TD))
    return cache.inputs_BsD[block, chunk], cache.dt_BsH[block, chunk]


def _chunk(
    x_THd: Tensor, B_THN: Tensor, C_THN: Tensor, dt_TH: Tensor, state_HNd: Tensor, weights: Mamba2Weights
) -> tuple[Tensor, Tensor]:
    """Return y of a chunk's last tokens, those that C has, and the state after them."""
    new = len(x_THd) - len(C_THN)
    sums_TH = (dt_TH * weights.A_H).cumsum(0)
    # [t, s]: tokens that read and that are read.
    later = torch.ones(len(sums_TH), len(sums_TH), dtype=torch.bool, device=x_THd.device).triu(1)[new:, :, None]
    exponents = (sums_TH[new:, None] - sums_TH).masked_fill(later, -math.inf)
    weight_TTH = exponents.exp() * dt_TH * torch.einsum("thn,shn->tsh", C_THN, B_THN)
    y_THd = torch.einsum("tsh,shd->thd", weight_TTH, x_THd)
    y_THd += sums_TH[new:, :, None].exp() * torch.einsum("thn,hnd->thd", C_THN, state_HNd)
    y_THd += weights.D_H[:, None] * x_THd[new:]
    left_TH = (sums_TH[-1] - sums_TH).exp() * dt_TH
    after_HNd = sums_TH[-1].exp()[:, None, None] * state_HNd
    after_HNd += torch.einsum("th,thn,thd->hnd", left_TH, B_THN, x_THd)
    return y_THd.flatten(1), after_HNd


def _split(xB_TD: Tensor, C_TD: Tensor, weights: Mamba2Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Return x [T, H, d], B and C [T, H, N] in fp32."""
    heads = weights.A_H.shape[0]
    x_TD, B_TD = xB_TD.float().split(weights.widths[:2], -1)
    B_THN, C_THN = (
        part.unflatten(-1, (weights.num_groups, -1)).repeat_interleave(heads // weights.num_groups, 1)
        for part in (B_TD, C_TD.float())
    )
    return x_TD.unflatten(-1, (heads, -1)), B_THN, C_THN
