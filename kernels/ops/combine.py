"""Weighted sum of a token's expert rows: `y_t = sum over k of w_tk * row_tk`, in fp32, in top-k order.

The order is part of the contract: it makes a result independent of where the experts lie. Product and sum round
separately. T tokens, K experts a token, D width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Combine(Protocol):
    """See `reference`; without a shared expert."""

    def __call__(self, rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """Return y_TD."""
        ...


def reference(rows_TKD: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None) -> Tensor:
    """Return y [T, D] in the dtype of the rows, fp32 or bf16; weights fp32.

    The shared expert's rows are added last, to the rounded sum.
    """
    out_TD = torch.zeros_like(rows_TKD[:, 0], dtype=torch.float32)
    for k in range(rows_TKD.shape[1]):
        out_TD += rows_TKD[:, k].float() * weights_TK[:, k, None]
    y_TD = out_TD.to(rows_TKD.dtype)
    return y_TD if shared_TD is None else y_TD + shared_TD


def combine(rows_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Return what `reference` does, with all products at once."""
    products_TKD = rows_TKD * weights_TK[:, :, None]  # fp32: type promotion
    out_TD = products_TKD[:, 0].clone()
    for k in range(1, rows_TKD.shape[1]):
        out_TD += products_TKD[:, k]
    return out_TD.to(rows_TKD.dtype)
