"""The gated delta rule on a CPU, in fp32 and on one thread.

A chunk is computed for the tokens of it that a step has, one or all of them, by the same products: the sums that make up a
token's numbers run over the state's rows, or the chunk's tokens, in order, and start with what the state gives. So their
bits do not depend on how many tokens are computed at once.

T tokens, D width of the rows, H heads of values (and of the recurrent mixer), G heads of keys, d and v their sizes, S
sequences, B blocks, s positions in one of the chunk cache, W entries of a block table.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from expertwire.kernels.cpu._llvm import (
    LANES,
    PANEL,
    add_product,
    allocating_jit,
    as_array,
    copy_row,
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

_SOLVED = 16  # tokens, of those whose u are not computed by products of several rows


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
        inputs = (as_array(x) for x in (qkv_TD, a_TH, b_TH, A_H, dt_bias_H))
        _run(*inputs, tuple(map(as_array, cache)), steps(states), states.chunk_blocks_S.numpy(), as_array(out_TD))
    return out_TD


@jit
def _gate(a_TH, b_TH, A_H, dt_bias_H, g_TH, beta_TH):
    """Compute the logarithms of decays, and betas."""
    for t in range(a_TH.shape[0]):
        for h in range(a_TH.shape[1]):
            x = load(a_TH[t, h]) + dt_bias_H[h]
            softplus = max(x, np.float32(0)) + np.float32(math.log1p(exp(-abs(x))))
            g_TH[t, h] = A_H[h] * softplus
            # e^-x leaves the range of exp only where beta is zero.
            beta_TH[t, h] = np.float32(1) / (np.float32(1) + exp(min(-load(b_TH[t, h]), np.float32(88))))


@jit
def _normalise(x, factor, y):
    """Write x, divided by its norm and times `factor`."""
    # Of the mean of squares, not their sum.
    scale = rms_scale(x, EPS / len(x)) * np.float32(factor / math.sqrt(len(x)))
    for i in range(len(x)):
        y[i] = load(x[i]) * scale


@jit
def _read_keys(qkv_TD, g, first, num, place, k_sGd, rows, turned):
    """Write into `rows` the chunk's keys up to those of `num` tokens from `first` on, and their queries behind them.

    The first of these tokens is number `place` of the chunk, whose cached keys are `k_sGd`. `turned` [d, 64] gets the keys
    transposed, up to a multiple of sixteen.
    """
    num_keys, dim = k_sGd.shape[1:]
    for s in range(place):
        copy_row(k_sGd[s, g], rows[s])
    for i in range(num):
        row = qkv_TD[first + i]
        _normalise(row[(num_keys + g) * dim : (num_keys + g + 1) * dim], 1.0, rows[place + i])
        _normalise(row[g * dim : (g + 1) * dim], dim**-0.5, rows[place + num + i])
    for s in range(0, place + num, LANES):
        for k in range(0, dim, LANES):
            transpose(rows, s * dim + k, dim, turned, k * CHUNK + s, CHUNK)


@jit
def _weigh(scores, place, num, decay, weights):
    """Multiply the scores of keys and queries by the decay since the tokens that they meet; zeros behind these.

    Of a key, its own token is one of those behind.
    """
    for row in range(2 * num):
        last = place + row % num
        seen = last if row < num else last + 1
        for s in range(seen):
            weights[row, s] = exp(decay[last] - decay[s]) * scores[row, s]
        weights[row, seen:] = np.float32(0)


@jit
def _solve(v_TD, beta_T, weights, place, num, known, u):
    """Compute the rows of u [64, v] from `place` on.

    Their `known` holds what the state before the chunk says of their values, and gets what the chunk's tokens add.
    """
    size = known.shape[1]
    for start in range(0, num, _SOLVED):
        end = min(start + _SOLVED, num)
        product = start * CHUNK, CHUNK, end - start, place + start, u, 0, size, size, known, start * size, size
        add_product(weights, *product)
        for i in range(start, end):
            before = place + start
            own = i * CHUNK + before, CHUNK, 1, i - start, u, before * size, size, size, known, i * size, size
            add_product(weights, *own)
            for j in range(size):
                u[place + i, j] = beta_T[i] * (load(v_TD[i, j]) - known[i, j])


@jit
def _compute_head(v_TD, gates, state, turned, rows, scores, place, decay, weights, found, u, out_TD):
    """Compute the outputs of a head for the tokens of a chunk from number `place` on.

    `u` holds the chunk's up to there, and gets those of the tokens; `decay` holds logarithms of each token's, and gets their
    sums. `state` [d, v] moves on with the last token.
    """
    (g_T, beta_T), num, (dim, size) = gates, len(v_TD), state.shape
    for i in range(num):
        decay[place + i] = g_T[i]
    for i in range(1, place + num):
        decay[i] += decay[i - 1]
    found[: 2 * num] = np.float32(0)
    add_product(rows, place * dim, dim, 2 * num, dim, state, 0, size, size, found, 0, size)
    for row in range(2 * num):
        factor = exp(decay[place + row % num])
        for j in range(size):
            found[row, j] *= factor
    _weigh(scores, place, num, decay, weights)
    _solve(v_TD, beta_T, weights, place, num, found, u)
    product = num * CHUNK, CHUNK, num, place + num, u, 0, size, size, found, num * size, size
    add_product(weights, *product)
    for i in range(num):
        copy_row(found[num + i], out_TD[i])
    if place + num == CHUNK:
        _move_on(state, turned, decay, weights, u)


@jit
def _move_on(state, turned, decay, weighted, u):
    """Let `state` be the one after the chunk; `weighted` is scratch, and `decay` changes."""
    dim, size = state.shape
    last = decay[CHUNK - 1]
    factor = exp(last)
    for s in range(CHUNK):
        decay[s] = exp(last - decay[s])
    for k in range(dim):
        for s in range(CHUNK):
            weighted[k, s] = decay[s] * turned[k, s]
        for j in range(size):
            state[k, j] *= factor
    add_product(weighted, 0, CHUNK, dim, CHUNK, u, 0, size, size, state, 0, size)


@jit
def _advance(qkv_TD, g_TH, beta_TH, cache, block, g, first, start, end, target, scratch, out_TD):
    """Compute a piece's tokens from position `start` to `end`, in rows from `first` on, for the heads of key head g."""
    state_BHdv, k_BsGd, u_BsHv, g_BsH = cache
    rows, turned, scores, weights, found, u, decay = scratch
    size, (num_keys, dim), num_heads = u.shape[1], k_BsGd.shape[2:], u_BsHv.shape[2]
    group, values_at = num_heads // num_keys, 2 * num_keys * dim
    position = start
    while position < end:
        place = position % CHUNK
        num = min(end - position, CHUNK - place)
        keys_sGd = k_BsGd[block]
        row, kept = first + position - start, place + num if place + num < CHUNK else place
        _read_keys(qkv_TD, g, row, num, place, keys_sGd, rows, turned)
        columns = -(-(place + num) // PANEL) * PANEL
        scores[: 2 * num] = np.float32(0)
        add_product(rows, place * dim, dim, 2 * num, dim, turned, 0, CHUNK, columns, scores, 0, CHUNK)
        for h in range(g * group, (g + 1) * group):
            for i in range(place):
                copy_row(u_BsHv[block, i, h], u[i])
                decay[i] = g_BsH[block, i, h]
            values_TD = qkv_TD[row : row + num, values_at + h * size : values_at + (h + 1) * size]
            gates = g_TH[row : row + num, h], beta_TH[row : row + num, h]
            out = out_TD[row : row + num, h * size : (h + 1) * size]
            _compute_head(
                values_TD, gates, state_BHdv[target, h], turned, rows, scores, place, decay, weights, found, u, out
            )
            for i in range(place, kept):
                copy_row(u[i], u_BsHv[block, i, h])
                g_BsH[block, i, h] = g_TH[row + i - place, h]
        for i in range(place, kept):
            copy_row(rows[i], keys_sGd[i, g])
        position += num


@allocating_jit
def _run(qkv_TD, a_TH, b_TH, A_H, dt_bias_H, cache, steps, chunk_blocks_S, out_TD):
    cu_seqlens_q, seq_lens_S, table_SW, every = steps
    num_keys, (dim, size) = cache[1].shape[2], cache[0].shape[2:]
    g_TH, beta_TH = empty(a_TH.shape, np.float32), empty(a_TH.shape, np.float32)
    _gate(a_TH, b_TH, A_H, dt_bias_H, g_TH, beta_TH)
    scratch = (
        np.zeros((2 * CHUNK, dim), np.float32),
        np.zeros((dim, CHUNK), np.float32),
        empty((2 * CHUNK, CHUNK), np.float32),
        empty((max(2 * CHUNK, dim), CHUNK), np.float32),
        empty((2 * CHUNK, size), np.float32),
        empty((CHUNK, size), np.float32),
        empty((CHUNK,), np.float32),
    )
    for number in range(len(seq_lens_S)):
        first, length = cu_seqlens_q[number], seq_lens_S[number]
        start = length - (cu_seqlens_q[number + 1] - first)
        while start < length:
            end, source, target = next_piece(table_SW[number], start, length, every)
            begin_state(cache[0], source, target)
            for g in range(num_keys):
                piece = chunk_blocks_S[number], g, first, start, end, target
                _advance(qkv_TD, g_TH, beta_TH, cache, *piece, scratch, out_TD)
            first, start = first + end - start, end
