"""A linear layer for each head: `y_THN = x_THK @ w_HNK^T`, as latent attention has before and behind its scores.

As with `linear`, a weight is prepared once, and the bits of a token's row depend on that row alone.

T tokens, H heads, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 64


class PerHead(Protocol):
    """A prepared weight."""

    def __call__(self, x_THK: Tensor, out: Tensor | None = None) -> Tensor:
        """Return y_THN, which is `out` if that is given. Rows of both may be strided, as parts of longer rows are."""
        ...


class PreparePerHead(Protocol):
    """Preparation of a weight."""

    def __call__(self, w_HNK: Tensor) -> PerHead:
        """Prepare a contiguous weight."""
        ...


def reference(x_THK: Tensor, w_HNK: Tensor) -> Tensor:
    """Accumulated in fp32 and rounded once to x's dtype."""
    return torch.einsum("thk,hnk->thn", x_THK.float(), w_HNK.float()).to(x_THK.dtype)


def prepare(w_HNK: Tensor) -> PerHead:
    """As `PreparePerHead`, with torch's batched product of 64 tokens at a time: it orders sums by their number."""

    def apply(x_THK: Tensor, out: Tensor | None = None) -> Tensor:
        y_THN = x_THK.new_empty(*x_THK.shape[:2], w_HNK.shape[1]) if out is None else out
        for x, y in zip(x_THK.split(_ROWS), y_THN.split(_ROWS), strict=True):
            padded = F.pad(x, (0, 0, 0, 0, 0, _ROWS - len(x)))
            y.copy_(torch.bmm(padded.transpose(0, 1), w_HNK.transpose(1, 2)).transpose(0, 1)[: len(x)])
        return y_THN

    return apply
