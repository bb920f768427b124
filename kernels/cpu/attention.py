"""Attention of single queries on a CPU, reading the blocks of the cache in place, and what comes before it.

T tokens, H query heads, G key/value heads, d head size, B sequences, b blocks, s block size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels import attention
from expertwire.kernels.attention import PagedSequences
from expertwire.kernels.cpu.numbers import as_array, jit, load, round_like, softmax, sum_squares
from expertwire.kernels.cpu.tile import LINE, TILE_M, TILE_N, accumulate, place, spread, tile


@jit
def rotate_and_store_rows(
    qkv_Thd: np.ndarray,
    norm_hd: np.ndarray,
    eps: float,
    cos_Pd: np.ndarray,
    sin_Pd: np.ndarray,
    positions_T: np.ndarray,
    slots_T: np.ndarray,
    k_NGd: np.ndarray,
    v_NGd: np.ndarray,
    q_THd: np.ndarray,
) -> None:
    num_heads, num_kv, dim = q_THd.shape[1], k_NGd.shape[1], q_THd.shape[2]
    half = dim // 2
    row = np.empty(dim, np.float32)
    for t in range(qkv_Thd.shape[0]):
        position, slot = positions_T[t], slots_T[t]
        for h in range(num_heads + num_kv):
            for i in range(dim):
                row[i] = load(qkv_Thd[t, h, i])
            if norm_hd.shape[0] > 0:
                scale = np.float32(1) / np.sqrt(sum_squares(row) / np.float32(dim) + np.float32(eps))
                for i in range(dim):
                    row[i] = row[i] * scale * load(norm_hd[h, i])
            target = q_THd[t, h] if h < num_heads else k_NGd[slot, h - num_heads]
            for i in range(half):
                first, second = row[i], row[i + half]
                cos, sin = cos_Pd[position, i + half], sin_Pd[position, i + half]
                target[i] = round_like(first * cos - second * sin, target[i])
                target[i + half] = round_like(second * cos + first * sin, target[i])
        for h in range(num_kv):
            for i in range(dim):
                v_NGd[slot, h, i] = qkv_Thd[t, num_heads + num_kv + h, i]


def rotate_and_store(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """`kernels.attention.rotate_and_store`."""
    num_kv, dim = k_cache.shape[2:]
    q_THd = qkv_Thd.new_empty(qkv_Thd.shape[0], qkv_Thd.shape[1] - 2 * num_kv, dim)
    norm = qkv_Thd.new_empty(0, dim) if norm_hd is None else norm_hd
    rotate_and_store_rows(
        as_array(qkv_Thd),
        as_array(norm),
        eps,
        tables[0].numpy(),
        tables[1].numpy(),
        positions_T.numpy(),
        slot_mapping_T.numpy(),
        as_array(k_cache.flatten(0, 1)),
        as_array(v_cache.flatten(0, 1)),
        as_array(q_THd),
    )
    return q_THd


@jit
def attend_single(
    q_BHd: np.ndarray,
    k_NsGd: np.ndarray,
    v_NsGd: np.ndarray,
    tables_Bb: np.ndarray,
    lengths_B: np.ndarray,
    scale: float,
    out_BHd: np.ndarray,
) -> None:
    batch, num_heads, dim = q_BHd.shape
    block_size, like = k_NsGd.shape[1], k_NsGd[0, 0, 0, 0]
    scores = np.empty((num_heads, tables_Bb.shape[1] * block_size), np.float32)
    query, total = np.empty((num_heads, dim), np.float32), np.empty((num_heads, dim), np.float32)
    for b in range(batch):
        length = lengths_B[b]
        for h in range(num_heads):
            spread(q_BHd[b, h], query[h], like)
            for i in range(dim):
                query[h, i] *= np.float32(scale)
        _score(query, k_NsGd, tables_Bb[b], length, scores)
        for h in range(num_heads):
            softmax(scores[h, :length])
        total[:] = np.float32(0)
        _weigh(scores, v_NsGd, tables_Bb[b], length, total)
        for h in range(num_heads):
            for i in range(dim):
                out_BHd[b, h, i] = round_like(total[h, place(i, like)], out_BHd[b, h, i])


@jit
def _score(query: np.ndarray, k_NsGd: np.ndarray, table: np.ndarray, length: int, scores: np.ndarray) -> None:
    """Products of the queries with their heads' keys, four keys at a time, to the end of the last four."""
    block_size, num_kv, dim = k_NsGd.shape[1], k_NsGd.shape[2], k_NsGd.shape[3]
    stride, padded = num_kv * dim, scores.shape[1]
    num_heads, group = len(query), len(query) // num_kv
    for position in range(0, length, TILE_N):
        inside = position % block_size * stride
        here, soon, later = _blocks(table, position // block_size, length, block_size, stride)
        for h in range(0, num_heads, group):
            at = inside + h // group * dim
            key, soon_key, later_key = here + at, soon + at, later + at
            for j in range(h, h + group, TILE_M):
                rows, score = h + group - j, j * padded + position
                tile(rows, k_NsGd, key, soon_key, later_key, stride, query, j * dim, dim, scores, score, padded, dim)


@jit
def _weigh(scores: np.ndarray, v_NsGd: np.ndarray, table: np.ndarray, length: int, total: np.ndarray) -> None:
    """Add the values of the heads, times their queries' weights, to `total`, one block after another."""
    block_size, num_kv, dim = v_NsGd.shape[1], v_NsGd.shape[2], v_NsGd.shape[3]
    stride, padded = num_kv * dim, scores.shape[1]
    num_heads, group = len(total), len(total) // num_kv
    for position in range(0, length, block_size):
        count = min(block_size, length - position)
        here, soon, later = _blocks(table, position // block_size, length, block_size, stride)
        for h in range(0, num_heads, group):
            at = h // group * dim
            value, soon_value, later_value = here + at, soon + at, later + at
            for j in range(h, h + group, TILE_M):
                rows, weight, y = h + group - j, j * padded + position, j * dim
                accumulate(
                    rows,
                    dim,
                    v_NsGd,
                    value,
                    soon_value,
                    later_value,
                    stride,
                    scores,
                    weight,
                    padded,
                    total,
                    y,
                    dim,
                    count,
                )


@jit
def _blocks(table: np.ndarray, index: int, length: int, block_size: int, stride: int) -> tuple[int, int, int]:
    """Where a sequence's block starts, the next one and the one after, as far as there are any."""
    last, size = (length - 1) // block_size, block_size * stride
    return table[index] * size, table[min(index + 1, last)] * size, table[min(index + 2, last)] * size


def covers(head_dim: int, block_size: int) -> bool:
    """Whether the tile covers heads and blocks of these sizes."""
    return head_dim % LINE == 0 and block_size % TILE_N == 0


def attend(q_THd: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences) -> Tensor:
    """`kernels.attention.reference`: single queries here, where the tile covers the head and block sizes; the rest by torch."""
    block_size, _, dim = k_cache.shape[1:]
    if not covers(dim, block_size):
        return attention.attend(q_THd, k_cache, v_cache, seqs)
    if seqs.num_single == 0:
        return attention.attend_several(q_THd, k_cache, v_cache, seqs)
    out_THd = torch.empty_like(q_THd)
    single = seqs.num_single
    attend_single(
        as_array(q_THd[:single]),
        as_array(k_cache),
        as_array(v_cache),
        seqs.single_block_table.numpy(),
        seqs.single_lengths.numpy(),
        dim**-0.5,
        as_array(out_THd[:single]),
    )
    if seqs.num_sequences > single:
        out_THd[single:] = attention.attend_several(q_THd, k_cache, v_cache, seqs)
    return out_THd
