"""Order of the routed rows: by expert, and within an expert by (token, k).

The order is stable, so that it, and with it every sum over rows, is the same in every run. T tokens, K experts a token,
e local experts, N = T * K places for routed rows; how many of them are taken stays on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """Rows `expert_offsets[e] : expert_offsets[e + 1]` are expert e's; from `expert_offsets[-1]` on there are none: -1."""

    expert_offsets: Tensor  # i32 [e + 1]
    row_index_N: Tensor  # i32, the token
    home_N: Tensor  # i32, t * K + k: where the row belongs in the combine layout


def reference(ids_TK: Tensor, num_experts: int, num_valid: Tensor | None = None) -> Permuted:
    """`ids_TK`: local experts, i32 or i64; others than 0 .. num_experts - 1 are none, nor are those of tokens from `num_valid`
    on, i32 [1]."""
    top_k, ids_N = ids_TK.shape[1], ids_TK.flatten().long()
    here_N = (ids_N >= 0) & (ids_N < num_experts)
    if num_valid is not None:
        here_N &= torch.arange(len(ids_N), device=ids_N.device) < num_valid * top_k
    home_R = torch.where(here_N, ids_N, num_experts).sort(stable=True).indices[: int(here_N.sum())].int()
    home_N = torch.full_like(ids_N, -1, dtype=torch.int32)
    home_N[: len(home_R)] = home_R
    counts = torch.bincount(ids_N[here_N], minlength=num_experts)
    expert_offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids_TK.device)
    expert_offsets[1:] = counts.cumsum(0)
    row_index_N = torch.where(home_N < 0, home_N, home_N // top_k)
    return Permuted(expert_offsets=expert_offsets, row_index_N=row_index_N, home_N=home_N)
