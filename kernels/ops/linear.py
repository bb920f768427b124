"""Dense linear layer: `y_TN = x_TD @ w_ND^T`.

T tokens, D model width or another input width, N output width.

A weight is *prepared* once, after loading, and called many times. The bits of a row of y depend on that row of x
alone, whatever the implementation.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.formats import Weight, dequantize

_ROWS = 64
_WIDTH = 16  # fp32 numbers of a cache line


class Linear(Protocol):
    """A prepared linear layer."""

    def __call__(self, x_TD: Tensor, /) -> Tensor:
        """Return y_TN."""
        ...


class PrepareLinear(Protocol):
    """Preparation of a weight."""

    def __call__(
        self,
        weight: Weight,
        bias_N: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        x_dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Linear:
        """Prepare a weight [N, D].

        Products are in `dtype`, else in the weight's own; a quantised weight needs one. `x_dtype` and `out_dtype` are
        those of x and y if they differ from it.
        """
        ...


def reference(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x @ w^T + bias`, accumulated in fp32 and rounded once to x's dtype."""
    y_TN = x_TD.float() @ w_ND.float().T
    return (y_TN if bias_N is None else y_TN + bias_N.float()).to(x_TD.dtype)


def library(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Multiply by torch's GEMM, always 64 rows at a time.

    The library chooses the order of a sum by the number of rows, and oneDNN compiles and keeps a kernel (milliseconds,
    up to a megabyte) for each number. On an AMD processor with three threads or more, MKL's sums over odd widths
    depended on a row's place: such widths, which no model has, are padded, at the price of a copy of the weights.
    """
    if x_TD.shape[1] % _WIDTH > 0:
        x_TD, w_ND = (F.pad(tensor, (0, -tensor.shape[1] % _WIDTH)) for tensor in (x_TD, w_ND))
    y_TN = x_TD.new_empty(x_TD.shape[0], w_ND.shape[0])
    for x, y in zip(x_TD.split(_ROWS), y_TN.split(_ROWS), strict=True):
        num = x.shape[0]
        if num < _ROWS:
            x = F.pad(x, (0, 0, 0, _ROWS - num))
        y.copy_(F.linear(x, w_ND, bias_N)[:num])
    return y_TN


def prepare(
    weight: Weight,
    bias_N: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    x_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Linear:
    """As `PrepareLinear`, with `library`; x is converted to the dtype of products, which y has too."""
    w_ND = unpacked(weight, dtype)
    assert out_dtype in (None, w_ND.dtype), (out_dtype, w_ND.dtype)
    return lambda x_TD: library(x_TD.to(w_ND.dtype), w_ND, bias_N)


def unpacked(weight: Weight, dtype: torch.dtype | None) -> Tensor:
    """Return the weight in `dtype`, or as it is if that is None."""
    if dtype is None:
        assert isinstance(weight, Tensor), f"{weight.format} {weight.shape} without a dtype to unpack it to"
        return weight
    return dequantize(weight, dtype)
