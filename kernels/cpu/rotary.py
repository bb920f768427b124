"""Norms, rotary embedding and cache writes before attention on a CPU.

T tokens, H query heads, G key/value heads, h = H + G, d head size, c latent size, r rotated numbers, l = c + r, Y
positions or cache slots.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload
from torch import Tensor

from expertwire.kernels.cpu._llvm import (
    allocating_jit,
    as_array,
    copy_row,
    divide_row,
    empty,
    jit,
    load,
    rms_scale,
    rotate_row,
    scale_row,
)
from expertwire.kernels.cpu.attention import scale_of, scales
from expertwire.kernels.ops.rotary import RopeInputs


@jit
def _layer_norm(row, eps, norm, bias):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i]
    mean = total / np.float32(len(row))
    for i in range(len(row)):
        row[i] -= mean
    scale = rms_scale(row, eps)
    for i in range(len(row)):
        row[i] = row[i] * scale * load(norm[i]) + load(bias[i])


def store_row(x, scale, y):
    """Store a row in the type of a cache, divided by `scale` if that is fp8."""


@overload(store_row)
def _store_row(x, scale, y):
    if y.dtype == types.uint8:
        return lambda x, scale, y: divide_row(x, scale, y)
    return lambda x, scale, y: copy_row(x, y)


def rope_and_cache_row(x, cos_Yr, sin_Yr, position, interleaved, rotated, scale, y):
    """`rotate_row`, then `store_row`; before fp8, rows are rounded to the queries' type in `rotated`."""


@overload(rope_and_cache_row)
def _rope_and_cache_row(x, cos_Yr, sin_Yr, position, interleaved, rotated, scale, y):
    def in_fp8(x, cos_Yr, sin_Yr, position, interleaved, rotated, scale, y):
        rotate_row(x, cos_Yr, sin_Yr, position, interleaved, rotated)
        divide_row(rotated, scale, y)

    def unscaled(x, cos_Yr, sin_Yr, position, interleaved, rotated, scale, y):
        rotate_row(x, cos_Yr, sin_Yr, position, interleaved, y)

    return in_fp8 if y.dtype == types.uint8 else unscaled


@jit
def _normalise(source, norm_hd, h, eps, row):
    if norm_hd.shape[0] > 0:
        scale_row(source, rms_scale(source, eps), norm_hd[h], row)
    else:
        copy_row(source, row)


@jit
def _rope_and_cache(
    qkv_Thd,
    norm_hd,
    eps,
    cos_Yr,
    sin_Yr,
    positions_T,
    slots_T,
    k_YGd,
    v_YGd,
    kv_scales_2G,
    interleaved,
    row,
    rotated,
    q_THd,
):
    num_heads, num_kv = q_THd.shape[1], k_YGd.shape[1]
    for t in range(qkv_Thd.shape[0]):
        position, slot = positions_T[t], slots_T[t]
        for h in range(num_heads):
            _normalise(qkv_Thd[t, h], norm_hd, h, eps, row)
            rotate_row(row, cos_Yr, sin_Yr, position, interleaved, q_THd[t, h])
        for g in range(num_kv):
            _normalise(qkv_Thd[t, num_heads + g], norm_hd, num_heads + g, eps, row)
            scale, target = scale_of(kv_scales_2G, 0, g), k_YGd[slot, g]
            rope_and_cache_row(row, cos_Yr, sin_Yr, position, interleaved, rotated, scale, target)
        for g in range(num_kv):
            store_row(qkv_Thd[t, num_heads + num_kv + g], scale_of(kv_scales_2G, 1, g), v_YGd[slot, g])


@allocating_jit
def rope_and_cache_rows(
    qkv_Thd: np.ndarray,
    norm_hd: np.ndarray,
    eps: float,
    cos_Yr: np.ndarray,
    sin_Yr: np.ndarray,
    positions_T: np.ndarray,
    slots_T: np.ndarray,
    k_YGd: np.ndarray,
    v_YGd: np.ndarray,
    kv_scales_2G: np.ndarray,
    interleaved: bool,
    q_THd: np.ndarray,
) -> None:
    row, rotated = empty((q_THd.shape[2],), np.float32), empty((q_THd.shape[2],), q_THd.dtype)
    caches, rest = (k_YGd, v_YGd, kv_scales_2G), (interleaved, row, rotated, q_THd)
    _rope_and_cache(qkv_Thd, norm_hd, eps, cos_Yr, sin_Yr, positions_T, slots_T, *caches, *rest)


