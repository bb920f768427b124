"""Products of few rows with a large weight on a CPU, at the speed of memory: `y_MN = x_MK @ w_NK^T`. They use one thread.

By tiles of vectors (`tile`) or, for bf16 where the processor has them, of matrices (`amx`); which, depends on a weight alone.

M rows (few), N outputs, K inputs, R routed rows, e experts, D model width, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from expertwire.kernels.cpu import amx
from expertwire.kernels.cpu.elementwise import silu_mul_of, silu_mul_row
from expertwire.kernels.cpu.numbers import as_array, jit, round_like
from expertwire.kernels.cpu.tile import LINE, TILE_M, TILE_N, spread, tile

_CHUNK = 32  # rows of w that stay in the cache while all rows of x meet them
_LATER_BYTES = 16384


def few(dtype: torch.dtype) -> int:
    """Up to how many rows this beats a library's kernel, which reuses what it has read (measured with AVX-512 and AMX)."""
    if dtype == torch.bfloat16:
        return 128 if amx.AVAILABLE else 24
    return 48


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
def _put_back(products: np.ndarray, tile: int, m: int, n: int, y: np.ndarray) -> None:
    """Tile `tile` of `amx.multiply` into up to 16 rows of y from `m` on, at outputs from `n` on; the tile is lost."""
    start = tile * amx.TILE * amx.TILE
    amx.transpose(products, start, amx.TILE, products, start, amx.TILE)
    for i in range(min(amx.TILE, y.shape[0] - m)):
        out, row = y[m + i, n : n + amx.TILE], products[tile, i]
        for j in range(amx.TILE):
            out[j] = round_like(row[j], out[j])


@jit
def _product_by_matrices(w: np.ndarray, w_at: int, pairs: np.ndarray, products: np.ndarray, y: np.ndarray) -> None:
    """As `_product`, with x in pairs and y rounded."""
    num_n, num_k, num_blocks = y.shape[1], 2 * pairs.shape[1], amx.blocks_of(y.shape[0])
    for n in range(0, num_n, 2 * amx.TILE):
        # The last ones once more, if there is no whole tile left.
        first, second = min(n, num_n - amx.TILE), min(n + amx.TILE, num_n - amx.TILE)
        ahead = 2 * amx.TILE * num_k
        for block in range(0, num_blocks, 2):
            amx.multiply(w, w_at + first * num_k, w_at + second * num_k, ahead, pairs, block, num_blocks, products)
            for j in range(min(2, num_blocks - block)):
                m = (block + j) * amx.TILE
                _put_back(products, 2 * j, m, first, y)
                _put_back(products, 2 * j + 1, m, second, y)


