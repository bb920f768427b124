"""Mamba-2's recurrence on a CPU, on one thread: chunks as products of fp32 matrices.

For the tokens of a chunk, rows t and columns s, and each head:

    y = diag(exp(S_t)) C h + (L * (C B^T)) x + D x        L[t, s] = exp(S_t - S_s) dt_s where s <= t
    h' = exp(S_end) h + B^T (diag(exp(S_end - S_s) dt_s) x)

A prefill has many rows and a decode has one: a row's sums run in the same order, over n or over s, so that its bits do not
depend on how many rows are multiplied together. The state is read where it lies, and moves on there once a chunk.

T tokens, D width of the rows, H heads of d numbers (padded to a multiple of 32 where matrices need it), N numbers of the state
for each of them (padded to 16 in rows of B and C), B blocks, s positions of a block of the chunk cache, S sequences, W entries
of a block table; K = CHUNK, M rows of a product. In names of arrays B and C are also Mamba's inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from expertwire.kernels.cpu._llvm import (
    LANES,
    PANEL,
    add_product,
    allocating_jit,
    as_array,
    copy_row,
    decay_factor,
    empty,
    exp,
    jit,
    load,
    round_like,
    transpose,
)
from expertwire.kernels.cpu.recurrent import begin_state, next_piece, steps
from expertwire.kernels.ops.mamba2 import CHUNK, Mamba2Cache, Mamba2Weights
from expertwire.kernels.ops.recurrent import StateMetadata

_ROWS = 12  # of outputs whose sums over s end together


class _Layer(NamedTuple):
    A_H: np.ndarray
    D_H: np.ndarray
    dt_bias_H: np.ndarray
    num_groups: int
    dt_min: float
    dt_max: float


class _Cache(NamedTuple):
    state_BHNd: np.ndarray
    inputs_BsD: np.ndarray
    dt_BsH: np.ndarray


class _Scratch(NamedTuple):
    """Matrices of a chunk, in fp32."""

    dt_HK: np.ndarray
    sums_HK: np.ndarray  # of dt A up to a token
    B_KN: np.ndarray
    B_NK: np.ndarray
    C_KN: np.ndarray
    scores_KK: np.ndarray
    weights_KK: np.ndarray
    x_Kd: np.ndarray
    y_Kd: np.ndarray
    state_Nd: np.ndarray


@jit
def _pad(number, multiple):
    return (number + multiple - 1) // multiple * multiple


@allocating_jit
def _scratch(heads, size, dim):
    f32, width, columns = np.float32, _pad(size, LANES), _pad(dim, PANEL)
    scratch = _Scratch(
        empty((heads, CHUNK), f32),
        empty((heads, CHUNK), f32),
        empty((CHUNK, width), f32),
        empty((width, CHUNK), f32),
        empty((CHUNK, width), f32),
        empty((CHUNK, CHUNK), f32),
        empty((CHUNK, CHUNK), f32),
        empty((CHUNK, columns), f32),
        empty((CHUNK, columns), f32),
        empty((size, columns), f32),
    )
    # Padding is read.
    scratch.dt_HK[:], scratch.sums_HK[:], scratch.B_KN[:], scratch.x_Kd[:], scratch.state_Nd[:] = 0, 0, 0, 0, 0
    return scratch


@jit
def _softplus(x):
    return max(x, np.float32(0)) + np.float32(np.log1p(exp(-abs(x))))


@jit
def _find_steps(raw_TH, dt_BsH, block, first, layer, dt_HK, sums_HK):
    """Compute dt and its sums of a chunk: `first` tokens from the cache, then new ones."""
    for h in range(len(dt_HK)):
        total = np.float32(0)
        for s in range(first + len(raw_TH)):
            if s < first:
                dt = dt_BsH[block, s, h]
            else:
                dt = _softplus(np.float32(load(raw_TH[s - first, h])) + layer.dt_bias_H[h])
                dt = min(max(dt, np.float32(layer.dt_min)), np.float32(layer.dt_max))
            total += dt * layer.A_H[h]
            dt_HK[h, s], sums_HK[h, s] = dt, total


@jit
def _gather(new_TD, inputs_BsD, block, first, column, width, rows):
    """Copy a column slice of a chunk's rows: `first` tokens from the cache, then new ones."""
    for s in range(first):
        copy_row(inputs_BsD[block, s, column : column + width], rows[s])
    for s in range(len(new_TD)):
        copy_row(new_TD[s, column : column + width], rows[first + s])


