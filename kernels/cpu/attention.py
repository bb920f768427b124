"""Grouped-query attention on a CPU.

The keys of a head are packed into panels like weights, and so are its values, transposed: both products are those
of linear layers, with one row for each token and head, and a softmax of each row between them. A row's bits depend
only on the keys that it sees, not on the number of queries, nor on keys behind it or, with a window, before it:
sums run over the packed keys in order, invisible keys add exact zeros, and packing begins at a multiple of 32
positions, so that a key always falls to the same lane and pair.

Packing is most of a decode's work. Sequences that follow one another and begin with the same blocks, such as the branches of a
prompt, are therefore taken head by head, and what is packed of their common beginning stays.

T tokens, H query heads, G key/value heads, d head size, S sequences, B blocks, s block size, W entries of a block
table.
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
    jit,
    longest_part,
    multiply,
    operand,
    pack_keys,
    pack_values,
    round_like,
    rows_at_once,
    softmax,
    store_rows,
)
from expertwire.kernels.ops.attention import PLAIN, AttentionMetadata, AttentionOptions

_LEAST_QUERIES = 64  # multiplied by the same packed keys, if a sequence has that many


@jit
def _first_visible(position, window, chunk):
    """As `kernels.ops.attention.first_visible`."""
    first = max(0, position + 1 - window) if window > 0 else 0
    return max(first, position // chunk * chunk) if chunk > 0 else first


@jit
def scale_of(kv_scales_2G, which, g):
    """Return the scale of the keys (0) or values (1) of head g."""
    return kv_scales_2G[which, g] if kv_scales_2G.shape[1] > 0 else np.float32(1)


@jit
def _reach(longest, window, chunk):
    """Return the largest number of keys that a query sees."""
    if window > 0:
        longest = min(longest, window)
    return min(longest, chunk) if chunk > 0 else longest


@jit(inner=True)
def _num_shared(tables_SW, b, seq_lens_S, block_size):
    """Return how many positions sequence b shares with the one before it: their tables begin with the same blocks."""
    most, i = min(seq_lens_S[b - 1], seq_lens_S[b]) // block_size, 0
    while i < most and tables_SW[b, i] == tables_SW[b - 1, i]:
        i += 1
    return i * block_size


@allocating_jit
def attend_rows(
    q_THd,
    k_BsGd,
    v_BsGd,
    kv_scales_2G,
    tables_SW,
    cu_seqlens_q,
    seq_lens_S,
    scale,
    window,
    chunk,
    sinks_H,
    out_THd,
):
    """As `kernels.ops.attention.reference`, on arrays, for at least one sequence; `sinks_H` and `kv_scales_2G` may be empty."""
    block_size, num_kv, dim = k_BsGd.shape[1:]
    group = q_THd.shape[1] // num_kv
    longest, most = max(seq_lens_S), longest_part(cu_seqlens_q)
    reach = _reach(longest, window, chunk)
    # Number of queries that are multiplied by the same packed keys.
    piece = most if reach == longest else min(most, max(reach, _LEAST_QUERIES))
    width = -(-min(longest, reach + piece + PANEL) // PANEL) * PANEL
    depth = -(-dim // K_STEP) * K_STEP
    keys, values = empty_panels(q_THd, width // PANEL, depth), empty_panels(q_THd, depth // PANEL, width)
    step = min(max(rows_at_once(keys), group), piece * group)
    rows, queries = operand(LANES, depth, keys), operand(step, depth, keys)
    two_rows = np.zeros((2, depth), v_BsGd.dtype)
    rows[:], queries[:] = 0, 0
    scores, weights = empty((step, width), np.float32), operand(step, width, values)
    acc, unbiased = accumulators(), np.zeros(PANEL, np.float32)
    begin_products(keys)
    until = 0
    while until < len(seq_lens_S):
        since, until = until, until + 1
        while until < len(seq_lens_S) and _num_shared(tables_SW, until, seq_lens_S, block_size) >= PANEL:
            until += 1
        for g in range(num_kv):
            packed_start, packed_first, packed_stop = 0, 0, 0  # nothing is packed of this head
            for b in range(since, until):
                last, length = cu_seqlens_q[b + 1], seq_lens_S[b]
                shared = _num_shared(tables_SW, b, seq_lens_S, block_size) if b > since else 0
                for query in range(cu_seqlens_q[b], last, piece):
                    end = min(query + piece, last)
                    first = _first_visible(length - last + query, window, chunk)
                    start, stop = first // PANEL * PANEL, length - last + end
                    begin = start
                    if start == packed_start and first == packed_first:
                        begin = max(start, min(shared, packed_stop, stop) // PANEL * PANEL)
                    pack_keys(k_BsGd, tables_SW[b], g, start, begin, stop, rows, keys)
                    pack_values(v_BsGd, dim, tables_SW[b], g, start, begin, first, stop, two_rows, values)
                    packed_start, packed_first, packed_stop = start, first, stop
                    _attend_head(
                        q_THd[query:end],
                        g,
                        group,
                        start,
                        stop,
                        window,
                        chunk,
                        keys,
                        values,
                        np.float32(scale) * scale_of(kv_scales_2G, 0, g),
                        scale_of(kv_scales_2G, 1, g),
                        sinks_H,
                        queries,
                        scores,
                        weights,
                        acc,
                        unbiased,
                        out_THd[query:end],
                    )
    end_products(keys)


@jit
def _attend_head(
    q_THd,
    g,
    group,
    base,
    length,
    window,
    chunk,
    keys,
    values,
    scale,
    value_scale,
    sinks_H,
    queries,
    scores,
    weights,
    acc,
    unbiased,
    out_THd,
):
    """Attend with a sequence's last tokens and the `group` query heads of key head g.

    Rows are ordered by token, then head; keys and values are packed from position `base` on.
    """
    num, once, (step, width) = len(q_THd), rows_at_once(keys), scores.shape
    depth = queries.shape[1]
    for start in range(0, num * group, step):
        count = min(step, num * group - start)
        for i in range(count):
            copy_row(q_THd[(start + i) // group, g * group + (start + i) % group], queries[i])
        seen = -(-(length - num + (start + count - 1) // group + 1 - base) // PANEL) * PANEL
        for i in range(seen // PANEL):
            for m in range(0, count, once):
                multiply(queries, m, count, depth, keys, i, acc)
                store_rows(acc, HEAD, min(once, count - m), unbiased, 0, scores, m * width + i * PANEL, width)
        for i in range(count):
            position, head, at = length - num + (start + i) // group, g * group + (start + i) % group, i * width
            sink = sinks_H[head] if len(sinks_H) > 0 else np.float32(-np.inf)
            first = _first_visible(position, window, chunk) - base
            softmax(scores, at, first, position + 1 - base, scale, sink, value_scale, weights, at, seen)
        for i in range(len(values)):
            for m in range(0, count, once):
                multiply(weights, m, count, seen, values, i, acc)
                _store_outputs(acc, unbiased, start + m, min(once, count - m), g, group, i * PANEL, out_THd)


@jit
def _store_outputs(acc, unbiased, start, count, g, group, column, out_THd):
    """Store products with up to 32 dimensions of values, from `column` on, for `count` rows from `start` on."""
    num_heads, dim = out_THd.shape[1:]
    i = 0
    while i < count:
        token, head = (start + i) // group, g * group + (start + i) % group
        rows = min(count - i, (g + 1) * group - head)
        if column + PANEL <= dim:
            at = (token * num_heads + head) * dim + column
            store_rows(acc, HEAD + i, rows, unbiased, 0, out_THd, at, dim)
        else:
            for j in range(rows):
                for k in range(column, dim):
                    out_THd[token, head + j, k] = round_like(acc[HEAD + i + j, k - column], out_THd[token, head + j, k])
        i += rows


def attend(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """As `kernels.ops.attention.Attend`."""
    for cache in (k_cache, v_cache):
        assert cache.is_contiguous(), f"cache strides {cache.stride()}"
    out_THd = torch.empty_like(q_THd)
    q, k, v, out = (as_array(tensor) for tensor in (q_THd, k_cache, v_cache, out_THd))
    where = (tensor.numpy() for tensor in (seqs.block_table, seqs.cu_seqlens_q, seqs.seq_lens))
    if seqs.num_sequences > 0:
        attend_rows(q, k, v, scales(options.kv_scales_2G), *where, *variant(options, q.shape[2]), out)
    return out_THd


def variant(options: AttentionOptions, head_dim: int) -> tuple[float, int, int, np.ndarray]:
    """Return scale, window, chunk and sinks as `attend_rows` takes them."""
    sinks_H = np.empty(0, np.float32) if options.sinks_H is None else options.sinks_H.float().numpy()
    return options.scale_for(head_dim), options.window, options.chunk, sinks_H


def scales(kv_scales_2G: Tensor | None) -> np.ndarray:
    """Return fp32 [2, G], or an empty array for None, as `attend_rows` takes it."""
    return np.empty((2, 0), np.float32) if kv_scales_2G is None else kv_scales_2G.numpy()
