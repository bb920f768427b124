"""Layer norm, rope and cache write of index keys, and rope of index queries:
`kernels.ops.index.rope_and_cache` in Triton.

T tokens, H query heads of the indexer, d their size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.rope_and_cache import rotate_pairs
from expertwire.kernels.ops.rotary import RopeInputs

HEADS = 8


@triton.jit
def _load_row(source, live, DIM: tl.constexpr, PAIRS: tl.constexpr, PLAIN: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Load the first and the second numbers of the pairs [rows, PAIRS] and the other numbers [rows, PLAIN]
    of rows, padded with zeros.
    """
    pair, rest = tl.arange(0, PAIRS), 2 * PAIRS + tl.arange(0, PLAIN)
    if INTERLEAVED:
        both = tl.load(source[:, None] + tl.arange(0, 2 * PAIRS), mask=live[:, None], other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [source.shape[0], PAIRS, 2]))
    else:
        first = tl.load(source[:, None] + pair, mask=live[:, None], other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + PAIRS + pair, mask=live[:, None], other=0.0).to(tl.float32)
    plain = tl.load(source[:, None] + rest, mask=live[:, None] & (rest < DIM), other=0.0).to(tl.float32)
    return first, second, plain


@triton.jit
def _store_row(target, live, first, second, plain, DIM: tl.constexpr, PAIRS: tl.constexpr, PLAIN: tl.constexpr,
               INTERLEAVED: tl.constexpr):  # fmt: skip
    pair, rest = tl.arange(0, PAIRS), 2 * PAIRS + tl.arange(0, PLAIN)
    dtype = target.dtype.element_ty
    if INTERLEAVED:
        both = tl.reshape(tl.join(first, second), [target.shape[0], 2 * PAIRS])
        tl.store(target[:, None] + tl.arange(0, 2 * PAIRS), both.to(dtype), mask=live[:, None])
    else:
        tl.store(target[:, None] + pair, first.to(dtype), mask=live[:, None])
        tl.store(target[:, None] + PAIRS + pair, second.to(dtype), mask=live[:, None])
    tl.store(target[:, None] + rest, plain.to(dtype), mask=live[:, None] & (rest < DIM))


@triton.jit
def _layer_norm(first, second, plain, norm, norm_bias, eps, DIM: tl.constexpr, PAIRS: tl.constexpr,
                PLAIN: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """Return the layer norm of rows as `_load_row` returns them."""
    one, known = tl.arange(0, 1), tl.arange(0, 1) == 0
    weights = _load_row(norm + one, known, DIM, PAIRS, PLAIN, INTERLEAVED)
    biases = _load_row(norm_bias + one, known, DIM, PAIRS, PLAIN, INTERLEAVED)
    mean = ((tl.sum(first, 1) + tl.sum(second, 1) + tl.sum(plain, 1)) / DIM)[:, None]
    first, second = first - mean, second - mean
    plain = tl.where(2 * PAIRS + tl.arange(0, PLAIN)[None, :] < DIM, plain - mean, 0.0)
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(plain * plain, 1)
    factor = tl.rsqrt(squares / DIM + eps)[:, None]
    first = first * factor * weights[0] + biases[0]
    second = second * factor * weights[1] + biases[1]
    return first, second, plain * factor * weights[2] + biases[2]


@triton.jit
def rope_and_cache_kernel(
    q,
    k,
    norm,
    norm_bias,
    cos_table,
    sin_table,
    positions,
    slots,
    q_out,
    cache,
    eps,
    stride_token,
    stride_k,
    stride_block,
    H: tl.constexpr,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (T, 1 + tiles of heads): the key first, then the queries.

    The first 2 * PAIRS numbers are rotated; PLAIN is the number of others, rounded up to a power of
    2.
    """
    wait_for_previous_kernel()
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(positions + token).to(tl.int64), tl.load(slots + token).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    if tile == 0:
        one = tl.arange(0, 1)
        first, second, plain = _load_row(k + token * stride_k + one, one == 0, DIM, PAIRS, PLAIN, INTERLEAVED)
        first, second, plain = _layer_norm(first, second, plain, norm, norm_bias, eps, DIM, PAIRS, PLAIN, INTERLEAVED)
        first, second = rotate_pairs(first, second, cos_table, sin_table, position, pair, PAIRS)
        target = cache + slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * DIM + one
        _store_row(target, (one == 0) & (slot >= 0), first, second, plain, DIM, PAIRS, PLAIN, INTERLEAVED)
    else:
        head = (tile - 1) * HEADS + tl.arange(0, HEADS)
        q_1, q_2, q_plain = _load_row(q + token * stride_token + head * DIM, head < H, DIM, PAIRS, PLAIN, INTERLEAVED)
        q_1, q_2 = rotate_pairs(q_1, q_2, cos_table, sin_table, position, pair, PAIRS)
        q_out += token * (H * DIM)
        _store_row(q_out + head * DIM, head < H, q_1, q_2, q_plain, DIM, PAIRS, PLAIN, INTERLEAVED)


def rope_and_cache(
    q_THd: Tensor,
    k_Td: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope: RopeInputs,
    index_cache: Tensor,
) -> Tensor:
    """Run `kernels.ops.index.rope_and_cache`; tokens of q and k may be strided."""
    num_tokens, num_heads, dim = q_THd.shape
    rotated = rope.size
    assert k_Td.shape == (num_tokens, dim), f"keys {tuple(k_Td.shape)}, queries {tuple(q_THd.shape)}"
    assert q_THd.stride()[1:] == (dim, 1), f"heads apart: strides {q_THd.stride()}"
    assert k_Td.stride(1) == 1, f"strides {k_Td.stride()}"
    assert index_cache.stride()[1:] == (dim, 1), f"rows of the cache apart: strides {index_cache.stride()}"
    assert rotated // 2 == triton.next_power_of_2(rotated // 2), f"{rotated} rotated numbers"
    out_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    if num_tokens:
        rope_and_cache_kernel[num_tokens, 1 + triton.cdiv(num_heads, HEADS)](
            q_THd, k_Td, *norm, *rope.tensors, out_THd, index_cache,
            eps, q_THd.stride(0), k_Td.stride(0), index_cache.stride(0),
            H=num_heads, DIM=dim, PAIRS=rotated // 2, PLAIN=triton.next_power_of_2(max(1, dim - rotated)),
            BLOCK_SIZE=index_cache.shape[1], INTERLEAVED=rope.interleaved, HEADS=HEADS, num_warps=1, **PDL,
        )  # fmt: skip
    return out_THd