@jit
def _prepare_group(new_TD, inputs_BsD, block, first, B_at, C_at, size, scratch):
    """Gather B of a chunk and C of its new tokens, and multiply them."""
    known = first + len(new_TD)
    _gather(new_TD, inputs_BsD, block, first, B_at, size, scratch.B_KN)
    _gather(new_TD, inputs_BsD, block, 0, C_at, size, scratch.C_KN)
    width = scratch.B_KN.shape[1]
    for s in range(0, known, LANES):
        for n in range(0, width, LANES):
            transpose(scratch.B_KN, s * width + n, width, scratch.B_NK, n * CHUNK + s, CHUNK)
    scratch.scores_KK[: len(new_TD)] = 0
    add_product(
        scratch.C_KN,
        0,
        width,
        len(new_TD),
        size,
        scratch.B_NK,
        0,
        CHUNK,
        _pad(known, PANEL),
        scratch.scores_KK,
        0,
        CHUNK,
    )


@jit
def _weigh(scores_K, sums_K, dt_K, t, limit, weights_K):
    """Weigh the tokens up to t; write zeros behind them."""
    for s in range(_pad(t + 1, LANES)):
        weights_K[s] = decay_factor(min(sums_K[t] - sums_K[s], np.float32(0))) * dt_K[s] * scores_K[s]
    for s in range(t + 1, limit):
        weights_K[s] = 0


@jit
def _scale_row(factor, y):
    for j in range(len(y)):
        y[j] *= factor


@jit
def _outputs(h, skip, state_Nd, first, scratch, y_Td):
    """Compute a head's outputs of the new tokens, from the `first` of the chunk on."""
    sums_K, dt_K, x_Kd, found_Kd = scratch.sums_HK[h], scratch.dt_HK[h], scratch.x_Kd, scratch.y_Kd
    num, width, (size, columns) = len(y_Td), scratch.C_KN.shape[1], state_Nd.shape
    found_Kd[:num] = 0
    add_product(scratch.C_KN, 0, width, num, size, state_Nd, 0, columns, columns, found_Kd, 0, columns)
    for m in range(0, num, _ROWS):
        end = min(m + _ROWS, num)
        for t in range(m, end):
            _scale_row(decay_factor(sums_K[first + t]), found_Kd[t])
            _weigh(scratch.scores_KK[t], sums_K, dt_K, first + t, first + end, scratch.weights_KK[t])
        product = m * CHUNK, CHUNK, end - m, first + end, x_Kd, 0, columns, columns, found_Kd, m * columns, columns
        add_product(scratch.weights_KK, *product)
    for t in range(num):
        for j in range(y_Td.shape[1]):
            y_Td[t, j] = round_like(found_Kd[t, j] + skip * x_Kd[first + t, j], y_Td[t, j])


@jit
def _advance(h, state_Nd, scratch):
    """Let a head's state move on by a whole chunk; `x_Kd` is scaled in place."""
    sums_K, dt_K, x_Kd, (size, columns) = scratch.sums_HK[h], scratch.dt_HK[h], scratch.x_Kd, state_Nd.shape
    decay = decay_factor(sums_K[CHUNK - 1])
    for n in range(size):
        _scale_row(decay, state_Nd[n])
    for s in range(CHUNK):
        _scale_row(decay_factor(sums_K[CHUNK - 1] - sums_K[s]) * dt_K[s], x_Kd[s])
    add_product(scratch.B_NK, 0, CHUNK, size, CHUNK, x_Kd, 0, columns, columns, state_Nd, 0, columns)


@jit
def _head(h, skip, state_Nd, first, complete, scratch, y_Td):
    """Compute a head's outputs of the new tokens, and its next state if they complete the chunk."""
    dim = state_Nd.shape[1]
    if dim % PANEL == 0:
        _outputs(h, skip, state_Nd, first, scratch, y_Td)
        if complete:
            _advance(h, state_Nd, scratch)
    else:
        for n in range(len(state_Nd)):
            copy_row(state_Nd[n], scratch.state_Nd[n])
        _outputs(h, skip, scratch.state_Nd, first, scratch, y_Td)
        if complete:
            _advance(h, scratch.state_Nd, scratch)
            for n in range(len(state_Nd)):
                copy_row(scratch.state_Nd[n, :dim], state_Nd[n])


