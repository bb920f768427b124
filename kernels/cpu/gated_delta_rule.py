"""The gated delta rule on a CPU, in fp32 and on one thread.

A chunk is computed for the tokens of it that a step has, one or all of them, by the same products: the sums that make up a
token's numbers run over the state's rows, or the chunk's tokens, in order, and start with what the state gives. So their
bits do not depend on how many tokens are computed at once.

T tokens, D width of the rows, H heads of values (and of the recurrent mixer), G heads of keys, d and v their sizes, S
sequences, B blocks, s positions in one of the chunk cache, W entries of a block table.
"""

from __future__ import annotations

import math
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
    rms_scale,
    transpose,
)
from expertwire.kernels.cpu.recurrent import begin_state, next_piece, steps
from expertwire.kernels.ops import gated_delta_rule as op
from expertwire.kernels.ops.gated_delta_rule import CHUNK, EPS, DeltaCache
from expertwire.kernels.ops.recurrent import StateMetadata

_ROWS = 12  # tokens whose sums over the chunk are computed together


class _Scratch(NamedTuple):
    """Matrices of a chunk, in fp32."""

    rows: np.ndarray  # [128, d]: keys up to those of a step's tokens, and the tokens' queries behind them
    turned: np.ndarray  # [d, 64]: the keys transposed, up to a multiple of sixteen
    scores: np.ndarray  # [128, 64]: tokens' keys and queries times the chunk's keys
    weights: np.ndarray  # [128 or d, 64]
    found: np.ndarray  # [128, v]: what keys and queries find
    u: np.ndarray  # [64, v]
    decay: np.ndarray  # [64]
    factors: np.ndarray  # [64]


def why_reference(key_size: int, value_size: int) -> str | None:
    """Return why heads of these sizes are computed by the reference, or None if they are computed here."""
    if key_size % LANES == 0 and value_size % PANEL == 0:
        return None
    return (
        f"keys of {key_size} and values of {value_size}: vectors need multiples of {LANES} and {PANEL}, so this is slow"
    )


def gated_delta_rule(
    qkv_TD: Tensor,
    a_TH: Tensor,
    b_TH: Tensor,
    A_H: Tensor,
    dt_bias_H: Tensor,
    cache: DeltaCache,
    states: StateMetadata,
) -> Tensor:
    """As `kernels.ops.gated_delta_rule.reference`, which runs if vectors of sixteen do not divide the heads."""
    key_size, value_size = cache.state_BHdv.shape[2:]
    if why_reference(key_size, value_size):
        return op.reference(qkv_TD, a_TH, b_TH, A_H, dt_bias_H, cache, states)
    assert all(tensor.is_contiguous() for tensor in (qkv_TD, *cache)), [tensor.stride() for tensor in (qkv_TD, *cache)]
    assert states.chunk_blocks_S is not None, "no blocks of the chunk cache"
    out_TD = qkv_TD.new_empty(len(qkv_TD), cache.u_BsHv.shape[2:].numel())
    if len(qkv_TD):
        inputs = (as_array(x) for x in (qkv_TD, a_TH.contiguous(), b_TH.contiguous(), A_H, dt_bias_H))
        step = tuple(map(as_array, cache)), steps(states), states.chunk_blocks_S.numpy()
        _run(*inputs, *step, as_array(out_TD))
    return out_TD


@jit
def _gate(a_TH, b_TH, A_H, dt_bias_H, g_TH, beta_TH):
    """Compute the logarithms of decays, and betas."""
    for t in range(a_TH.shape[0]):
        for h in range(a_TH.shape[1]):
            x = load(a_TH[t, h]) + dt_bias_H[h]
            softplus = max(x, np.float32(0)) + np.float32(math.log1p(exp(-abs(x))))
            g_TH[t, h] = A_H[h] * softplus
            y = load(b_TH[t, h])
            # As `decay_factor`: no subnormal number.
            beta_TH[t, h] = np.float32(0) if y < np.float32(-60) else np.float32(1) / (np.float32(1) + exp(-y))


@jit
def _normalise(x, factor, y):
    """Write x, divided by its norm and times `factor`."""
    # Of the mean of squares, not their sum.
    scale = rms_scale(x, EPS / len(x)) * np.float32(factor / math.sqrt(len(x)))
    for i in range(len(x)):
        y[i] = load(x[i]) * scale