def rope_and_cache(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    rope: RopeInputs,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_scales_2G: Tensor | None = None,
) -> Tensor:
    """As `kernels.ops.attention.RopeAndCache`."""
    num_kv, dim = k_cache.shape[2:]
    q_THd = qkv_Thd.new_empty(qkv_Thd.shape[0], qkv_Thd.shape[1] - 2 * num_kv, dim)
    norm = qkv_Thd.new_empty(0, dim) if norm_hd is None else norm_hd
    rope_and_cache_rows(
        as_array(qkv_Thd),
        as_array(norm),
        eps,
        *rope.arrays(),
        as_array(k_cache.flatten(0, 1)),
        as_array(v_cache.flatten(0, 1)),
        scales(kv_scales_2G),
        rope.interleaved,
        as_array(q_THd),
    )
    return q_THd


@jit
def _rope_and_cache_latent(
    q_THr, kv_Tl, norm_c, eps, cos_Yr, sin_Yr, positions_T, slots_T, rows_Yl, kv_scale, interleaved, row, out_THr
):
    rank, kv_scale = len(norm_c), np.float32(kv_scale)
    for t in range(len(kv_Tl)):
        position, target = positions_T[t], rows_Yl[slots_T[t]]
        scale_row(kv_Tl[t], rms_scale(kv_Tl[t, :rank], eps), norm_c, row)
        rotate_row(kv_Tl[t, rank:], cos_Yr, sin_Yr, position, interleaved, row[rank:])
        store_row(row, kv_scale, target)
        for h in range(q_THr.shape[1]):
            rotate_row(q_THr[t, h], cos_Yr, sin_Yr, position, interleaved, out_THr[t, h])


def rope_and_cache_latent(
    q_THr: Tensor,
    kv_Tl: Tensor,
    norm_c: Tensor,
    eps: float,
    rope: RopeInputs,
    cache: Tensor,
    *,
    out: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """As `kernels.ops.mla.RopeAndCacheLatent`."""
    out_THr = q_THr.new_empty(q_THr.shape)
    _rope_and_cache_latent(
        as_array(q_THr.contiguous()),
        as_array(kv_Tl.contiguous()),
        as_array(norm_c),
        eps,
        *rope.arrays(),
        as_array(cache.flatten(0, 1)),
        1.0 if kv_scale is None else kv_scale.item(),
        rope.interleaved,
        as_array(kv_Tl.new_empty(kv_Tl.shape[1])),
        as_array(out_THr),
    )
    return out_THr if out is None else out.copy_(out_THr)


@jit
def _rope_and_cache_index(
    q_THd, k_Td, norm_d, bias_d, eps, cos_Yr, sin_Yr, positions_T, slots_T, rows_Yd, interleaved, row, out_THd
):
    for t in range(len(k_Td)):
        position = positions_T[t]
        copy_row(k_Td[t], row)
        _layer_norm(row, eps, norm_d, bias_d)
        rotate_row(row, cos_Yr, sin_Yr, position, interleaved, rows_Yd[slots_T[t]])
        for h in range(q_THd.shape[1]):
            rotate_row(q_THd[t, h], cos_Yr, sin_Yr, position, interleaved, out_THd[t, h])


def rope_and_cache_index(
    q_THd: Tensor,
    k_Td: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope: RopeInputs,
    index_cache: Tensor,
) -> Tensor:
    """As `kernels.ops.index.RopeAndCacheIndex`; every token has a slot."""
    out_THd = q_THd.new_empty(q_THd.shape)
    _rope_and_cache_index(
        as_array(q_THd.contiguous()),
        as_array(k_Td.contiguous()),
        as_array(norm[0]),
        as_array(norm[1]),
        eps,
        *rope.arrays(),
        as_array(index_cache.flatten(0, 1)),
        rope.interleaved,
        np.empty(k_Td.shape[1], np.float32),
        as_array(out_THd),
    )
    return out_THd
