"""A linear layer for each head: `y_THN = x_THK @ w_HNK^T`, as latent attention has before and behind its scores.

Like `linear`, it is prepared once, and the bits of a token's row depend on that row alone.

T tokens, H heads, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.linear import is_packed

PerHead = Callable[[Tensor], Tensor]  # x_THK -> y_THN

_ROWS = 64


def reference(x_THK: Tensor, w_HNK: Tensor) -> Tensor:
    """Accumulated in fp32 and rounded once to x's dtype."""
    return torch.einsum("thk,hnk->thn", x_THK.float(), w_HNK.float()).to(x_THK.dtype)


def prepare(w_HNK: Tensor) -> PerHead:
    """On a CPU packed as `linear` is, where that can be; else the library's product of all heads, of as many tokens as it ever
    gets: it chooses the order of a sum by their number."""
    if not is_packed(w_HNK):
        return lambda x_THK: _batched(x_THK, w_HNK)
    from expertwire.kernels.cpu import gemm

    return gemm.pack_heads(w_HNK)


def _batched(x_THK: Tensor, w_HNK: Tensor) -> Tensor:
    y_THN = x_THK.new_empty(*x_THK.shape[:2], w_HNK.shape[1])
    for x, y in zip(x_THK.split(_ROWS), y_THN.split(_ROWS), strict=True):
        padded = F.pad(x, (0, 0, 0, 0, 0, _ROWS - len(x)))
        y.copy_(torch.bmm(padded.transpose(0, 1), w_HNK.transpose(1, 2)).transpose(0, 1)[: len(x)])
    return y_THN
