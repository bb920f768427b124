"""Norms of the query and key heads, rotation, and storing of keys and values, in one launch after the projection.

A program takes HEADS neighbouring heads of one token, out of its H query, G key and G value heads; the arithmetic is fp32 and
rounded once. Each number is read and written once, 16 bytes at a time. A cache in fp8 takes what one of the queries' dtype would,
divided by the scale of its head (IEEE's division, not the approximate one) and saturated.

T tokens, H query heads, G key/value heads, d head size, r rotated dimensions of it, s block size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.ops.attention import FP8

HEADS = 8
_LARGEST = tl.constexpr(torch.finfo(FP8).max)


@triton.jit
def rotate_pairs(first, second, cos_table, sin_table, position, pair, PAIRS: tl.constexpr):
    """Turn the pairs [..., r / 2] of a token; the tables [P, r] hold every angle twice, its sine negative at first."""
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
    """Numbers as a cache keeps them; the scale, of the shape of x, counts if that is fp8."""
    if cache.dtype.element_ty == tl.float8e4nv:
        values = tl.div_rn(x.to(tl.float32), scale)
        # Not a number stays what it is: it must not pass for a large one.
        x = tl.clamp(values, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache.dtype.element_ty)


@triton.jit
def _store(q_out, k_cache, v_cache, q_row, kv_row, dim, x, scale, mask, is_q, is_k, is_v):
    """The rows of a part of the heads go to the queries, the keys or the values."""
    x = x.to(q_out.dtype.element_ty)
    dim = dim[None, :]
    tl.store(q_out + q_row[:, None] + dim, x, mask=mask & is_q[:, None])
    stored = quantized(x, tl.broadcast_to(scale[:, None], x.shape), k_cache)
    tl.store(k_cache + kv_row[:, None] + dim, stored, mask=mask & is_k[:, None])
    tl.store(v_cache + kv_row[:, None] + dim, stored, mask=mask & is_v[:, None])


@triton.jit
def _rope_and_cache(
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
    wait_for_previous()
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
        turned_1, turned_2 = rotate_pairs(first, second, cos_table, sin_table, position, pair, PAIRS)
        first, second = tl.where(is_v[:, None], first, turned_1), tl.where(is_v[:, None], second, turned_2)

    stored = slot >= 0
    is_k, is_v = (head >= H) & (head < H + G) & stored, is_v & stored
    q_row = token * (H * DIM) + row
    scale = tl.full([HEADS], 1.0, tl.float32)
    if kv_scales is not None:
        scale = tl.load(kv_scales + (head - H), mask=(head >= H) & live, other=1.0)
    block = tl.maximum(slot, 0)
    kv_row = block // BLOCK_SIZE * stride_block + block % BLOCK_SIZE * stride_slot + ((head - H) % G) * DIM
    if INTERLEAVED:
        turned = tl.reshape(tl.join(first, second), [HEADS, 2 * PADDED_PAIRS])
        _store(q_out, k_cache, v_cache, q_row, kv_row, both, turned, scale, both_mask, is_q, is_k, is_v)
    else:
        _store(q_out, k_cache, v_cache, q_row, kv_row, pair, first, scale, mask, is_q, is_k, is_v)
        _store(q_out, k_cache, v_cache, q_row, kv_row, pair + PAIRS, second, scale, mask, is_q, is_k, is_v)
    if PADDED_REST > 0:
        _store(q_out, k_cache, v_cache, q_row, kv_row, rest, others, scale, rest_mask, is_q, is_k, is_v)


def rope_and_cache(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    interleaved: bool = False,
    kv_scales_2G: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`kernels.ops.attention.rope_and_cache`; a token with a negative slot is not stored. `out`: queries, [T, H, d]."""
    num_tokens, heads, dim = qkv_Thd.shape
    num_kv, rotated = k_cache.shape[2], tables[0].shape[1]
    num_heads = heads - 2 * num_kv
    assert qkv_Thd.stride()[1:] == (dim, 1), f"heads apart: strides {qkv_Thd.stride()}"
    assert k_cache.shape == v_cache.shape, f"caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
    assert k_cache.stride() == v_cache.stride(), f"cache strides {k_cache.stride()} and {v_cache.stride()}"
    assert k_cache.shape[3] == dim, f"head sizes {dim} and {k_cache.shape[3]}"
    assert k_cache.stride()[2:] == (dim, 1), f"heads of the cache apart: strides {k_cache.stride()}"
    assert rotated <= dim, f"{rotated} rotated dimensions of {dim}"
    assert rotated % 2 == 0, f"{rotated} rotated dimensions are no pairs"
    assert tables[0].is_contiguous(), f"table strides {tables[0].stride()}"
    assert tables[1].is_contiguous(), f"table strides {tables[1].stride()}"
    if norm_hd is not None:
        assert norm_hd.shape == (num_heads + num_kv, dim), f"norm weights {tuple(norm_hd.shape)}"
        assert norm_hd.is_contiguous(), f"norm weights' strides {norm_hd.stride()}"
    check_scales(kv_scales_2G, k_cache, 2 * num_kv)
    q_THd = qkv_Thd.new_empty(num_tokens, num_heads, dim) if out is None else out
    assert q_THd.is_contiguous(), f"output strides {q_THd.stride()}"
    if num_tokens:
        _rope_and_cache[num_tokens, triton.cdiv(heads, HEADS)](
            qkv_Thd, qkv_Thd if norm_hd is None else norm_hd, *tables, positions_T, slot_mapping_T, q_THd, k_cache, v_cache,
            kv_scales_2G, eps, qkv_Thd.stride(0), k_cache.stride(0), k_cache.stride(1),
            **_shape(num_heads, num_kv, dim, rotated, k_cache.shape[1]), HAS_NORM=norm_hd is not None,
            INTERLEAVED=interleaved, num_warps=_num_warps(rotated or dim), **EARLY,
        )  # fmt: skip
    return q_THd


