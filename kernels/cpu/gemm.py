"""Products of few rows with a large weight on a CPU, at the speed of memory: `y_MN = x_MK @ w_NK^T`. They use one thread.

M rows (few), N outputs, K inputs, R routed rows, e experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu.elementwise import silu_mul_row
from expertwire.kernels.cpu.numbers import as_array, jit, round_like
from expertwire.kernels.cpu.tile import LINE, TILE_M, TILE_N, spread, tile

_CHUNK = 32  # rows of w that stay in the cache while all rows of x meet them
_LATER_BYTES = 16384


def few(dtype: torch.dtype) -> int:
    """Up to how many rows this beats a library's kernel, which reuses what it has read (measured with AVX-512 and AMX)."""
    return 24 if dtype == torch.bfloat16 else 48


def supports(weight: Tensor) -> bool:
    """Whether the tile covers a weight [..., N, K]."""
    return weight.shape[-1] % LINE == 0 and weight.shape[-2] % TILE_N == 0 and weight.is_contiguous()


@jit
def _product(w: np.ndarray, w_at: int, x: np.ndarray, y: np.ndarray) -> None:
    """x fp32 [M, K] in `place` order, w [N, K] from element `w_at` on, y fp32 [M, N]."""
    num_m, num_k, num_n = x.shape[0], x.shape[1], y.shape[1]
    for chunk in range(0, num_n, _CHUNK):
        for m in range(0, num_m, TILE_M):
            for n in range(chunk, min(chunk + _CHUNK, num_n), TILE_N):
                row, soon = w_at + n * num_k, w_at + (n + TILE_N) * num_k
                later = row + _LATER_BYTES // w.itemsize
                tile(num_m - m, w, row, soon, later, num_k, x, m * num_k, num_k, y, m * num_n + n, num_n, num_k)


@jit
def _narrow(wide: np.ndarray, y: np.ndarray) -> None:
    for m in range(y.shape[0]):
        for n in range(y.shape[1]):
            y[m, n] = round_like(wide[m, n], y[m, n])


@jit
def linear_rows(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
    wide_x, wide_y = np.empty(x.shape, np.float32), np.empty(y.shape, np.float32)
    for m in range(x.shape[0]):
        spread(x[m], wide_x[m], x[0, 0])
    _product(w, 0, wide_x, wide_y)
    _narrow(wide_y, y)


def prepare_linear(w_NK: Tensor) -> Callable[[Tensor], Tensor]:
    """`kernels.linear.reference` for few contiguous rows of the weight's dtype."""
    weight = as_array(w_NK)

    def apply(x_MK: Tensor) -> Tensor:
        y_MN = x_MK.new_empty(x_MK.shape[0], weight.shape[0])
        linear_rows(as_array(x_MK), weight, as_array(y_MN))
        return y_MN

    return apply


@jit
def experts_rows(
    x: np.ndarray, index: np.ndarray, offsets: np.ndarray, w13: np.ndarray, w2: np.ndarray, max_rows: int, y: np.ndarray
) -> bool:
    width, inner = x.shape[1], w2.shape[2]
    most, whole = 0, True
    for e in range(w13.shape[0]):
        rows = offsets[e + 1] - offsets[e]
        if rows > max_rows:
            whole = False
        elif rows > most:
            most = rows
    wide_x, gate_up = np.empty((most, width), np.float32), np.empty((most, 2 * inner), np.float32)
    hidden, wide_y = np.empty((most, inner), np.float32), np.empty((most, width), np.float32)
    row = np.empty(inner, np.float32)
    for e in range(w13.shape[0]):
        start, end = offsets[e], offsets[e + 1]
        rows = end - start
        if rows == 0 or rows > most:
            continue
        for m in range(rows):
            spread(x[index[start + m]], wide_x[m], x[0, 0])
        _product(w13, e * 2 * inner * width, wide_x[:rows], gate_up[:rows])
        for m in range(rows):
            silu_mul_row(gate_up[m], row, x[0, 0])
            spread(row, hidden[m], x[0, 0])
        _product(w2, e * inner * width, hidden[:rows], wide_y[:rows])
        _narrow(wide_y[:rows], y[start:end])
    return whole


def prepare_experts(w13_eFD: Tensor, w2_eDF: Tensor) -> Callable[[Tensor, Tensor, np.ndarray, Tensor], bool]:
    """`kernels.experts.reference` into y_RD, for the experts with few rows; whether that was all of them."""
    w13, w2, max_rows = as_array(w13_eFD), as_array(w2_eDF), few(w13_eFD.dtype)

    def apply(x_UD: Tensor, row_index_R: Tensor, offsets: np.ndarray, y_RD: Tensor) -> bool:
        return experts_rows(as_array(x_UD), row_index_R.numpy(), offsets, w13, w2, max_rows, as_array(y_RD))

    return apply
