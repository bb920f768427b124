"""Query and key norms, rope, and the write of keys and values to the cache, in one launch after the projection.

A program takes HEADS neighbouring heads of one token, out of its H query, G key and G value heads.
The arithmetic is fp32 and rounded once. Each number is read and written once, 16 bytes at a time.
An fp8 cache stores the number in the queries' dtype divided by its head's scale (IEEE division, not
the approximate one) and saturated.

T tokens, H query heads, G key/value heads, d head size, r rotated dimensions of it, s block size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.ops.attention import FP8
from expertwire.kernels.ops.rotary import RopeInputs

HEADS = 8
_LARGEST = tl.constexpr(torch.finfo(FP8).max)


@triton.jit
def rotate_pairs(first, second, cos_table, sin_table, position, pair, PAIRS: tl.constexpr):
    """Rotate the pairs [..., r / 2] of a token.

    The tables [positions, r] hold every angle twice, its sine negative at first.
    """
    known = pair < PAIRS
    at = position * (2 * PAIRS) + pair
    cos = tl.load(cos_table + at, mask=known, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(sin_table + at + PAIRS, mask=known, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _load(source, row, dim, mask):
    return tl.load(source + row[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def quantized(x, scale, cache):
    """Return numbers as a cache stores them; `scale`, of the shape of x, is used if that is fp8."""
    if cache.dtype.element_ty == tl.float8e4nv:
        values = tl.div_rn(x.to(tl.float32), scale)
        # NaN stays NaN: it must not become a large number.
        x = tl.clamp(values, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache.dtype.element_ty)


@triton.jit
def _store(q_out, k_cache, v_cache, q_row, kv_row, dim, x, scale, mask, is_q, is_k, is_v):
    """Store the rows of some heads to the queries, the keys or the values."""
    x = x.to(q_out.dtype.element_ty)
    dim = dim[None, :]
    tl.store(q_out + q_row[:, None] + dim, x, mask=mask & is_q[:, None])
    stored = quantized(x, tl.broadcast_to(scale[:, None], x.shape), k_cache)
    tl.store(k_cache + kv_row[:, None] + dim, stored, mask=mask & is_k[:, None])
    tl.store(v_cache + kv_row[:, None] + dim, stored, mask=mask & is_v[:, None])


@triton.jit
def rope_and_cache_kernel(
    qkv,
    norm,
    cos_table,
    sin_table,
    positions,
    slots,
    q_out,
    k_cache,
    v_cache,
    kv_scales,
    eps,
    stride_token,
    stride_block,
    stride_slot,
    H: tl.constexpr,
    G: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    PADDED_REST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (T, tiles of heads). PADDED_REST is 0 if every dimension is rotated, or none."""
    wait_for_previous_kernel()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q, is_v = head < H, head >= H + G
    position, slot = tl.load(positions + token).to(tl.int64), tl.load(slots + token).to(tl.int64)
    source = qkv + token * stride_token
    row, live = head * DIM, head < H + 2 * G
    pair = tl.arange(0, PADDED_PAIRS)
    mask = live[:, None] & (pair < PAIRS)[None, :]
    both = tl.arange(0, 2 * PADDED_PAIRS)
    both_mask = live[:, None] & (both < 2 * PAIRS)[None, :]
    rest = 2 * PAIRS + tl.arange(0, PADDED_REST if PADDED_REST > 0 else 1)
    rest_mask = live[:, None] & (rest < DIM)[None, :]

    if INTERLEAVED:
        first, second = tl.split(tl.reshape(_load(source, row, both, both_mask), [HEADS, PADDED_PAIRS, 2]))
    else:
        first, second = _load(source, row, pair, mask), _load(source, row, pair + PAIRS, mask)
    if PADDED_REST > 0:
        others = _load(source, row, rest, rest_mask)
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, 1)
        if PADDED_REST > 0:
            squares += tl.sum(others * others, 1)
        scale = tl.where(is_v, 1.0, tl.rsqrt(squares / DIM + eps))[:, None]
        has_norm = (head < H + G)[:, None]
        if INTERLEAVED:
            weight = tl.load(norm + row[:, None] + both[None, :], mask=both_mask & has_norm, other=1.0).to(tl.float32)
            weight_1, weight_2 = tl.split(tl.reshape(weight, [HEADS, PADDED_PAIRS, 2]))
        else:
            at = norm + row[:, None] + pair[None, :]
            weight_1 = tl.load(at, mask=mask & has_norm, other=1.0).to(tl.float32)
            weight_2 = tl.load(at + PAIRS, mask=mask & has_norm, other=1.0).to(tl.float32)
        first, second = first * scale * weight_1, second * scale * weight_2
        if PADDED_REST > 0:
            weight = tl.load(norm + row[:, None] + rest[None, :], mask=rest_mask & has_norm, other=1.0)
            others = others * scale * weight.to(tl.float32)
    if ROTATES:
        rotated_1, rotated_2 = rotate_pairs(first, second, cos_table, sin_table, position, pair, PAIRS)
        first, second = tl.where(is_v[:, None], first, rotated_1), tl.where(is_v[:, None], second, rotated_2)

    stored = slot >= 0
    is_k, is_v = (head >= H) & (head < H + G) & stored, is_v & stored
    q_row = token * (H * DIM) + row
    scale = tl.full([HEADS], 1.0, tl.float32)
    if kv_scales is not None:
        scale = tl.load(kv_scales + (head - H), mask=(head >= H) & live, other=1.0)
    block = tl.maximum(slot, 0)
    kv_row = block // BLOCK_SIZE * stride_block + block % BLOCK_SIZE * stride_slot + ((head - H) % G) * DIM
    if INTERLEAVED:
        rotated = tl.reshape(tl.join(first, second), [HEADS, 2 * PADDED_PAIRS])
        _store(q_out, k_cache, v_cache, q_row, kv_row, both, rotated, scale, both_mask, is_q, is_k, is_v)
    else:
        _store(q_out, k_cache, v_cache, q_row, kv_row, pair, first, scale, mask, is_q, is_k, is_v)
        _store(q_out, k_cache, v_cache, q_row, kv_row, pair + PAIRS, second, scale, mask, is_q, is_k, is_v)
    if PADDED_REST > 0:
        _store(q_out, k_cache, v_cache, q_row, kv_row, rest, others, scale, rest_mask, is_q, is_k, is_v)


