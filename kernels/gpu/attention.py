"""Paged attention for grouped queries in Triton: decode, chunked prefill and mixed steps in one kernel.

A program takes a block of ROWS rows, the (query, head) pairs of one sequence that share a key head,
and loops over tiles of keys of a fixed size at absolute positions, with the online softmax of
Milakov and Gimelshein (2018). `split_kv` says how the result of every SPLIT_KEYS keys is merged.
Decodes have too few rows to fill a GPU: their splits are computed by several programs, written to a
workspace, and merged by a second kernel. The order of the merge does not depend on how many
programs there are, so a query's bits depend on its own sequence alone.

`invariant` mode also needs one family of matrix instructions. Rows as the left operand, at least 64
of them and padded if necessary, always give wgmma (sm_90) or tcgen05 (sm_100). Padding is cheap:
the keys and values of a tile of 64, 128 bf16 numbers each, are 32 KB, 1700 cycles of an SM's share
of 4.3 TB/s; their products for 64 rows take 256 cycles, the exponentials 256. (Keys as the left
operand would waste no rows, but the softmax would cross warps and every tile of probabilities would
pass through shared memory.) A larger row tile, which long prefills need because 64 rows do 64 FLOP
per byte from L2, issues the same instructions per row. It is used where a test on a GPU found equal
bits (`EQUAL_BITS`). `fast` mode takes 16 rows (mma.sync) for decodes, and another kernel for
prefills (`prefill`).

Tiles of an fp8 cache are converted to the queries' dtype, exactly, so the products are those of any
cache. The keys' scale is folded into the softmax scale, and the values' scale multiplies the sums
of a split: neither costs anything per key.

T tokens, H query heads, G key/value heads, d head size. In the kernels M rows of a block and N keys
of a tile, as in FlashAttention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.rope_and_cache import check_cache_scales
from expertwire.kernels.gpu.split_kv import (
    BOUNDS,
    LOG2_E,
    SPLIT,
    Span,
    assign_split,
    find_sequence,
    first_visible,
    launch_range,
    max_splits,
    merge,
    merge_workspace,
    rows_of,
    split_grid,
    store_normalised,
    store_statistics,
    workspace_row,
)
from expertwire.kernels.ops.attention import PLAIN, AttentionMetadata, AttentionOptions

# Architectures where a test on a GPU found that tiles of 64 and 128 rows give equal bits.
EQUAL_BITS: frozenset[int] = frozenset()


@triton.jit
def masked_online_softmax(row_max, row_sum, scores, scale, visible):
    """Run `online_softmax` with the scores that are not visible set to -inf."""
    return online_softmax(row_max, row_sum, tl.where(visible, scores, float("-inf")), scale)


@triton.jit
def online_softmax(row_max, row_sum, scores, scale):
    """Update an online softmax by one tile of scores [M, N].

    `scale` includes log2 e. Returns the tile's unnormalised probabilities, the factor for all
    earlier sums, and the new scaled row maximum and row sum [M].
    """
    merged = tl.maximum(row_max, tl.max(scores, 1) * scale)
    shift = tl.where(merged == float("-inf"), 0.0, merged)
    p = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
    old = tl.exp2(row_max - shift)
    return p, old, merged, tl.fma(row_sum, old, tl.sum(p, 1))


@triton.jit
def rows_of_keys(
    table, tile, end, stride_block, STRIDE_SLOT: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Return the keys [N] of a tile, which of them lie before `end`, and their offsets in the cache."""
    key = tile + tl.arange(0, KEYS)
    known = key < end
    block = tl.load(table + key // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
    return key, known, block * stride_block + key % BLOCK_SIZE * STRIDE_SLOT


@triton.jit
def attend_split(
    q,
    k_cache,
    v_cache,
    table,
    start,
    end,
    position_M,
    scale,
    stride_block,
    STRIDE_SLOT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Attend to the keys [start, end) of one split; `start` is at the start of a tile."""
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    dim = tl.arange(0, PADDED)
    for tile in range(start, end, KEYS):
        key, known, offset = rows_of_keys(table, tile, end, stride_block, STRIDE_SLOT, KEYS, BLOCK_SIZE)
        offset = offset[:, None] + dim
        # The cache holds anything after the last key: its probability is 0, but 0 * NaN is not 0.
        mask = known[:, None] & (dim < DIM)
        k = tl.load(k_cache + offset, mask=mask, other=0.0).to(q.dtype)
        v = tl.load(v_cache + offset, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = key[None, :] <= position_M[:, None]
        if WINDOW > 0:
            visible &= key[None, :] > position_M[:, None] - WINDOW
        if CHUNK > 0:
            visible &= key[None, :] >= (position_M // CHUNK * CHUNK)[:, None]
        p, old, row_max, row_sum = masked_online_softmax(row_max, row_sum, scores, scale, visible)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=[*BOUNDS, "table_width", "num_slots"])
def attend_kernel(
    q,
    k_cache,
    v_cache,
    kv_scales,
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
    row_blocks,
    num_programs,
    scale,
    stride_token,
    stride_block,
    table_width,
    num_slots,
    STRIDE_SLOT: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
    SPLIT_KV: tl.constexpr,
):
    """Grid (row blocks x programs that share the splits of a row block, G)."""
    wait_for_previous_kernel()
    group = tl.program_id(1)
    block, program_index, num_sharing = assign_split(
        tl.program_id(0), num_decodes, first_token, end_token, row_blocks, num_programs, num_slots, BLOCKS_EACH
    )
    bounds = num_decodes, first_sequence, end_sequence, first_token, end_token
    first_sequence, end_sequence, first_token, end_token = launch_range(*bounds, BLOCKS_EACH)
    sequence, block = find_sequence(
        cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, BLOCKS_EACH
    )
    row_M, end_row, to_position, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if (end == 0) | (program_index >= num_sharing):
        return
    begin = first_visible(first, WINDOW, CHUNK) // KEYS * KEYS
    dim = tl.arange(0, PADDED)
    query_M = (row_M // GROUP).to(tl.int64) * stride_token + (group * GROUP + row_M % GROUP) * DIM
    q_Md = tl.load(q + query_M[:, None] + dim, mask=(row_M < end_row)[:, None] & (dim < DIM), other=0.0)
    position_M = row_M // GROUP + to_position
    table = block_table + sequence.to(tl.int64) * table_width
    k_cache += group * DIM
    v_cache += group * DIM
    if kv_scales is not None:
        scale *= tl.load(kv_scales + group)

    acc = tl.zeros([ROWS, PADDED], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    first_split = begin // SPLIT_KEYS + program_index
    # What only the end of a split needs must not occupy registers during the loop: it is not hoisted (where hoisting was found
    # to spill), and the rows are computed again.
    for split in tl.range(first_split, tl.cdiv(end, SPLIT_KEYS), num_sharing, disable_licm=SPLIT_KV or PADDED > 128):
        acc_1, row_max_1, row_sum_1 = attend_split(
            q_Md,
            k_cache,
            v_cache,
            table,
            tl.maximum(begin, split * SPLIT_KEYS),
            tl.minimum(end, (split + 1) * SPLIT_KEYS),
            position_M,
            scale,
            stride_block,
            STRIDE_SLOT,
            ROWS,
            KEYS,
            DIM,
            PADDED,
            BLOCK_SIZE,
            WINDOW,
            CHUNK,
        )
        if kv_scales is not None:
            acc_1 *= tl.load(kv_scales + tl.num_programs(1) + group)
        if SPLIT_KV:
            _, _, from_token, to_token = launch_range(*bounds, BLOCKS_EACH)
            again, _, _ = assign_split(
                tl.program_id(0), num_decodes, from_token, to_token, row_blocks, num_programs, num_slots, BLOCKS_EACH
            )
            sequence_1, block_1 = find_sequence(
                cu_seqlens_q, again, first_sequence, end_sequence, from_token, to_token, GROUP, ROWS, BLOCKS_EACH
            )
            row_M, end_row, _, _, _ = rows_of(
                cu_seqlens_q, seq_lens, sequence_1, block_1, from_token, to_token, GROUP, ROWS
            )
            slot = split % num_slots * tl.num_programs(1) + group
            at_M = workspace_row(slot, row_M, from_token, to_token, GROUP)
            mask = (row_M < end_row)[:, None] & (dim < DIM)
            tl.store(partials + at_M[:, None] * DIM + dim, acc_1, mask=mask)
            store_statistics(statistics, slot, row_M, from_token, to_token, end_row, row_max_1, row_sum_1, GROUP)
        else:
            acc, row_max, row_sum = merge(acc, row_max, row_sum, acc_1, row_max_1, row_sum_1)
    if not SPLIT_KV:
        _, _, from_token, to_token = launch_range(*bounds, BLOCKS_EACH)
        row_M, end_row, _, _, _ = rows_of(cu_seqlens_q, seq_lens, sequence, block, from_token, to_token, GROUP, ROWS)
        store_normalised(out, row_M, end_row, group, acc, row_max, row_sum, sinks, dim, GROUP, DIM, HAS_SINKS)


@dataclass(frozen=True, kw_only=True)
class AttentionTileConfig:
    """Tile sizes and launch options: rows and warps may follow the step, the key tile and the split may not."""

    decode_rows: int
    rows: int  # of a prefill
    keys: int
    split: int  # keys, a multiple of `keys`
    least_warps: int
    num_stages: int

    def num_warps(self, rows: int) -> int:
        """Return more warps for more rows, along the rows, so that reductions over keys stay the same."""
        return max(self.least_warps, rows // 16)


def tile_config(*, head_dim: int, element_size: int, arch: int, invariant: bool = True) -> AttentionTileConfig:
    """Return the configuration for a head size, an element size in bytes, an architecture and a numerics mode.

    All of them compile without spills.
    """
    padded, blackwell = triton.next_power_of_2(head_dim), arch >= 100
    wide = padded * element_size > 256
    keys = 32 if wide or padded > head_dim else 64
    return AttentionTileConfig(
        decode_rows=64 if invariant else 16,
        rows=128 if not wide and arch in EQUAL_BITS else 64,
        keys=keys,
        split=SPLIT,
        least_warps=8 if wide or blackwell else 4,
        num_stages=2,
    )


def attend(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions = PLAIN,
    *,
    device: Device,
    out: Tensor | None = None,
    config: AttentionTileConfig | None = None,
) -> Tensor:
    """Run attention as `kernels.ops.attention.reference` does, into [T, H, d] of q's dtype.

    Rows that belong to no sequence are left as they are. q_THd: tokens may be strided, heads may
    not. Caches are [blocks, s, G, d]. `config` defaults to `tile_config` of the shapes.
    """
    out = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device) if out is None else out
    config = config or tile_config(head_dim=q_THd.shape[2], element_size=q_THd.element_size(), arch=device.arch)
    inputs = q_THd, k_cache, v_cache, seqs, options
    attend_decodes(*inputs, device=device, out=out, config=config)
    _launch(*inputs, device, out, config, is_decode=False)
    return out


def attend_decodes(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions = PLAIN,
    *,
    device: Device,
    out: Tensor,
    invariant: bool = True,
    config: AttentionTileConfig | None = None,
) -> None:
    """Write the rows of `attend` that belong to decodes into `out` [T, H, d]."""
    num_tokens, num_heads, dim = q_THd.shape
    num_kv, scale = k_cache.shape[2], options.scale
    assert q_THd.stride()[1:] == (dim, 1), f"heads apart: strides {q_THd.stride()}"
    assert k_cache.shape[3] == dim, f"head sizes {dim} and {k_cache.shape[3]}"
    assert k_cache.stride()[2:] == (dim, 1), f"heads of the cache apart: strides {k_cache.stride()}"
    assert num_heads % num_kv == 0, f"{num_heads} heads of queries, {num_kv} of keys"
    check_cache_scales(options.kv_scales_2G, k_cache, 2 * num_kv)
    assert seqs.max_decodes <= num_tokens, f"{seqs.max_decodes} decodes in {num_tokens} rows"
    assert scale is None or scale > 0, f"scale {scale}: maxima are taken before it is applied"
    assert out.is_contiguous(), f"output strides {out.stride()}"
    config = config or tile_config(
        head_dim=dim, element_size=q_THd.element_size(), arch=device.arch, invariant=invariant
    )
    _launch(q_THd, k_cache, v_cache, seqs, options, device, out, config, is_decode=True)


def _launch(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions,
    device: Device,
    out: Tensor,
    config: AttentionTileConfig,
    *,
    is_decode: bool,
) -> None:
    """Launch the kernel for the decodes or for the prefills."""
    num_heads, dim = q_THd.shape[1:]
    num_kv, block_size = k_cache.shape[2], k_cache.shape[1]
    end = seqs.max_decodes if is_decode else seqs.max_prefill_tokens
    if end == 0:
        return
    assert k_cache.stride() == v_cache.stride(), f"cache strides {k_cache.stride()} and {v_cache.stride()}"
    window, chunk, sinks_H = options.window, options.chunk, options.sinks_H
    span = Span(seqs=seqs, is_decode=is_decode, first=0, end=end, group=num_heads // num_kv)
    rows = config.decode_rows if is_decode else config.rows
    blocks_each, row_blocks = span.blocks(rows)
    num_splits = max_splits(seqs.max_seq_len, config.split, window, chunk) if is_decode else 1
    workspace = span.workspace(out, num_splits if num_splits > 1 else 0)
    num_programs, grid = split_grid(device, row_blocks, num_splits, is_decode=is_decode, num_kv=num_kv)
    attend_kernel[grid, num_kv](
        q_THd, k_cache, v_cache, options.kv_scales_2G, out, *workspace, workspace[0] if sinks_H is None else sinks_H,
        seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table, *span.bounds, row_blocks, num_programs,
        options.scale_for(dim) * LOG2_E.value, q_THd.stride(0), k_cache.stride(0), seqs.block_table.stride(0), num_splits,
        STRIDE_SLOT=k_cache.stride(1), GROUP=span.group, DIM=dim, PADDED=triton.next_power_of_2(dim), BLOCK_SIZE=block_size,
        WINDOW=window, CHUNK=chunk, HAS_SINKS=sinks_H is not None, ROWS=rows, KEYS=config.keys, SPLIT_KEYS=config.split,
        BLOCKS_EACH=blocks_each, SPLIT_KV=num_splits > 1,
        num_warps=config.num_warps(rows), num_stages=config.num_stages, **PDL,
    )  # fmt: skip
    if num_splits > 1:
        merge_workspace(
            workspace, out, span, num_splits, split=config.split, window=window, chunk=chunk, sinks_H=sinks_H
        )
