"""Norm of the latents, rope and cache write of latent attention: `kernels.ops.mla.rope_and_cache` in Triton.

T tokens, H heads, c latent size, r rotated size, l = c + r.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.rope_and_cache import check_cache_scales, quantized, rotate_pairs
from expertwire.kernels.ops.rotary import RopeInputs

HEADS = 8


@triton.jit
def _store_pairs(target, first, second, divisor, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Store both halves [HEADS, r / 2] of rows from `target` on; `divisor` is the scale of an fp8 cache."""
    pair = tl.arange(0, PAIRS)
    if INTERLEAVED:
        x = tl.reshape(tl.join(first, second), [first.shape[0], 2 * PAIRS])
        stored = quantized(x, tl.broadcast_to(divisor, x.shape), target)
        tl.store(target[:, None] + tl.arange(0, 2 * PAIRS), stored, mask=mask[:, None])
    else:
        divisors = tl.broadcast_to(divisor, first.shape)
        tl.store(target[:, None] + pair, quantized(first, divisors, target), mask=mask[:, None])
        tl.store(target[:, None] + PAIRS + pair, quantized(second, divisors, target), mask=mask[:, None])


@triton.jit
def rope_and_cache_kernel(
    q,
    kv,
    norm,
    cos_table,
    sin_table,
    positions,
    slots,
    q_out,
    cache,
    kv_scale,
    eps,
    stride_token,
    stride_head,
    stride_kv,
    stride_out_token,
    stride_out_head,
    stride_block,
    stride_slot,
    H: tl.constexpr,
    RANK: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (T, 1 + tiles of heads): the cache row first, as a tile with one head, then the queries."""
    wait_for_previous_kernel()
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(positions + token).to(tl.int64), tl.load(slots + token).to(tl.int64)
    divisor = tl.full([], 1.0, tl.float32)
    if kv_scale is not None:
        divisor = tl.load(kv_scale)
    at = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
    head = tl.arange(0, HEADS)
    if tile == 0:
        latent = tl.arange(0, RANK)
        x = tl.load(kv + token * stride_kv + latent).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * tl.load(norm + latent).to(tl.float32)
        x = x.to(kv.dtype.element_ty)
        tl.store(cache + at + latent, quantized(x, tl.broadcast_to(divisor, x.shape), cache), mask=slot >= 0)
        source, live = kv + token * stride_kv + RANK + head * 0, head < 1
    else:
        head += (tile - 1) * HEADS
        source, live = q + token * stride_token + head * stride_head, head < H
    pair = tl.arange(0, PAIRS)
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)
        x = tl.load(source[:, None] + both, mask=live[:, None], other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [HEADS, PAIRS, 2]))
    else:
        first = tl.load(source[:, None] + pair, mask=live[:, None], other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + PAIRS + pair, mask=live[:, None], other=0.0).to(tl.float32)
    first, second = rotate_pairs(first, second, cos_table, sin_table, position, pair, PAIRS)
    first, second = first.to(kv.dtype.element_ty), second.to(kv.dtype.element_ty)
    if tile == 0:
        _store_pairs(cache + at + RANK + head * 0, first, second, divisor, live & (slot >= 0), PAIRS, INTERLEAVED)
    else:
        target = q_out + token * stride_out_token + head * stride_out_head
        _store_pairs(target, first, second, divisor, live, PAIRS, INTERLEAVED)


def rope_and_cache(
    q_THr: Tensor,
    kv_Tl: Tensor,
    norm_c: Tensor,
    eps: float,
    rope: RopeInputs,
    cache: Tensor,
    *,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Run `kernels.ops.mla.rope_and_cache`; a token with a negative slot is not stored.

    q_THr, out: tokens and heads may be strided, as parts of longer rows; out may be q_THr itself.
    """
    num_tokens, num_heads, rotated = q_THr.shape
    rank = norm_c.shape[0]
    out = torch.empty(q_THr.shape, dtype=q_THr.dtype, device=q_THr.device) if out is None else out
    assert kv_Tl.shape == (num_tokens, rank + rotated), f"{tuple(kv_Tl.shape)}, not {(num_tokens, rank + rotated)}"
    assert cache.shape[2] == rank + rotated, f"rows of {cache.shape[2]} numbers, not {rank + rotated}"
    assert rope.size == rotated, f"tables for {rope.size} dimensions, not {rotated}"
    assert out.shape == q_THr.shape, f"output {tuple(out.shape)}, not {tuple(q_THr.shape)}"
    check_cache_scales(kv_scale, cache, 1)
    for name, tensor in {"q": q_THr, "kv": kv_Tl, "norm": norm_c, "cache": cache, "out": out}.items():
        assert tensor.stride(-1) == 1, f"{name}: strides {tensor.stride()}"
    for size in (rank, rotated // 2):
        assert size == triton.next_power_of_2(size), f"{rank} latent numbers and {rotated} rotated ones"
    if num_tokens:
        rope_and_cache_kernel[num_tokens, 1 + triton.cdiv(num_heads, HEADS)](
            q_THr, kv_Tl, norm_c, *rope.tensors, out, cache, kv_scale,
            eps, q_THr.stride(0), q_THr.stride(1), kv_Tl.stride(0), out.stride(0), out.stride(1),
            cache.stride(0), cache.stride(1),
            H=num_heads, RANK=rank, PAIRS=rotated // 2, BLOCK_SIZE=cache.shape[1], INTERLEAVED=rope.interleaved, HEADS=HEADS,
            num_warps=1, **PDL,
        )  # fmt: skip
    return out
