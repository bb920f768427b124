"""Dense linear layer: `y_TN = x_TD @ w_ND^T`.

T tokens, D input width, N output width.

A weight is *prepared* once, after loading, and called many times. On one or two CPU threads, few rows go through
`kernels.cpu.gemm`, which runs at the speed of memory; everything else is the library's product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]  # x_TD -> y_TN


def reference(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x @ w^T + bias`, accumulated in fp32 and rounded once to x's dtype."""
    y_TN = x_TD.float() @ w_ND.float().T
    return (y_TN if bias_N is None else y_TN + bias_N.float()).to(x_TD.dtype)


def compiles_by_rows(x: Tensor) -> bool:
    """Whether the library compiles a kernel for every number of rows it meets: milliseconds and up to a megabyte each, kept
    for good. oneDNN does, for bf16, in products and in torch's attention."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def padded_rows(num_rows: int) -> int:
    """`num_rows` rounded up to one of four sizes an octave, at least by sixteens."""
    step = max(16, 1 << max(0, num_rows.bit_length() - 3))
    return -(-num_rows // step) * step


def library(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """The library's product, for any number of rows."""
    num_rows = x_TD.shape[0]
    if not compiles_by_rows(x_TD) or num_rows in (0, padded_rows(num_rows)):
        return F.linear(x_TD, w_ND, bias_N)
    padded = x_TD.new_zeros(padded_rows(num_rows), x_TD.shape[1])
    padded[:num_rows] = x_TD
    return F.linear(padded, w_ND, bias_N)[:num_rows]


def prepare(w_ND: Tensor, bias_N: Tensor | None = None) -> Linear:
    """A callable that applies `w_ND` (fp32 or bf16), by the device that it is on and the threads that torch has now."""
    if bias_N is not None or not few_rows_apart(w_ND):
        return lambda x_TD: library(x_TD, w_ND, bias_N)
    from expertwire.kernels.cpu import gemm

    few, apply_few = gemm.few(w_ND.dtype), gemm.prepare_linear(w_ND)
    return lambda x_TD: apply_few(x_TD) if x_TD.shape[0] <= few else library(x_TD, w_ND)


def few_rows_apart(weight: Tensor) -> bool:
    """Whether few rows go through `kernels.cpu.gemm`: on a CPU, with few threads, for the shapes that it covers.

    It runs on one thread, which takes most of the memory bandwidth that two could; more threads together read faster.
    """
    if weight.device.type != "cpu" or torch.get_num_threads() > 2:
        return False
    from expertwire.kernels.cpu import gemm  # numba is slow to import and of no use elsewhere

    return gemm.supports(weight)