@jit
def _read_keys(qkv_TD, g, first, num, place, k_sGd, scratch):
    """Write the chunk's keys up to those of `num` tokens from row `first` on, their queries behind them, and the keys transposed.

    The first of these tokens is number `place` of the chunk, whose cached keys are `k_sGd`.
    """
    (num_keys, dim), rows = k_sGd.shape[1:], scratch.rows
    for s in range(place):
        copy_row(k_sGd[s, g], rows[s])
    for i in range(num):
        row = qkv_TD[first + i]
        _normalise(row[(num_keys + g) * dim : (num_keys + g + 1) * dim], 1.0, rows[place + i])
        _normalise(row[g * dim : (g + 1) * dim], dim**-0.5, rows[place + num + i])
    for s in range(0, place + num, LANES):
        for k in range(0, dim, LANES):
            transpose(rows, s * dim + k, dim, scratch.turned, k * CHUNK + s, CHUNK)


@jit
def _score(place, num, scratch):
    """Multiply keys and queries of tokens by the chunk's keys."""
    dim, columns = scratch.rows.shape[1], -(-(place + num) // PANEL) * PANEL
    scratch.scores[: 2 * num] = np.float32(0)
    product = scratch.turned, 0, CHUNK, columns, scratch.scores, 0, CHUNK
    add_product(scratch.rows, place * dim, dim, 2 * num, dim, *product)


@jit
def _sum_decays(g_T, place, decay):
    """Put the logarithms of tokens' decays behind those of the chunk's earlier tokens, and add them up."""
    for i in range(len(g_T)):
        decay[place + i] = g_T[i]
    for i in range(1, place + len(g_T)):
        decay[i] += decay[i - 1]


@jit
def _weigh(place, num, scratch):
    """Multiply the scores of keys and queries by the decay since the tokens that they meet; zeros behind these.

    Of a key, its own token is one of those behind.
    """
    scores, decay, factors, weights = scratch.scores, scratch.decay, scratch.factors, scratch.weights
    for i in range(num):
        last = place + i
        width = -(-(last + 1) // LANES) * LANES  # whole vectors: what stands behind `last` is not kept
        for s in range(width):
            factors[s] = decay_factor(min(decay[last] - decay[s], np.float32(0)))
        for row in (i, num + i):
            for s in range(width):
                weights[row, s] = factors[s] * scores[row, s]
        weights[i, last:] = np.float32(0)
        weights[num + i, last + 1 :] = np.float32(0)


@jit
def _solve(v_TD, beta_T, place, scratch):
    """Compute the rows of u from `place` on.

    `found` holds what the state before the chunk says of their values, and gets what the chunk's tokens add.
    """
    num, weights, found, u = len(v_TD), scratch.weights, scratch.found, scratch.u
    size = u.shape[1]
    for start in range(0, num, _ROWS):
        end, before = min(start + _ROWS, num), place + start
        product = start * CHUNK, CHUNK, end - start, before, u, 0, size, size, found, start * size, size
        add_product(weights, *product)
        for i in range(start, end):
            own = i * CHUNK + before, CHUNK, 1, i - start, u, before * size, size, size, found, i * size, size
            add_product(weights, *own)
            for j in range(size):
                u[place + i, j] = beta_T[i] * (load(v_TD[i, j]) - found[i, j])


@jit
def _compute_head(v_TD, g_T, beta_T, state, place, scratch, out_TD):
    """Compute the outputs of a head for the tokens of a chunk from number `place` on.

    `scratch` holds u and logarithms of decays up to there. `state` [d, v] moves on with the last token.
    """
    num, (dim, size), found, decay = len(v_TD), state.shape, scratch.found, scratch.decay
    _sum_decays(g_T, place, decay)
    found[: 2 * num] = np.float32(0)
    add_product(scratch.rows, place * dim, dim, 2 * num, dim, state, 0, size, size, found, 0, size)
    for row in range(2 * num):
        factor = decay_factor(decay[place + row % num])
        for j in range(size):
            found[row, j] *= factor
    _weigh(place, num, scratch)
    _solve(v_TD, beta_T, place, scratch)
    for start in range(0, num, _ROWS):
        row, end = num + start, min(start + _ROWS, num)
        product = row * CHUNK, CHUNK, end - start, place + end, scratch.u, 0, size, size, found, row * size, size
        add_product(scratch.weights, *product)
    for i in range(num):
        copy_row(found[num + i], out_TD[i])
    if place + num == CHUNK:
        _move_on(state, scratch)


@jit
def _move_on(state, scratch):
    """Let `state` be the one after the chunk; `decay` and `weights` change."""
    (dim, size), decay, weighted = state.shape, scratch.decay, scratch.weights
    last = decay[CHUNK - 1]
    factor = decay_factor(last)
    for s in range(CHUNK):
        decay[s] = decay_factor(last - decay[s])
    for k in range(dim):
        for s in range(CHUNK):
            weighted[k, s] = decay[s] * scratch.turned[k, s]
        for j in range(size):
            state[k, j] *= factor
    add_product(weighted, 0, CHUNK, dim, CHUNK, scratch.u, 0, size, size, state, 0, size)


@jit
def _advance(qkv_TD, g_TH, beta_TH, cache, block, g, first, start, end, target, scratch, out_TD):
    """Compute a piece's tokens from position `start` to `end`, in rows from `first` on, for the heads of key head g."""
    state_BHdv, k_BsGd, u_BsHv, g_BsH = cache
    u, (num_keys, dim), (num_heads, size) = scratch.u, k_BsGd.shape[2:], u_BsHv.shape[2:]
    group, values_at = num_heads // num_keys, 2 * num_keys * dim
    position = start
    while position < end:
        place = position % CHUNK
        num = min(end - position, CHUNK - place)
        row, kept = first + position - start, place + num if place + num < CHUNK else place
        _read_keys(qkv_TD, g, row, num, place, k_BsGd[block], scratch)
        _score(place, num, scratch)
        for h in range(g * group, (g + 1) * group):
            for i in range(place):
                copy_row(u_BsHv[block, i, h], u[i])
                scratch.decay[i] = g_BsH[block, i, h]
            values_TD = qkv_TD[row : row + num, values_at + h * size : values_at + (h + 1) * size]
            gates, out = (g_TH[row : row + num, h], beta_TH[row : row + num, h]), out_TD[row : row + num]
            _compute_head(values_TD, *gates, state_BHdv[target, h], place, scratch, out[:, h * size : (h + 1) * size])
            for i in range(place, kept):
                copy_row(u[i], u_BsHv[block, i, h])
                g_BsH[block, i, h] = g_TH[row + i - place, h]
        for i in range(place, kept):
            copy_row(scratch.rows[i], k_BsGd[block, i, g])
        position += num


@allocating_jit
def _scratch(dim, size):
    return _Scratch(
        np.zeros((2 * CHUNK, dim), np.float32),
        np.zeros((dim, CHUNK), np.float32),
        empty((2 * CHUNK, CHUNK), np.float32),
        empty((max(2 * CHUNK, dim), CHUNK), np.float32),
        empty((2 * CHUNK, size), np.float32),
        empty((CHUNK, size), np.float32),
        empty((CHUNK,), np.float32),
        empty((CHUNK,), np.float32),
    )


@allocating_jit
def _run(qkv_TD, a_TH, b_TH, A_H, dt_bias_H, cache, steps, chunk_blocks_S, out_TD):
    cu_seqlens_q, seq_lens_S, table_SW, every = steps
    num_keys, (dim, size) = cache[1].shape[2], cache[0].shape[2:]
    g_TH, beta_TH = empty(a_TH.shape, np.float32), empty(a_TH.shape, np.float32)
    _gate(a_TH, b_TH, A_H, dt_bias_H, g_TH, beta_TH)
    scratch = _scratch(dim, size)
    for number in range(len(seq_lens_S)):
        first, length = np.int64(cu_seqlens_q[number]), np.int64(seq_lens_S[number])
        start = length - (cu_seqlens_q[number + 1] - first)
        while start < length:
            end, source, target = next_piece(table_SW[number], start, length, every)
            begin_state(cache[0], source, target)
            for g in range(num_keys):
                piece = chunk_blocks_S[number], g, first, start, end, target
                _advance(qkv_TD, g_TH, beta_TH, cache, *piece, scratch, out_TD)
            first, start = first + end - start, end
