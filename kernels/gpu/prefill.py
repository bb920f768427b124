"""Paged prefill attention in Triton for `fast` numerics, with FlashAttention's tiles.

A program takes a block of M = 128 rows, the (query, head) pairs of one sequence that share a key
head, and loops over the tiles of keys that some row sees. Only tiles on the diagonal or at the edge
of a window are masked. As in FlashAttention-2, a tile is one product of queries and keys, one
online softmax in base 2 (log2 e is part of the scale), and one product of probabilities, kept in
registers and rounded to the dtype of the values, which accumulates in place.

What a tile of 128 rows, 64 keys and a head size of 128 costs on Hopper, by the machine code for
sm_90 (255 registers, no spills, 98,560 B of shared memory): 16 HGMMA m64n64k16 and 8 m64n128k16,
1,024 cycles of an SM's tensor cores; some 850 instructions a warp outside the mask, one warp on
each scheduler, of which 68 exp2 (8 cycles each), 72 maxima, 68 scale and shift, 76 additions, 132
multiplications (the sums so far), 32 conversions, 16 copies of 16 B; 32 KB of keys and values from
L2, 32 B a cycle. The softmax does not overlap with the products of its own program: Triton's
pipeliner (WGMMAPipeline.cpp, `dotCanBeProperlyAsync`) waits for scores that the same iteration
needs, and scores carried over to the next iteration make ptxas wait behind each HGMMA. So a program
has four warps and two programs share an SM: one multiplies while the other exponentiates, starts or
ends. Two tiles take 2,048 cycles of products beside 1,700 of issue: between 59 % (in step) and some
85 % (out of step) of the tensor cores' rate; 500 TFLOP/s are 63 % of 790. This is an estimate: the
kernel has never run on a GPU.

A short chunk of queries against a long context has too few rows to fill a GPU. Then several
programs share the key tiles of a row block, and a second kernel merges their partial results
(`prefill_split_kv`). Their number follows the row blocks and the size of the GPU, so the bits of a
query depend on what is computed with it.

T tokens, H query heads, G key/value heads, d head size of queries and keys, v of values. In the
kernels M rows of a block and N keys of a tile, as in FlashAttention.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu import attention
from expertwire.kernels.gpu.attention import attend_decodes, online_softmax
from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.prefill_split_kv import (
    BOUNDS,
    MERGED_ROWS,
    first_key_of,
    merge_prefill_kernel,
    num_splits,
    tiles_of_split,
)
from expertwire.kernels.gpu.split_kv import (
    LOG2_E,
    Span,
    find_sequence,
    first_visible,
    launch_range,
    rows_of,
    store_normalised,
    store_statistics,
    workspace_row,
)
from expertwire.kernels.ops.attention import PLAIN, AttentionMetadata, AttentionOptions


@triton.jit
def load_tile(
    cache, slot_N, known_N, STRIDE_SLOT: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr
):
    """Load the columns [FIRST, FIRST + SIZE) of keys or values [N, DIM]; 0 for unknown keys and past DIM.

    known_N None: no key needs masking, since whatever the cache holds will do.
    """
    dim = FIRST + tl.arange(0, SIZE)
    if STRIDE_SLOT % 8 == 0:
        # In units of 16 bytes, keys and values share one offset register; two would spill.
        pointers = cache + ((slot_N * (STRIDE_SLOT // 8))[:, None] + dim // 8).to(tl.int64) * 8 + dim % 8
    else:
        pointers = cache + slot_N.to(tl.int64)[:, None] * STRIDE_SLOT + dim
    if FIRST + SIZE > DIM:
        mask = (dim < DIM)[None, :] if known_N is None else known_N[:, None] & (dim < DIM)
        return tl.load(pointers, mask=mask, other=0.0)
    elif known_N is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=known_N[:, None], other=0.0)


@triton.jit
def _masked(
    scores,
    key_N,
    cu_seqlens_q,
    seq_lens,
    sequence,
    block,
    first_token,
    end_token,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return scores [M, N] with -inf where a row does not see the key.

    The rows are computed again, so that they occupy no registers while no tile is masked.
    """
    row_M, _, to_position, _, _ = rows_of(cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS)
    position_M = row_M // GROUP + to_position
    scores = tl.where(key_N[None, :] <= position_M[:, None], scores, float("-inf"))
    if WINDOW > 0 or CHUNK > 0:
        low_M = first_visible(position_M, WINDOW, CHUNK)
        scores = tl.where(key_N[None, :] >= low_M[:, None], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=[*BOUNDS, "table_width", "num_splits"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partials,
    statistics,
    sinks,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    block_table,
    first_sequence,
    end_sequence,
    first_token,
    end_token,
    scale,
    stride_token,
    table_width,
    num_splits,
    STRIDE_SLOT: tl.constexpr,
    STRIDE_SLOT_V: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_1: tl.constexpr,
    DIM_2: tl.constexpr,
    DIM_V: tl.constexpr,
    DIM_V1: tl.constexpr,
    DIM_V2: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT_KEYS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT_KV: tl.constexpr,
):
    """Grid (row blocks, G, splits). DIM_1 + DIM_2, powers of two or 0, are the two parts of DIM; likewise DIM_V."""
    wait_for_previous_kernel()
    # The later blocks of a sequence see more keys, so they start first.
    block, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    bounds = num_decodes, first_sequence, end_sequence, first_token, end_token
    first_sequence, end_sequence, first_token, end_token = launch_range(*bounds, 0)
    sequence, block = find_sequence(
        cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, 0
    )
    row_M, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if end == 0:
        return
    begin = first_key_of(first, BLOCK_SIZE, WINDOW, CHUNK)
    lowest = first_visible(end - 1, WINDOW, CHUNK)  # from here to `first` all rows see all keys
    start, stop, _ = tiles_of_split(begin, end, tl.program_id(2), num_splits, KEYS, MIN_SPLIT_KEYS)
    if start >= stop:
        return
    query_M = (row_M // GROUP).to(tl.int64) * stride_token + (group * GROUP + row_M % GROUP) * DIM
    q_1 = load_tile(q, query_M, row_M < end_row, 1, 0, DIM_1, DIM)
    if DIM_2 > 0:
        q_2 = load_tile(q, query_M, row_M < end_row, 1, DIM_1, DIM_2, DIM)
    table = block_table + sequence.to(tl.int64) * table_width
    k_cache += group * DIM
    v_cache += group * DIM_V
    acc_1 = tl.zeros([ROWS, DIM_V1], tl.float32)
    if DIM_V2 > 0:
        acc_2 = tl.zeros([ROWS, DIM_V2], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for tile in tl.range(start, stop, disable_licm=True):
        first_key = tl.multiple_of(begin + tile * KEYS, ALIGNED)
        key_N = first_key + tl.arange(0, KEYS)
        known_N = key_N < end
        slot_N = tl.load(table + tl.minimum(key_N, end - 1) // BLOCK_SIZE) * BLOCK_SIZE + key_N % BLOCK_SIZE
        # Unknown keys lie in masked tiles, where any score will do. Values must be 0 there: 0 * NaN is not 0.
        k_1 = load_tile(k_cache, slot_N, None, STRIDE_SLOT, 0, DIM_1, DIM)
        v_1 = load_tile(v_cache, slot_N, known_N, STRIDE_SLOT_V, 0, DIM_V1, DIM_V)
        if DIM_2 > 0:
            k_2 = load_tile(k_cache, slot_N, None, STRIDE_SLOT, DIM_1, DIM_2, DIM)
            scores = tl.dot(q_2, tl.trans(k_2), input_precision="ieee")
            scores = tl.dot(q_1, tl.trans(k_1), scores, input_precision="ieee")
        else:
            scores = tl.dot(q_1, tl.trans(k_1), input_precision="ieee")
        if (first_key < lowest) | (first_key + KEYS > first + 1):
            of_rows = cu_seqlens_q, seq_lens, sequence, block, first_token, end_token
            scores = _masked(scores, key_N, *of_rows, GROUP, ROWS, WINDOW, CHUNK)
        p, old, row_max, row_sum = online_softmax(row_max, row_sum, scores, scale)
        p = p.to(v_1.dtype)
        acc_1 = tl.dot(p, v_1, acc_1 * old[:, None], input_precision="ieee")
        if DIM_V2 > 0:
            v_2 = load_tile(v_cache, slot_N, known_N, STRIDE_SLOT_V, DIM_V1, DIM_V2, DIM_V)
            acc_2 = tl.dot(p, v_2, acc_2 * old[:, None], input_precision="ieee")

    _, _, first_token, end_token = launch_range(*bounds, 0)
    row_M, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    dim_1, dim_2 = tl.arange(0, DIM_V1), DIM_V1 + tl.arange(0, DIM_V2 if DIM_V2 > 0 else 1)
    if SPLIT_KV:
        begin = first_key_of(first, BLOCK_SIZE, WINDOW, CHUNK)
        _, _, splits = tiles_of_split(begin, end, 0, num_splits, KEYS, MIN_SPLIT_KEYS)
        if splits > 1:
            slot = tl.program_id(2) * tl.num_programs(1) + group
            at_M = workspace_row(slot, row_M, first_token, end_token, GROUP)
            target = partials + at_M[:, None] * DIM_V
            live = (row_M < end_row)[:, None]
            tl.store(target + dim_1, acc_1, mask=live)
            if DIM_V2 > 0:
                tl.store(target + dim_2, acc_2, mask=live & (dim_2 < DIM_V))
            store_statistics(statistics, slot, row_M, first_token, end_token, end_row, row_max, row_sum, GROUP)
            return
    store_normalised(out, row_M, end_row, group, acc_1, row_max, row_sum, sinks, dim_1, GROUP, DIM_V, HAS_SINKS)
    if DIM_V2 > 0:
        store_normalised(out, row_M, end_row, group, acc_2, row_max, row_sum, sinks, dim_2, GROUP, DIM_V, HAS_SINKS)


@dataclass(frozen=True, kw_only=True)
class PrefillTileConfig:
    """Tile sizes and launch options."""

    rows: int
    keys: int
    min_split_keys: int = 1024  # a multiple of `keys`; shorter splits are not worth a second launch
    num_warps: int
    num_stages: int
    blocks_per_sm: int  # that split a streaming multiprocessor


def tile_config(*, dim: int, value_dim: int, element_size: int, arch: int) -> PrefillTileConfig:
    """Return the largest tiles that compile without spills for these head sizes."""
    if element_size > 2:
        return PrefillTileConfig(rows=64, keys=32, num_warps=8, num_stages=2, blocks_per_sm=1)
    if max(dim, value_dim) > 192:
        return PrefillTileConfig(rows=128, keys=32 if arch >= 100 else 64, num_warps=8, num_stages=2, blocks_per_sm=1)
    if max(dim, value_dim) > 128:
        return PrefillTileConfig(rows=128, keys=64 if arch >= 100 else 128, num_warps=8, num_stages=2, blocks_per_sm=1)
    if arch >= 100:
        return PrefillTileConfig(rows=128, keys=64, num_warps=8, num_stages=3, blocks_per_sm=1)
    return PrefillTileConfig(rows=128, keys=64, num_warps=4, num_stages=3, blocks_per_sm=2)


def attend(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions = PLAIN,
    *,
    device: Device,
    out: Tensor | None = None,
    config: PrefillTileConfig | None = None,
) -> Tensor:
    """Run attention as `kernels.ops.attention.reference` does, into [T, H, v] of q's dtype.

    Rows that belong to no sequence are left as they are. q_THd: tokens may be strided, heads may
    not. Caches are [blocks, s, G, d] and [blocks, s, G, v], contiguous; v may differ from d if
    there are no decodes. `config` defaults to `tile_config` of the shapes. fp8 caches go to
    `attention.attend`, since these tiles leave no registers for converting them.
    """
    inputs = q_THd, k_cache, v_cache, seqs, options
    if options.kv_scales_2G is not None:
        return attention.attend(*inputs, device=device, out=out)
    num_tokens, num_heads, dim = q_THd.shape
    value_dim = v_cache.shape[3]
    for name, cache in {"k_cache": k_cache, "v_cache": v_cache}.items():
        assert cache.is_contiguous(), f"{name} strides {cache.stride()}"
    out = q_THd.new_empty(num_tokens, num_heads, value_dim) if out is None else out
    attend_decodes(*inputs, device=device, out=out, invariant=False)
    size = q_THd.element_size()
    config = config or tile_config(dim=dim, value_dim=value_dim, element_size=size, arch=device.arch)
    _launch(*inputs, device, out, config)
    return out


def _launch(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions,
    device: Device,
    out: Tensor,
    config: PrefillTileConfig,
) -> None:
    num_heads, dim = q_THd.shape[1:]
    num_kv, value_dim = v_cache.shape[2:]
    if seqs.max_prefill_tokens == 0:
        return
    window, chunk, sinks_H = options.window, options.chunk, options.sinks_H
    span = Span(seqs=seqs, is_decode=False, first=0, end=seqs.max_prefill_tokens, group=num_heads // num_kv)
    _, num_blocks = span.blocks(config.rows)
    reach = min([seqs.max_prefill_len, *(limit + config.rows for limit in (window, chunk) if limit)])
    places = device.num_sms * config.blocks_per_sm
    # Not from `num_blocks`: a captured step's bound on the sequences may be far above the actual number.
    programs = -(-seqs.max_prefill_tokens * span.group // config.rows) * num_kv
    splits = num_splits(programs, places, reach // config.min_split_keys)
    workspace = span.workspace(out, splits if splits > 1 else 0)
    sizes = constexprs(span.group, value_dim, k_cache.shape[1], config, window, chunk, sinks_H is not None)
    arguments = sinks_H if sinks_H is not None else out, seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens
    (dim_1, dim_2), (value_1, value_2) = split_head_dim(dim), split_head_dim(value_dim)
    prefill_kernel[num_blocks, num_kv, splits](
        q_THd, k_cache, v_cache, out, *workspace, *arguments, seqs.block_table, *span.bounds,
        options.scale_for(dim) * LOG2_E.value, q_THd.stride(0), seqs.block_table.stride(0), splits,
        **{**sizes, "DIM": dim}, DIM_1=dim_1, DIM_2=dim_2, DIM_V=value_dim, DIM_V1=value_1, DIM_V2=value_2,
        STRIDE_SLOT=k_cache.stride(1), STRIDE_SLOT_V=v_cache.stride(1), ALIGNED=gcd(config.keys, k_cache.shape[1]),
        SPLIT_KV=splits > 1, num_warps=config.num_warps, num_stages=config.num_stages, **PDL,
    )  # fmt: skip
    if splits > 1:
        merge_prefill_kernel[num_blocks, num_kv, config.rows // MERGED_ROWS](
            *workspace, out, *arguments, *span.bounds, splits, **sizes, PADDED=triton.next_power_of_2(value_dim),
            MERGED_ROWS=MERGED_ROWS, **PDL,
        )  # fmt: skip


def split_head_dim(dim: int) -> tuple[int, int]:
    """Return a head size as a power of two plus another or 0, as matrix instructions take it."""
    first = 1 << (dim.bit_length() - 1)
    return first, triton.next_power_of_2(max(dim - first, 16)) if dim > first else 0


def constexprs(
    group: int, dim: int, block_size: int, config: PrefillTileConfig, window: int, chunk: int, has_sinks: bool
) -> dict[str, int | bool]:
    sizes = {
        "GROUP": group,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": window,
        "CHUNK": chunk,
        "HAS_SINKS": has_sinks,
    }
    return {**sizes, "ROWS": config.rows, "KEYS": config.keys, "MIN_SPLIT_KEYS": config.min_split_keys}