def check_scales(scales: Tensor | None, cache: Tensor, count: int) -> None:
    """Caches in fp8 have scales, fp32 and side by side; others have none."""
    assert (scales is not None) == (cache.dtype == FP8), f"scales {scales} of a cache of {cache.dtype}"
    if scales is not None:
        assert scales.numel() == count, f"{tuple(scales.shape)} scales, not {count}"
        assert scales.dtype == torch.float32, f"scales of {scales.dtype}"
        assert scales.is_contiguous(), f"scales' strides {scales.stride()}"


def _num_warps(rotated: int) -> int:
    """So that 8 numbers of each half fall to a thread: 16 bytes of bf16."""
    return max(1, HEADS * triton.next_power_of_2(rotated // 2) // 256)


def _shape(num_heads: int, num_kv: int, dim: int, rotated: int, block_size: int) -> dict[str, int]:
    """The constexpr sizes. Where nothing is rotated, all numbers are pairs that stay as they are."""
    rotates, rotated = rotated > 0, rotated or dim
    padded_rest = triton.next_power_of_2(dim - rotated) if dim > rotated else 0
    padded = {"PADDED_PAIRS": triton.next_power_of_2(rotated // 2), "PADDED_REST": padded_rest}
    sizes = {"H": num_heads, "G": num_kv, "DIM": dim, "PAIRS": rotated // 2}
    return {**sizes, **padded, "BLOCK_SIZE": block_size, "ROTATES": rotates, "HEADS": HEADS}


def _case(
    name: str,
    heads: int,
    num_kv: int,
    dim: int,
    rotated: int,
    *,
    norm: bool = False,
    interleaved: bool = False,
    fp8: bool = False,
) -> Case:
    block_size = 16
    return Case(
        name=f"rope_and_cache.{name} {'fp8' if fp8 else 'bf16'}",
        kernel=_rope_and_cache,
        args={
            **dict.fromkeys(("qkv", "norm", "q_out"), torch.bfloat16),
            **dict.fromkeys(("k_cache", "v_cache"), FP8 if fp8 else torch.bfloat16),
            "kv_scales": torch.float32 if fp8 else None,
            **dict.fromkeys(("cos_table", "sin_table"), torch.float32),
            **dict.fromkeys(("positions", "slots"), torch.int64),
            **{"eps": 1e-6, "stride_token": (heads + 2 * num_kv) * dim},
            **{"stride_block": block_size * num_kv * dim, "stride_slot": num_kv * dim},
        },
        constexprs={
            **_shape(heads, num_kv, dim, rotated, block_size),
            **{"HAS_NORM": norm, "INTERLEAVED": interleaved},
        },
        num_warps=_num_warps(rotated),
        blocks_per_sm=8,
        options=EARLY,
        expect={90: "", 100: ""},
    )


def cases() -> list[Case]:
    """Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-120b, Qwen3-Next (a quarter rotated), Llama 4 (pairs side by side)."""
    return [
        _case("qwen3", 32, 4, 128, 128, norm=True),
        _case("mixtral", 32, 8, 128, 128),
        _case("gpt-oss", 64, 8, 64, 64),
        _case("qwen3-next", 16, 2, 256, 64, norm=True),
        _case("llama4", 40, 8, 128, 128, interleaved=True),
        _case("qwen3", 32, 4, 128, 128, norm=True, fp8=True),
        _case("qwen3-next", 16, 2, 256, 64, norm=True, fp8=True),
        _case("llama4", 40, 8, 128, 128, interleaved=True, fp8=True),
    ]
