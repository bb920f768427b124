"""Dense linear layer: `y_TN = x_TD @ w_ND^T`.

T tokens, D input width, N output width.

A weight is *prepared* once, after loading, and called many times. On one or two CPU threads, for widths that are a multiple of
32, `kernels.cpu.gemm` packs it and multiplies any number of rows on one thread; everything else is the library's product, of 64
rows at a time. Either way the bits of a row of y depend on that row of x alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.formats import Weight, dequantize

Linear = Callable[[Tensor], Tensor]  # x_TD -> y_TN

_ROWS = 64
_WIDTH = 16  # numbers, a line of the cache in fp32


def reference(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x @ w^T + bias`, accumulated in fp32 and rounded once to x's dtype."""
    y_TN = x_TD.float() @ w_ND.float().T
    return (y_TN if bias_N is None else y_TN + bias_N.float()).to(x_TD.dtype)


def library(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The library's product of as many rows at a time as it ever gets: it chooses the order of a sum by their number, and oneDNN
    compiles a kernel, milliseconds and up to a megabyte that it keeps for good, for each number that it meets. On an AMD
    processor, with three threads or more, MKL's sums over odd widths were seen to depend on a row's place: widths that no model
    has are padded, at the price of a copy of the weights."""
    if x_TD.shape[1] % _WIDTH > 0:
        x_TD, w_ND = (F.pad(tensor, (0, -tensor.shape[1] % _WIDTH)) for tensor in (x_TD, w_ND))
    y_TN = x_TD.new_empty(x_TD.shape[0], w_ND.shape[0])
    for x_XD, y_XN in zip(x_TD.split(_ROWS), y_TN.split(_ROWS), strict=True):
        num = x_XD.shape[0]
        if num < _ROWS:
            x_XD = F.pad(x_XD, (0, 0, 0, _ROWS - num))
        y_XN.copy_(F.linear(x_XD, w_ND, bias_N)[:num])
    return y_TN


def prepare(weight: Weight, bias_N: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Linear:
    """A callable that applies `weight` [N, D], by the device that it is on and the threads that torch has now.

    The products are in `dtype` (fp32 or bf16), else in the weight's own; a quantised weight needs one and is unpacked here.
    """
    w_ND = unpacked(weight, dtype)
    if not is_packed(w_ND):
        return lambda x_TD: library(x_TD, w_ND, bias_N)
    from expertwire.kernels.cpu import gemm

    return gemm.pack_linear(w_ND, bias_N)


def unpacked(weight: Weight, dtype: torch.dtype | None) -> Tensor:
    """In `dtype`, else as it is."""
    if dtype is None:
        assert isinstance(weight, Tensor), f"{weight.format} {weight.shape} without a dtype to unpack it to"
        return weight
    return dequantize(weight, dtype)


def is_packed(weight: Weight) -> bool:
    """Whether `kernels.cpu.gemm` takes a weight [..., N, D]: on a CPU, with few threads, for the widths that it covers.

    It runs on one thread, which takes most of the memory bandwidth that two could; more threads together read faster.
    """
    if weight.device.type != "cpu" or torch.get_num_threads() > 2:
        return False
    from expertwire.kernels.cpu import gemm  # numba is slow to import and of no use elsewhere

    return gemm.supports(weight)
