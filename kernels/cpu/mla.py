"""Latent attention on a CPU: one key head for all query heads, whose first numbers are the values.

After every SPLIT keys, at absolute positions, what was found is added to what was found before (the online softmax of Milakov
and Gimelshein, 2018): so keys and values of a split are read once, from the cache into panels that stay in a processor's cache,
for many rows, each a token's and a head's. As in `attention`, a row's bits depend on what it sees alone: to a row, splits behind
its position are not there.

Positions that were chosen are a sequence of their own, in blocks of one token.

T tokens, H heads, C latent size, l = C + r, B sequences, b blocks, s block size, R rows.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from expertwire.kernels.cpu.cached import pack_keys, pack_values, panels
from expertwire.kernels.cpu.multiply import HEAD, begin, finish, multiply, operand, products, rows_at_once
from expertwire.kernels.cpu.numbers import allocating_jit, as_array, empty, exp, jit, round_like
from expertwire.kernels.cpu.panel import LINE, PANEL, put_rows
from expertwire.kernels.cpu.rows import put_row
from expertwire.kernels.cpu.softmax import soften
from expertwire.kernels.cpu.vectors import LANES
from expertwire.kernels.ops.attention import AttentionMetadata

_SPLIT = 512  # keys: DeepSeek-V3's panels of them take 1.1 MB
_ROWS = 512


@allocating_jit
def _attend(q_THl, cache_Ns1l, kv_scale, tables_Bb, cu_seqlens_q, seq_lens_B, scale, out_THC):
    (num_heads, width), rank = q_THl.shape[1:], out_THC.shape[2]
    depth, depth_v = -(-width // LINE) * LINE, -(-rank // LINE) * LINE
    keys, values = panels(q_THl, _SPLIT // PANEL, depth), panels(q_THl, depth_v // PANEL, _SPLIT)
    step = min(_ROWS, np.diff(cu_seqlens_q).max() * num_heads)
    rows, two_rows = operand(LANES, depth, keys), np.zeros((2, depth_v), cache_Ns1l.dtype)
    queries, weights = operand(step, depth, keys), operand(step, _SPLIT, values)
    rows[:], queries[:] = 0, 0
    scores, found = empty((step, _SPLIT), np.float32), products()
    unbiased, total = np.zeros(PANEL, np.float32), np.empty(1, np.float32)
    sums_RC = empty((step, depth_v), np.float32)
    totals_R, tops_R = np.empty(step, np.float32), np.empty(step, np.float32)
    value_scale = np.float32(kv_scale)
    scale = np.float32(scale) * value_scale
    begin(keys)
    for b in range(len(seq_lens_B)):
        num, length = cu_seqlens_q[b + 1] - cu_seqlens_q[b], seq_lens_B[b]
        for start in range(0, num * num_heads, step):
            count = min(step, num * num_heads - start)
            _put_queries(q_THl, cu_seqlens_q[b], start, count, queries)
            sums_RC[:], totals_R[:], tops_R[:] = 0, 0, -np.inf
            position = length - num + start // num_heads  # of row 0, which is of head `start % num_heads`
            end = length - num + (start + count - 1) // num_heads + 1
            for split in range(0, end, _SPLIT):
                stop = min(split + _SPLIT, end)
                pack_keys(cache_Ns1l, tables_Bb[b], 0, split, stop, rows, keys)
                pack_values(cache_Ns1l, rank, tables_Bb[b], 0, split, split, stop, two_rows, values)
                seen = -(-(stop - split) // PANEL) * PANEL
                _score(queries, count, keys, seen, found, unbiased, scores)
                for i in range(count):
                    visible = position + (start % num_heads + i) // num_heads + 1 - split
                    _weigh(scores, i, visible, scale, weights, seen, sums_RC, totals_R, tops_R, total)
                _add(weights, count, seen, values, found, sums_RC)
            _put_outputs(sums_RC, totals_R, value_scale, cu_seqlens_q[b], start, count, out_THC)
    finish(keys)


@jit
def _put_queries(q_THl, first, start, count, queries):
    num_heads = q_THl.shape[1]
    for i in range(count):
        put_row(q_THl[first + (start + i) // num_heads, (start + i) % num_heads], queries[i])


@jit
def _put_outputs(sums_RC, totals_R, value_scale, first, start, count, out_THC):
    num_heads, rank = out_THC.shape[1:]
    for i in range(count):
        target = out_THC[first + (start + i) // num_heads, (start + i) % num_heads]
        for j in range(rank):
            target[j] = round_like(value_scale * sums_RC[i, j] / totals_R[i], target[j])


@jit
def _score(queries, count, keys, seen, found, unbiased, scores):
    once, width = rows_at_once(keys), scores.shape[1]
    for i in range(seen // PANEL):
        for m in range(0, count, once):
            multiply(queries, m, count, queries.shape[1], keys, i, found)
            put_rows(found, HEAD, min(once, count - m), unbiased, 0, scores, m * width + i * PANEL, width)


@jit
def _weigh(scores, i, visible, scale, weights, seen, sums_RC, totals_R, tops_R, total):
    """Row i's weights of a split, of which it sees the first `visible` keys; its earlier sums, relative to the new maximum."""
    if visible <= 0:
        weights[i, :seen] = 0
        return
    width = scores.shape[1]
    top = soften(scores, i * width, min(visible, seen), scale, tops_R[i], weights, i * width, seen, total)
    factor = exp(tops_R[i] - top)
    totals_R[i] = totals_R[i] * factor + total[0]
    tops_R[i] = top
    for j in range(sums_RC.shape[1]):
        sums_RC[i, j] *= factor