@jit
def _chunk(new_TD, raw_TH, layer, cache, state_HNd, block, first, scratch, y_TD):
    """Compute the new tokens of a chunk, which has `first` others.

    The state moves on if they complete the chunk, else they are written to the chunk cache.
    """
    (heads, size, dim), complete = state_HNd.shape, first + len(new_TD) == CHUNK
    _find_steps(raw_TH, cache.dt_BsH, block, first, layer, scratch.dt_HK, scratch.sums_HK)
    each = heads // layer.num_groups
    for h in range(heads):
        if h % each == 0:
            B_at = heads * dim + h // each * size
            C_at = B_at + layer.num_groups * size
            _prepare_group(new_TD, cache.inputs_BsD, block, first, B_at, C_at, size, scratch)
        _gather(new_TD, cache.inputs_BsD, block, first, h * dim, dim, scratch.x_Kd)
        _head(h, layer.D_H[h], state_HNd[h], first, complete, scratch, y_TD[:, h * dim : (h + 1) * dim])
    if not complete:
        for t in range(len(new_TD)):
            kept = cache.inputs_BsD[block, first + t]
            copy_row(new_TD[t, : len(kept)], kept)
            for h in range(heads):
                cache.dt_BsH[block, first + t, h] = scratch.dt_HK[h, first + t]


@allocating_jit
def _mamba2(xBC_TD, raw_TH, layer, cache, steps, chunk_blocks_S, y_TD):
    cu_seqlens_q, seq_lens_S, table_SW, every = steps
    heads, size, dim = cache.state_BHNd.shape[1:]
    scratch = _scratch(heads, size, dim)
    for b in range(len(seq_lens_S)):
        row, length = np.int64(cu_seqlens_q[b]), np.int64(seq_lens_S[b])
        start = length - (cu_seqlens_q[b + 1] - row)
        while start < length:
            end, source, target = next_piece(table_SW[b], start, length, every)
            begin_state(cache.state_BHNd, source, target)
            while start < end:
                stop = min(end, (start // CHUNK + 1) * CHUNK)
                last = row + stop - start
                where = cache.state_BHNd[target], chunk_blocks_S[b], start % CHUNK
                _chunk(xBC_TD[row:last], raw_TH[row:last], layer, cache, *where, scratch, y_TD[row:last])
                row, start = last, stop


def mamba2(xBC_TD: Tensor, dt_TH: Tensor, weights: Mamba2Weights, cache: Mamba2Cache, states: StateMetadata) -> Tensor:
    """As `kernels.ops.mamba2.Mamba2Scan`."""
    assert states.chunk_blocks_S is not None, "no blocks of the chunk cache"
    assert xBC_TD.is_contiguous(), f"strides {xBC_TD.stride()} of shape {tuple(xBC_TD.shape)}"
    assert all(tensor.is_contiguous() for tensor in cache), [tensor.stride() for tensor in cache]
    assert cache.inputs_BsD.dtype == xBC_TD.dtype, f"inputs {cache.inputs_BsD.dtype} of {xBC_TD.dtype}"
    shape = weights.A_H.shape[0], weights.state_size, weights.head_dim
    assert cache.inputs_BsD.shape[2] == weights.stored_width, (
        f"{tuple(cache.inputs_BsD.shape)}, {weights.stored_width} wide"
    )
    assert cache.state_BHNd.shape[1:] == shape, f"states {tuple(cache.state_BHNd.shape)} of {shape}"
    assert cache.inputs_BsD.shape[1] == CHUNK, f"blocks of {cache.inputs_BsD.shape[1]} positions, chunks of {CHUNK}"
    y_TD = xBC_TD.new_empty(xBC_TD.shape[0], weights.widths[0])
    layer = _Layer(
        weights.A_H.numpy(), weights.D_H.numpy(), weights.dt_bias_H.numpy(), weights.num_groups, weights.dt_min,
        weights.dt_max,
    )  # fmt: skip
    arrays = _Cache(*(as_array(tensor) for tensor in cache))
    inputs = as_array(xBC_TD), as_array(dt_TH.detach().contiguous())
    _mamba2(*inputs, layer, arrays, steps(states), states.chunk_blocks_S.numpy(), as_array(y_TD))
    return y_TD
