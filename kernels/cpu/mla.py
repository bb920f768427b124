"""Latent attention (MLA) on a CPU, and the indexer of its sparse variant.

One key head serves all query heads, and its first numbers are the values. Keys are processed in splits of `_SPLIT`
absolute positions, joined by an online softmax (Milakov and Gimelshein, 2018): a split's keys and values are packed
once, into panels that stay in the processor's cache, for many rows, one for each token and head. As in `attention`,
a row's bits depend only on the keys that it sees: it skips splits behind its position.

Chosen positions are treated as sequences of their own, in blocks of one token.

T tokens, H heads, c latent size, l = c + r, d index head size, S sequences, B blocks, s block size, W entries of a
block table, R rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu._llvm import (
    HEAD,
    K_STEP,
    LANES,
    PANEL,
    accumulators,
    allocating_jit,
    as_array,
    begin_products,
    copy_row,
    empty,
    empty_panels,
    end_products,
    exp,
    jit,
    load,
    longest_part,
    multiply,
    online_softmax_update,
    operand,
    pack_keys,
    pack_values,
    round_like,
    rows_at_once,
    store_rows,
)
from expertwire.kernels.ops.attention import AttentionMetadata

_SPLIT = 512  # keys; DeepSeek-V3's panels of them take 1.1 MB
_ROWS = 512


@allocating_jit
def _attend(q_THl, cache_Bs1l, kv_scale, tables_SW, cu_seqlens_q, seq_lens_S, scale, out_THc):
    (num_heads, width), rank = q_THl.shape[1:], out_THc.shape[2]
    depth, depth_v = -(-width // K_STEP) * K_STEP, -(-rank // K_STEP) * K_STEP
    keys, values = empty_panels(q_THl, _SPLIT // PANEL, depth), empty_panels(q_THl, depth_v // PANEL, _SPLIT)
    step = min(_ROWS, longest_part(cu_seqlens_q) * num_heads)
    rows, two_rows = operand(LANES, depth, keys), np.zeros((2, depth_v), cache_Bs1l.dtype)
    queries, weights = operand(step, depth, keys), operand(step, _SPLIT, values)
    rows[:], queries[:] = 0, 0
    scores, acc = empty((step, _SPLIT), np.float32), accumulators()
    unbiased, total = np.zeros(PANEL, np.float32), np.empty(1, np.float32)
    sums_Rc = empty((step, depth_v), np.float32)
    totals_R, tops_R = np.empty(step, np.float32), np.empty(step, np.float32)
    value_scale = np.float32(kv_scale)
    scale = np.float32(scale) * value_scale
    begin_products(keys)
    for b in range(len(seq_lens_S)):
        num, length = cu_seqlens_q[b + 1] - cu_seqlens_q[b], seq_lens_S[b]
        for start in range(0, num * num_heads, step):
            count = min(step, num * num_heads - start)
            _store_queries(q_THl, cu_seqlens_q[b], start, count, queries)
            sums_Rc[:], totals_R[:], tops_R[:] = 0, 0, -np.inf
            position = length - num + start // num_heads  # of row 0, whose head is `start % num_heads`
            end = length - num + (start + count - 1) // num_heads + 1
            for split in range(0, end, _SPLIT):
                stop = min(split + _SPLIT, end)
                pack_keys(cache_Bs1l, tables_SW[b], 0, split, split, stop, rows, keys)
                pack_values(cache_Bs1l, rank, tables_SW[b], 0, split, split, split, stop, two_rows, values)
                seen = -(-(stop - split) // PANEL) * PANEL
                _score(queries, count, keys, seen, acc, unbiased, scores)
                for i in range(count):
                    visible = position + (start % num_heads + i) // num_heads + 1 - split
                    _weigh(scores, i, visible, scale, weights, seen, sums_Rc, totals_R, tops_R, total)
                _add(weights, count, seen, values, acc, sums_Rc)
            _store_outputs(sums_Rc, totals_R, value_scale, cu_seqlens_q[b], start, count, out_THc)
    end_products(keys)


@jit
def _store_queries(q_THl, first, start, count, queries):
    num_heads = q_THl.shape[1]
    for i in range(count):
        copy_row(q_THl[first + (start + i) // num_heads, (start + i) % num_heads], queries[i])


@jit
def _store_outputs(sums_Rc, totals_R, value_scale, first, start, count, out_THc):
    num_heads, rank = out_THc.shape[1:]
    for i in range(count):
        target = out_THc[first + (start + i) // num_heads, (start + i) % num_heads]
        for j in range(rank):
            target[j] = round_like(value_scale * sums_Rc[i, j] / totals_R[i], target[j])


@jit
def _score(queries, count, keys, seen, acc, unbiased, scores):
    once, width = rows_at_once(keys), scores.shape[1]
    for i in range(seen // PANEL):
        for m in range(0, count, once):
            multiply(queries, m, count, queries.shape[1], keys, i, acc)
            store_rows(acc, HEAD, min(once, count - m), unbiased, 0, scores, m * width + i * PANEL, width)


@jit
def _weigh(scores, i, visible, scale, weights, seen, sums_Rc, totals_R, tops_R, total):
    """Compute row i's weights of a split's first `visible` keys, and rescale its earlier sums to the new maximum."""
    if visible <= 0:
        weights[i, :seen] = 0
        return
    width = scores.shape[1]
    top = online_softmax_update(
        scores, i * width, min(visible, seen), scale, tops_R[i], weights, i * width, seen, total
    )
    factor = exp(tops_R[i] - top)
    totals_R[i] = totals_R[i] * factor + total[0]
    tops_R[i] = top
    for j in range(sums_Rc.shape[1]):
        sums_Rc[i, j] *= factor


@jit
def _add(weights, count, seen, values, acc, sums_Rc):
    once = rows_at_once(values)
    for i in range(len(values)):
        for m in range(0, count, once):
            multiply(weights, m, count, seen, values, i, acc)
            for row in range(min(once, count - m)):
                for j in range(PANEL):
                    sums_Rc[m + row, i * PANEL + j] += acc[HEAD + row, j]


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
    """As `kernels.ops.mla.AttendLatent`."""
    out_THc = q_THl.new_empty(*q_THl.shape[:2], rank)
    q, rows, out = (as_array(tensor) for tensor in (q_THl, cache, out_THc))
    where = tuple(tensor.numpy() for tensor in (seqs.block_table, seqs.cu_seqlens_q, seqs.seq_lens))
    if chosen is not None:
        where = _chosen_sequences(chosen.numpy(), *where, cache.shape[1])
        rows = rows.reshape(-1, 1, rows.shape[2])
    if len(q) > 0:
        _attend(q, rows[:, :, None], 1.0 if kv_scale is None else kv_scale.item(), *where, scale, out)
    return out_THc


@allocating_jit
def _chosen_sequences(chosen_Tk, tables_SW, cu_seqlens_q, seq_lens_S, block_size):
    """Return block tables, `cu_seqlens_q` and lengths of sequences in blocks of one token, for the chosen positions.

    Each query's last positions are those it chose. A sequence whose queries all see everything stays one sequence, any
    other becomes one for each query.
    """
    num_tokens, most = chosen_Tk.shape
    slots_Sk, ends = np.zeros((num_tokens, most), np.int32), np.zeros(num_tokens + 1, np.int32)
    lens_S, num = np.zeros(num_tokens, np.int32), 0
    for b in range(len(seq_lens_S)):
        start, end, length = cu_seqlens_q[b], cu_seqlens_q[b + 1], seq_lens_S[b]
        sees_all = length <= most
        for t in range(start, end):
            sees_all = sees_all and (chosen_Tk[t] >= 0).sum() == length - end + t + 1
        for t in range(end - 1 if sees_all else start, end):
            positions = np.sort(chosen_Tk[t])
            positions = positions[(positions < 0).sum() :]
            for i in range(len(positions)):
                slots_Sk[num, i] = tables_SW[b, positions[i] // block_size] * block_size + positions[i] % block_size
            lens_S[num], ends[num + 1], num = len(positions), t + 1, num + 1
    return slots_Sk[:num], ends[: num + 1], lens_S[:num]


# ---- indexer


@allocating_jit
def _choose(q_THd, weights_TH, k_Bs1d, tables_SW, cu_seqlens_q, seq_lens_S, chosen_Tk):
    num_heads, dim = q_THd.shape[1:]
    width, depth = -(-max(seq_lens_S) // PANEL) * PANEL, -(-dim // K_STEP) * K_STEP
    keys = empty_panels(q_THd, width // PANEL, depth)
    rows, queries = operand(LANES, depth, keys), operand(num_heads, depth, keys)
    rows[:], queries[:] = 0, 0
    acc, scores = accumulators(), np.empty(width, np.float32)
    begin_products(keys)
    for b in range(len(seq_lens_S)):
        if seq_lens_S[b] > chosen_Tk.shape[1]:
            pack_keys(k_Bs1d, tables_SW[b], 0, 0, 0, seq_lens_S[b], rows, keys)
        for t in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
            visible = seq_lens_S[b] - cu_seqlens_q[b + 1] + t + 1
            if visible <= chosen_Tk.shape[1]:
                chosen_Tk[t, :visible] = np.arange(visible)
                chosen_Tk[t, visible:] = -1
                continue
            for h in range(num_heads):
                copy_row(q_THd[t, h], queries[h])
            _score_positions(queries, weights_TH[t], keys, -(-visible // PANEL), acc, scores)
            _store_best(scores[:visible], chosen_Tk[t])
    end_products(keys)


@jit
def _score_positions(queries, weights_H, keys, num_panels, acc, scores):
    num_heads, once = len(weights_H), rows_at_once(keys)
    for i in range(num_panels):
        part = scores[i * PANEL : (i + 1) * PANEL]
        part[:] = 0
        for m in range(0, num_heads, once):
            multiply(queries, m, num_heads, queries.shape[1], keys, i, acc)
            for h in range(m, min(m + once, num_heads)):
                weight = load(weights_H[h])
                for j in range(PANEL):
                    part[j] += weight * max(acc[HEAD + h - m, j], np.float32(0))


@allocating_jit
def _store_best(scores, chosen_k):
    """Store the best positions, of equal ones the first, in ascending order."""
    chosen_k[:] = np.sort(np.argsort(-scores, kind="mergesort")[: len(chosen_k)])


def choose_positions(
    q_THd: Tensor, weights_TH: Tensor, index_cache: Tensor, seqs: AttentionMetadata, top_k: int
) -> Tensor:
    """As `kernels.ops.index.ChoosePositions`."""
    chosen_Tk = torch.empty(len(q_THd), top_k, dtype=torch.int64)
    if len(q_THd) > 0:
        q, weights, keys = (as_array(tensor) for tensor in (q_THd, weights_TH, index_cache.unsqueeze(2)))
        where = (tensor.numpy() for tensor in (seqs.block_table, seqs.cu_seqlens_q, seqs.seq_lens))
        _choose(q, weights, keys, *where, chosen_Tk.numpy())
    return chosen_Tk