@jit
def _hidden_by_matrices(
    w13: np.ndarray, w_at: int, inner: int, pairs: np.ndarray, num_m: int, products: np.ndarray, hidden: np.ndarray
) -> None:
    """The rows between an expert's products, x and they in pairs."""
    num_k, num_blocks, like = 2 * pairs.shape[1], amx.blocks_of(num_m), w13[0, 0, 0]
    for n in range(0, inner, amx.TILE):
        gate, up, ahead = w_at + n * num_k, w_at + (inner + n) * num_k, amx.TILE * num_k
        for block in range(0, num_blocks, 2):
            amx.multiply(w13, gate, up, ahead, pairs, block, num_blocks, products)
            for j in range(min(2, num_blocks - block)):
                for i in range(0, amx.TILE, 2):
                    for m in range(amx.TILE):
                        low = silu_mul_of(products[2 * j, i, m], products[2 * j + 1, i, m], like)
                        high = silu_mul_of(products[2 * j, i + 1, m], products[2 * j + 1, i + 1, m], like)
                        hidden[block + j, (n + i) // 2, m] = np.uint32(low) | (np.uint32(high) << np.uint32(16))


@jit
def _linear_by_matrices(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
    pairs = np.zeros((amx.blocks_of(x.shape[0]), x.shape[1] // 2, amx.TILE), np.uint32)
    products = np.empty((4, amx.TILE, amx.TILE), np.float32)
    rows = np.zeros((amx.TILE, x.shape[1]), np.uint16)
    amx.put_pairs(x, np.arange(x.shape[0]), 0, x.shape[0], rows, pairs)
    amx.begin()
    _product_by_matrices(w, 0, pairs, products, y)
    amx.finish()


@jit
def _linear_by_tiles(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
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
        _linear(as_array(x_MK), weight, as_array(y_MN))
        return y_MN

    return apply


@jit
def _most_rows(offsets: np.ndarray, max_rows: int) -> int:
    """Of the experts that have no more than `max_rows`."""
    most = 0
    for e in range(len(offsets) - 1):
        rows = offsets[e + 1] - offsets[e]
        if most < rows <= max_rows:
            most = rows
    return most


@jit
def _experts_by_tiles(
    x: np.ndarray, index: np.ndarray, offsets: np.ndarray, w13: np.ndarray, w2: np.ndarray, most: int, y: np.ndarray
) -> None:
    width, inner = x.shape[1], w2.shape[2]
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


@jit
def _experts_by_matrices(
    x: np.ndarray, index: np.ndarray, offsets: np.ndarray, w13: np.ndarray, w2: np.ndarray, most: int, y: np.ndarray
) -> None:
    width, inner, blocks = x.shape[1], w2.shape[2], amx.blocks_of(most)
    pairs = np.zeros((blocks, width // 2, amx.TILE), np.uint32)
    block_of_x = np.zeros((amx.TILE, width), np.uint16)
    hidden = np.zeros((blocks, inner // 2, amx.TILE), np.uint32)
    products = np.empty((4, amx.TILE, amx.TILE), np.float32)
    amx.begin()
    for e in range(w13.shape[0]):
        start, end = offsets[e], offsets[e + 1]
        rows = end - start
        if rows == 0 or rows > most:
            continue
        amx.put_pairs(x, index, start, rows, block_of_x, pairs)
        _hidden_by_matrices(w13, e * 2 * inner * width, inner, pairs, rows, products, hidden)
        _product_by_matrices(w2, e * inner * width, hidden, products, y[start:end])
    amx.finish()


def linear_rows(x, w, y):
    """`kernels.linear.reference` of contiguous rows; by matrices, if the weights fill their tiles and the processor has any."""


@overload(linear_rows)
def _linear_rows_overload(x, w, y):
    if not (amx.AVAILABLE and w.dtype == types.uint16):
        return lambda x, w, y: _linear_by_tiles(x, w, y)

    def either(x, w, y):
        if w.shape[0] < amx.TILE:
            _linear_by_tiles(x, w, y)
        else:
            _linear_by_matrices(x, w, y)

    return either


def experts_rows(x, index, offsets, w13, w2, max_rows, y):
    """`kernels.experts.reference`, for experts of `max_rows` rows at most; whether that was all of them."""


@overload(experts_rows)
def _experts_rows_overload(x, index, offsets, w13, w2, max_rows, y):
    # Both widths are multiples of a line, so whole tiles fill the weights.
    if amx.AVAILABLE and w13.dtype == types.uint16:

        def by_matrices(x, index, offsets, w13, w2, max_rows, y):
            _experts_by_matrices(x, index, offsets, w13, w2, _most_rows(offsets, max_rows), y)
            return np.diff(offsets).max() <= max_rows

        return by_matrices

    def by_tiles(x, index, offsets, w13, w2, max_rows, y):
        _experts_by_tiles(x, index, offsets, w13, w2, _most_rows(offsets, max_rows), y)
        return np.diff(offsets).max() <= max_rows

    return by_tiles


@jit
def _linear(x: np.ndarray, w: np.ndarray, y: np.ndarray) -> None:
    linear_rows(x, w, y)


@jit
def _experts(
    x: np.ndarray, index: np.ndarray, offsets: np.ndarray, w13: np.ndarray, w2: np.ndarray, max_rows: int, y: np.ndarray
) -> bool:
    return experts_rows(x, index, offsets, w13, w2, max_rows, y)


def prepare_experts(w13_eFD: Tensor, w2_eDF: Tensor) -> Callable[[Tensor, Tensor, np.ndarray, Tensor], bool]:
    """`kernels.experts.reference` into y_RD, for the experts with few rows; whether that was all of them."""
    w13, w2, max_rows = as_array(w13_eFD), as_array(w2_eDF), few(w13_eFD.dtype)

    def apply(x_UD: Tensor, row_index_R: Tensor, offsets: np.ndarray, y_RD: Tensor) -> bool:
        return _experts(as_array(x_UD), row_index_R.numpy(), offsets, w13, w2, max_rows, as_array(y_RD))

    return apply
