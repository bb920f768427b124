"""The choice of positions on a CPU: index keys packed as weights are, for queries that are rows, as in `attention`.

A query's score of a position is one sum over heads in their order, of sums over numbers in theirs, whatever else is computed.

T tokens, H index heads, d their size, B sequences, b blocks, s block size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu.cached import pack_keys, panels
from expertwire.kernels.cpu.multiply import HEAD, begin, finish, multiply, operand, products, rows_at_once
from expertwire.kernels.cpu.numbers import allocating_jit, as_array, jit, load
from expertwire.kernels.cpu.panel import LINE, PANEL
from expertwire.kernels.cpu.rows import put_row
from expertwire.kernels.cpu.vectors import LANES
from expertwire.kernels.ops.attention import AttentionMetadata


@allocating_jit
def _choose(q_THd, weights_TH, k_Ns1d, tables_Bb, cu_seqlens_q, seq_lens_B, chosen_Tk):
    num_heads, dim = q_THd.shape[1:]
    width, depth = -(-max(seq_lens_B) // PANEL) * PANEL, -(-dim // LINE) * LINE
    keys = panels(q_THd, width // PANEL, depth)
    rows, queries = operand(LANES, depth, keys), operand(num_heads, depth, keys)
    rows[:], queries[:] = 0, 0
    found, scores = products(), np.empty(width, np.float32)
    begin(keys)
    for b in range(len(seq_lens_B)):
        if seq_lens_B[b] > chosen_Tk.shape[1]:
            pack_keys(k_Ns1d, tables_Bb[b], 0, 0, seq_lens_B[b], rows, keys)
        for t in range(cu_seqlens_q[b], cu_seqlens_q[b + 1]):
            visible = seq_lens_B[b] - cu_seqlens_q[b + 1] + t + 1
            if visible <= chosen_Tk.shape[1]:
                chosen_Tk[t, :visible] = np.arange(visible)
                chosen_Tk[t, visible:] = -1
                continue
            for h in range(num_heads):
                put_row(q_THd[t, h], queries[h])
            _score(queries, weights_TH[t], keys, -(-visible // PANEL), found, scores)
            _put_best(scores[:visible], chosen_Tk[t])
    finish(keys)


@jit
def _score(queries, weights_H, keys, num_panels, found, scores):
    num_heads, once = len(weights_H), rows_at_once(keys)
    for i in range(num_panels):
        part = scores[i * PANEL : (i + 1) * PANEL]
        part[:] = 0
        for m in range(0, num_heads, once):
            multiply(queries, m, num_heads, queries.shape[1], keys, i, found)
            for h in range(m, min(m + once, num_heads)):
                weight = load(weights_H[h])
                for j in range(PANEL):
                    part[j] += weight * max(found[HEAD + h - m, j], np.float32(0))


@allocating_jit
def _put_best(scores, chosen_k):
    """The best positions, of equals the first, in ascending order."""
    chosen_k[:] = np.sort(np.argsort(-scores, kind="mergesort")[: len(chosen_k)])


def choose_positions(
    q_THd: Tensor, weights_TH: Tensor, index_cache: Tensor, seqs: AttentionMetadata, top_k: int
) -> Tensor:
    """`kernels.ops.index.reference`."""
    chosen_Tk = torch.empty(len(q_THd), top_k, dtype=torch.int64)
    if len(q_THd) > 0:
        q, weights, keys = (as_array(tensor) for tensor in (q_THd, weights_TH, index_cache.unsqueeze(2)))
        where = (tensor.numpy() for tensor in (seqs.block_table, seqs.cu_seqlens_q, seqs.seq_lens))
        _choose(q, weights, keys, *where, chosen_Tk.numpy())
    return chosen_Tk
