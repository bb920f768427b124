"""The tensors behind the named caches of a model, on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PagedKv:
    """Keys and values of one layer: [blocks, block_size, G key/value heads, d head size]."""

    k: Tensor
    v: Tensor


def paged_kv(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> PagedKv:
    """Zeros: padding reads the null block, and 0 * NaN would not be 0."""
    return PagedKv(k=torch.zeros(shape, dtype=dtype, device=device), v=torch.zeros(shape, dtype=dtype, device=device))