@jit
def _add(weights, count, seen, values, found, sums_RC):
    once = rows_at_once(values)
    for i in range(len(values)):
        for m in range(0, count, once):
            multiply(weights, m, count, seen, values, i, found)
            for row in range(min(once, count - m)):
                for j in range(PANEL):
                    sums_RC[m + row, i * PANEL + j] += found[HEAD + row, j]


def attend(
    q_THl: Tensor,
    cache: Tensor,
    seqs: AttentionMetadata,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """`kernels.ops.mla.reference`."""
    out_THC = q_THl.new_empty(*q_THl.shape[:2], rank)
    q, rows, out = (as_array(tensor) for tensor in (q_THl, cache, out_THC))
    where = tuple(tensor.numpy() for tensor in (seqs.block_table, seqs.cu_seqlens_q, seqs.seq_lens))
    if chosen is not None:
        where = _chosen_sequences(chosen.numpy(), *where, cache.shape[1])
        rows = rows.reshape(-1, 1, rows.shape[2])
    if len(q) > 0:
        _attend(q, rows[:, :, None], 1.0 if kv_scale is None else kv_scale.item(), *where, scale, out)
    return out_THC


@allocating_jit
def _chosen_sequences(chosen_Tk, tables_Bb, cu_seqlens_q, seq_lens_B, block_size):
    """Block tables, `cu_seqlens_q` and lengths of sequences in blocks of one token, so that each query's last positions are those
    that it chose. A sequence whose queries all see everything stays one, any other becomes one for each query."""
    num_tokens, most = chosen_Tk.shape
    slots_Bk, ends = np.zeros((num_tokens, most), np.int32), np.zeros(num_tokens + 1, np.int32)
    counts_B, num = np.zeros(num_tokens, np.int32), 0
    for b in range(len(seq_lens_B)):
        start, end, length = cu_seqlens_q[b], cu_seqlens_q[b + 1], seq_lens_B[b]
        sees_all = length <= most
        for t in range(start, end):
            sees_all = sees_all and (chosen_Tk[t] >= 0).sum() == length - end + t + 1
        for t in range(end - 1 if sees_all else start, end):
            positions = np.sort(chosen_Tk[t])
            positions = positions[(positions < 0).sum() :]
            for i in range(len(positions)):
                slots_Bk[num, i] = tables_Bb[b, positions[i] // block_size] * block_size + positions[i] % block_size
            counts_B[num], ends[num + 1], num = len(positions), t + 1, num + 1
    return slots_Bk[:num], ends[: num + 1], counts_B[:num]