def rope_and_cache(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    rope: RopeInputs,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_scales_2G: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Run `kernels.ops.attention.rope_and_cache`; a token with a negative slot is not stored. `out`:
    queries, [T, H, d].
    """
    num_tokens, heads, dim = qkv_Thd.shape
    num_kv, rotated = k_cache.shape[2], rope.size
    num_heads = heads - 2 * num_kv
    assert qkv_Thd.stride()[1:] == (dim, 1), f"heads apart: strides {qkv_Thd.stride()}"
    assert k_cache.shape == v_cache.shape, f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    assert k_cache.stride() == v_cache.stride(), f"cache strides {k_cache.stride()} and {v_cache.stride()}"
    assert k_cache.shape[3] == dim, f"head sizes {dim} and {k_cache.shape[3]}"
    assert k_cache.stride()[2:] == (dim, 1), f"heads of the cache apart: strides {k_cache.stride()}"
    assert rotated <= dim, f"{rotated} rotated dimensions of {dim}"
    assert rotated % 2 == 0, f"{rotated} rotated dimensions are no pairs"
    assert all(table.is_contiguous() for table in rope.tables), (
        f"table strides {[table.stride() for table in rope.tables]}"
    )
    if norm_hd is not None:
        assert norm_hd.shape == (num_heads + num_kv, dim), f"norm weights {tuple(norm_hd.shape)}"
        assert norm_hd.is_contiguous(), f"norm weights' strides {norm_hd.stride()}"
    check_cache_scales(kv_scales_2G, k_cache, 2 * num_kv)
    q_THd = qkv_Thd.new_empty(num_tokens, num_heads, dim) if out is None else out
    assert q_THd.is_contiguous(), f"output strides {q_THd.stride()}"
    if num_tokens:
        rope_and_cache_kernel[num_tokens, triton.cdiv(heads, HEADS)](
            qkv_Thd, qkv_Thd if norm_hd is None else norm_hd, *rope.tensors, q_THd, k_cache, v_cache,
            kv_scales_2G, eps, qkv_Thd.stride(0), k_cache.stride(0), k_cache.stride(1),
            **constexprs(num_heads, num_kv, dim, rotated, k_cache.shape[1]), HAS_NORM=norm_hd is not None,
            INTERLEAVED=rope.interleaved, num_warps=warps_of(rotated or dim), **PDL,
        )  # fmt: skip
    return q_THd


def check_cache_scales(scales: Tensor | None, cache: Tensor, count: int) -> None:
    """Assert that an fp8 cache has contiguous fp32 scales, and another cache has none."""
    assert (scales is not None) == (cache.dtype == FP8), f"scales {scales} of a cache of {cache.dtype}"
    if scales is not None:
        assert scales.numel() == count, f"{tuple(scales.shape)} scales, not {count}"
        assert scales.dtype == torch.float32, f"scales of {scales.dtype}"
        assert scales.is_contiguous(), f"scales' strides {scales.stride()}"


def warps_of(rotated: int) -> int:
    """Return the warps that give each thread 8 numbers of each half: 16 bytes of bf16."""
    return max(1, HEADS * triton.next_power_of_2(rotated // 2) // 256)


def constexprs(num_heads: int, num_kv: int, dim: int, rotated: int, block_size: int) -> dict[str, int]:
    """Return the constexpr sizes. Where nothing is rotated, all numbers are pairs that stay as they are."""
    rotates, rotated = rotated > 0, rotated or dim
    padded_rest = triton.next_power_of_2(dim - rotated) if dim > rotated else 0
    padded = {"PADDED_PAIRS": triton.next_power_of_2(rotated // 2), "PADDED_REST": padded_rest}
    sizes = {"H": num_heads, "G": num_kv, "DIM": dim, "PAIRS": rotated // 2}
    return {**sizes, **padded, "BLOCK_SIZE": block_size, "ROTATES": rotates, "HEADS": HEADS}
