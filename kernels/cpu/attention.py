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
from expertwire.kernels.cpu.tile import LANES, TILE_M, TILE_N, accumulate, tile


@jit
def _rotate_and_store(
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
    _rotate_and_store(
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
def _attend_single(
    q_BHd: np.ndarray,
    k_NsGd: np.ndarray,
    v_NsGd: np.ndarray,
    tables_Bb: np.ndarray,
    lengths_B: np.ndarray,
    scale: float,
    out_BHd: np.ndarray,
) -> None:
    batch, num_heads, dim = q_BHd.shape
    block_size, num_kv = k_NsGd.shape[1], k_NsGd.shape[2]
    group = num_heads // num_kv
    scores = np.empty((group, tables_Bb.shape[1] * block_size), np.float32)
    query, total = np.empty((group, dim), np.float32), np.empty((group, dim), np.float32)
    for b in range(batch):
        length = lengths_B[b]
        for g in range(num_kv):
            for j in range(group):
                for i in range(dim):
                    query[j, i] = load(q_BHd[b, g * group + j, i]) * np.float32(scale)
            _score(query, k_NsGd, g, tables_Bb[b], length, scores)
            for j in range(group):
                softmax(scores[j, :length])
            total[:] = np.float32(0)
            for position in range(0, length, block_size):
                count = min(block_size, length - position)
                _weigh(scores, position, count, v_NsGd, tables_Bb[b, position // block_size], g, total)
            for j in range(group):
                for i in range(dim):
                    out_BHd[b, g * group + j, i] = round_like(total[j, i], out_BHd[b, g * group + j, i])


@jit
def _score(query: np.ndarray, k_NsGd: np.ndarray, g: int, table: np.ndarray, length: int, scores: np.ndarray) -> None:
    """Products of a group's queries with the keys of head g, four keys at a time, to the end of the last four."""
    block_size, num_kv, dim = k_NsGd.shape[1], k_NsGd.shape[2], k_NsGd.shape[3]
    stride = num_kv * dim
    group, padded = scores.shape
    for position in range(0, length, TILE_N):
        key = ((table[position // block_size] * block_size + position % block_size) * num_kv + g) * dim
        for j in range(0, group, TILE_M):
            tile(group - j, k_NsGd, key, stride, query, j * dim, dim, scores, j * padded + position, padded, dim)


@jit
def _weigh(
    scores: np.ndarray, position: int, count: int, v_NsGd: np.ndarray, block: int, g: int, total: np.ndarray
) -> None:
    """Add the values of head g in one block, times the group's weights from `position` on, to `total`."""
    block_size, num_kv, dim = v_NsGd.shape[1], v_NsGd.shape[2], v_NsGd.shape[3]
    stride = num_kv * dim
    group, padded = scores.shape
    value = block * block_size * stride + g * dim
    for j in range(0, group, TILE_M):
        weights = j * padded + position
        accumulate(group - j, dim, v_NsGd, value, stride, scores, weights, padded, total, j * dim, dim, count)


def attend(q_THd: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences) -> Tensor:
    """`kernels.attention.reference`: single queries here, where the tile covers the head and block sizes; the rest by torch."""
    block_size, _, dim = k_cache.shape[1:]
    if dim % LANES or block_size % TILE_N:
        return attention.attend(q_THd, k_cache, v_cache, seqs)
    if seqs.num_single == 0:
        return attention.attend_several(q_THd, k_cache, v_cache, seqs)
    out_THd = torch.empty_like(q_THd)
    single = seqs.num_single
    _attend_single(
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
