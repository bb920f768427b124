"""Paged attention for grouped queries in Triton: decode, chunked prefill and mixed steps by one kernel.

A program takes a block of R rows, the (query, head) pairs of one sequence that share a key head, and walks over tiles of
keys of a fixed size at absolute positions, with the online softmax of Milakov and Gimelshein (2018). After every SPLIT keys,
at absolute positions too, the result is closed and merged into the total of the splits before it. Rows of sequences with one
query are too few to fill a GPU: then programs share out the splits, write them to a workspace, and a second kernel merges
them with the same arithmetic in the same order. So how the work is shared out, which the batch decides, cannot change a bit:
a query's result depends on its own sequence alone.

`invariant` mode also wants one family of matrix instructions. Rows on the left and at least 64 of them, padded if need be,
always give wgmma (sm_90) or tcgen05 (sm_100). Why padding is cheap: the keys and values of a tile of 64, 128 bf16 numbers
each, are 32 KB, 1700 cycles of an SM's share of 4.3 TB/s; their products for 64 rows take 256 cycles, the exponentials 256.
(Keys on the left would waste no rows, but move the softmax across warps and every tile of probabilities through shared
memory.) A larger row tile, which long prefills need because 64 rows do 64 FLOP with a byte from L2, issues the same
instructions a row: it is used where a test on a GPU found equal bits (`EQUAL_BITS`). `fast` takes it anyway, and 16 rows
(mma.sync) for decode.

T tokens, H query heads, G key/value heads, d head size, B sequences; R rows, N keys of a tile, D padded head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.attention import DeviceSequences
from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.device import Device

SPLIT = 1024  # keys
MERGED_ROWS = 8
MERGE_STAGES = 4
PROGRAMS_PER_SM = 8  # that share out the splits: enough for ragged lengths
# Architectures on which a test on a GPU found tiles of 64 and 128 rows to give equal bits.
EQUAL_BITS: frozenset[int] = frozenset()
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _first_block(cu_queries, sequence, first_sequence, first_token, end_token, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Row blocks of the sequences before it, at most: each may leave its last one uneven."""
    start = tl.minimum(tl.maximum(tl.load(cu_queries + sequence), first_token), end_token) - first_token
    return start * GROUP // ROWS + sequence - first_sequence


@triton.jit
def find(
    cu_queries,
    block,
    first_sequence,
    end_sequence,
    first_token,
    end_token,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
):
    """Which sequence a row block belongs to, and which of its blocks it is.

    Counted are the tokens [first_token, end_token) of the sequences [first_sequence, end_sequence). BLOCKS_EACH: blocks of every
    sequence, 0 if that differs.
    """
    if BLOCKS_EACH > 0:
        return first_sequence + block // BLOCKS_EACH, block % BLOCKS_EACH
    else:
        sequence = first_sequence
        end = end_sequence
        while end - sequence > 1:
            middle = (sequence + end) // 2
            before = _first_block(cu_queries, middle, first_sequence, first_token, end_token, GROUP, ROWS) <= block
            sequence = tl.where(before, middle, sequence)
            end = tl.where(before, end, middle)
        return sequence, block - _first_block(cu_queries, sequence, first_sequence, first_token, end_token, GROUP, ROWS)


@triton.jit
def rows_of(cu_queries, lengths, sequence, block, first_token, end_token, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """A block's rows, numbered token * GROUP + head in the group.

    Returns the rows' numbers [R], the end of those that exist, what to add to a token for its position; the position of the first
    row and the one behind the last row's, 0 if there are none.
    """
    end_query = tl.load(cu_queries + sequence + 1)
    start = tl.minimum(tl.maximum(tl.load(cu_queries + sequence), first_token), end_token)
    stop = tl.minimum(tl.maximum(end_query, first_token), end_token)
    first_row, end_row = start * GROUP + block * ROWS, stop * GROUP
    to_position = tl.load(lengths + sequence) - end_query
    last_row = tl.minimum(first_row + ROWS, end_row) - 1
    end = tl.where(first_row < end_row, to_position + last_row // GROUP + 1, 0)
    return first_row + tl.arange(0, ROWS), end_row, to_position, to_position + first_row // GROUP, end


@triton.jit
def rescale(top, top_before):
    """2^(before - top), the factor of sums that were relative to an earlier maximum; 0 as long as nothing was seen."""
    return tl.exp2(top_before - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def merge(total, top, weight, total_1, top_1, weight_1):
    """A split's unnormalised values [R, D], their maximum exponent and their weight [R] into those of the splits before it.

    Every rounding is written out, since two kernels have to agree on it.
    """
    merged = tl.maximum(top, top_1)
    old, new = rescale(merged, top), rescale(merged, top_1)
    total = tl.fma(total, old[:, None], total_1 * new[:, None])
    return total, merged, tl.fma(weight, old, weight_1 * new)


@triton.jit
def store_normalised(
    out,
    row_R,
    end_row,
    group,
    total,
    top,
    weight,
    sinks,
    dim,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Divided by the weights' sum, to which a sink adds its own."""
    live_R = row_R < end_row
    head_R = group * GROUP + row_R % GROUP
    if HAS_SINKS:
        sink = tl.load(sinks + head_R, mask=live_R, other=0.0).to(tl.float32) * LOG2_E
        merged = tl.maximum(top, sink)
        old = rescale(merged, top)
        factor = tl.div_rn(old, tl.fma(weight, old, tl.exp2(sink - merged)))
    else:
        factor = tl.div_rn(1.0, weight)
    at_R = (row_R // GROUP * (tl.num_programs(1) * GROUP) + head_R).to(tl.int64)
    value = (total * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + at_R[:, None] * DIM + dim, value, mask=live_R[:, None] & (dim < DIM))


@triton.jit
def workspace_row(slot, row_R, first_token, end_token, GROUP: tl.constexpr):
    """The workspace is [slots * G, rows of the launch, d], so that neighbouring rows lie a fixed distance apart."""
    rows = (end_token - first_token) * GROUP
    return (tl.cast(slot, tl.int64) * rows - first_token * GROUP) + row_R


@triton.jit
def store_statistics(statistics, slot, row_R, first_token, end_token, end_row, top, weight, GROUP: tl.constexpr):
    """A split's maxima and weights."""
    at_R = workspace_row(slot, row_R, first_token, end_token, GROUP)
    tl.store(statistics + at_R * 2, top, mask=row_R < end_row)
    tl.store(statistics + at_R * 2 + 1, weight, mask=row_R < end_row)


@triton.jit
def soften(top, weight, scores, scale, visible):
    """One tile of the online softmax: scores [R, N], whose maxima are kept times `scale`, in bits (log2 e is part of it).

    Returns the tile's unnormalised probabilities, the factor of all that came before, and the new maximum and weight [R].
    """
    scores = tl.where(visible, scores, float("-inf"))
    merged = tl.maximum(top, tl.max(scores, 1) * scale)
    shift = tl.where(merged == float("-inf"), 0.0, merged)
    p = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
    old = tl.exp2(top - shift)
    return p, old, merged, tl.fma(weight, old, tl.sum(p, 1))


@triton.jit
def rows_of_keys(
    table, tile, end, stride_block, STRIDE_SLOT: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The keys [N] of a tile, which of them lie before the end, and where those lie in the cache."""
    key = tile + tl.arange(0, KEYS)
    known = key < end
    block = tl.load(table + key // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
    return key, known, block * stride_block + key % BLOCK_SIZE * STRIDE_SLOT


@triton.jit
def _fold(
    q,
    k_cache,
    v_cache,
    table,
    start,
    end,
    position_R,
    scale,
    stride_block,
    STRIDE_SLOT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The keys [start, end) of one split; `start` is at a tile's start."""
    total = tl.zeros([ROWS, PADDED], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    dim = tl.arange(0, PADDED)
    for tile in range(start, end, KEYS):
        key, known, offset = rows_of_keys(table, tile, end, stride_block, STRIDE_SLOT, KEYS, BLOCK_SIZE)
        offset = offset[:, None] + dim
        # What the cache holds behind the last key may be anything: its probability is 0, but 0 * NaN is not.
        mask = known[:, None] & (dim < DIM)
        k = tl.load(k_cache + offset, mask=mask, other=0.0)
        v = tl.load(v_cache + offset, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = key[None, :] <= position_R[:, None]
        if WINDOW > 0:
            visible &= key[None, :] > position_R[:, None] - WINDOW
        p, old, top, weight = soften(top, weight, scores, scale, visible)
        total = tl.dot(p.to(v.dtype), v, total * old[:, None], input_precision="ieee")
    return total, top, weight


@triton.jit(
    do_not_specialize=["first_sequence", "end_sequence", "first_token", "end_token", "table_width", "num_slots"]
)
def _attend(
    q,
    k_cache,
    v_cache,
    out,
    partials,
    statistics,
    sinks,
    cu_queries,
    lengths,
    block_table,
    first_sequence,
    end_sequence,
    first_token,
    end_token,
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
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
    SHARED_OUT: tl.constexpr,
):
    """Grid (row blocks, G, programs that share out a row block's splits)."""
    # The later blocks of a sequence see more keys: they start first.
    block, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    sequence, block = find(
        cu_queries, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, BLOCKS_EACH
    )
    row_R, end_row, to_position, first, end = rows_of(
        cu_queries, lengths, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if end == 0:
        return
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // KEYS * KEYS
    dim = tl.arange(0, PADDED)
    query_R = (row_R // GROUP).to(tl.int64) * stride_token + (group * GROUP + row_R % GROUP) * DIM
    q_RD = tl.load(q + query_R[:, None] + dim, mask=(row_R < end_row)[:, None] & (dim < DIM), other=0.0)
    position_R = row_R // GROUP + to_position
    table = block_table + sequence.to(tl.int64) * table_width
    k_cache += group * DIM
    v_cache += group * DIM

    total = tl.zeros([ROWS, PADDED], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    first_split = begin // SPLIT_KEYS + tl.program_id(2)
    # What only the end of a split needs must not lie in registers all the time: it is not hoisted (wherever that was found to
    # spill), and the rows are worked out again.
    for split in tl.range(
        first_split, tl.cdiv(end, SPLIT_KEYS), tl.num_programs(2), disable_licm=SHARED_OUT or PADDED > 128
    ):
        total_1, top_1, weight_1 = _fold(
            q_RD,
            k_cache,
            v_cache,
            table,
            tl.maximum(begin, split * SPLIT_KEYS),
            tl.minimum(end, (split + 1) * SPLIT_KEYS),
            position_R,
            scale,
            stride_block,
            STRIDE_SLOT,
            ROWS,
            KEYS,
            DIM,
            PADDED,
            BLOCK_SIZE,
            WINDOW,
        )
        if SHARED_OUT:
            row_R, end_row, _, _, _ = rows_of(cu_queries, lengths, sequence, block, first_token, end_token, GROUP, ROWS)
            slot = split % num_slots * tl.num_programs(1) + group
            at_R = workspace_row(slot, row_R, first_token, end_token, GROUP)
            mask = (row_R < end_row)[:, None] & (dim < DIM)
            tl.store(partials + at_R[:, None] * DIM + dim, total_1, mask=mask)
            store_statistics(statistics, slot, row_R, first_token, end_token, end_row, top_1, weight_1, GROUP)
        else:
            total, top, weight = merge(total, top, weight, total_1, top_1, weight_1)
    if not SHARED_OUT:
        row_R, end_row, _, _, _ = rows_of(cu_queries, lengths, sequence, block, first_token, end_token, GROUP, ROWS)
        store_normalised(out, row_R, end_row, group, total, top, weight, sinks, dim, GROUP, DIM, HAS_SINKS)


@triton.jit(do_not_specialize=["first_sequence", "end_sequence", "first_token", "end_token", "num_slots"])
def merge_splits(
    partials,
    statistics,
    out,
    sinks,
    cu_queries,
    lengths,
    first_sequence,
    end_sequence,
    first_token,
    end_token,
    num_slots,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (row blocks, G): what the programs of the splits left in the workspace, which starts at `first_token`."""
    group = tl.program_id(1)
    block = tl.program_id(0)
    sequence, block = find(
        cu_queries, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, BLOCKS_EACH
    )
    row_R, end_row, _, first, end = rows_of(cu_queries, lengths, sequence, block, first_token, end_token, GROUP, ROWS)
    if end == 0:
        return
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0)
    dim = tl.arange(0, PADDED)
    live_R = row_R < end_row

    total = tl.zeros([ROWS, PADDED], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for split in tl.range(begin // SPLIT_KEYS, tl.cdiv(end, SPLIT_KEYS), num_stages=STAGES, disable_licm=True):
        slot = split % num_slots * tl.num_programs(1) + group
        at_R = workspace_row(slot, row_R, first_token, end_token, GROUP)
        mask = live_R[:, None] & (dim < DIM)
        total_1 = tl.load(partials + at_R[:, None] * DIM + dim, mask=mask, other=0.0)
        top_1 = tl.load(statistics + at_R * 2, mask=live_R, other=float("-inf"))
        weight_1 = tl.load(statistics + at_R * 2 + 1, mask=live_R, other=0.0)
        total, top, weight = merge(total, top, weight, total_1, top_1, weight_1)
    store_normalised(out, row_R, end_row, group, total, top, weight, sinks, dim, GROUP, DIM, HAS_SINKS)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Rows and warps may follow the step (see the module's docstring); the tile of keys and the split may not."""

    single_rows: int  # for sequences with one query
    rows: int  # for the others
    keys: int
    split: int  # keys, a multiple of `keys`
    least_warps: int
    num_stages: int

    def num_warps(self, rows: int) -> int:
        """More rows get more warps along the rows, so that the reductions over keys stay as they are."""
        return max(self.least_warps, rows // 16)


def tiles(*, head_dim: int, element_size: int, arch: int, invariant: bool = True) -> Tiles:
    """From the shapes, the dtype's size in bytes, the architecture and the numerics mode: what compiles without spills."""
    padded, blackwell = triton.next_power_of_2(head_dim), arch >= 100
    wide = padded * element_size > 256
    keys = 32 if wide or padded > head_dim else 64
    return Tiles(
        single_rows=64 if invariant else 16,
        rows=128 if not wide and (not invariant or arch in EQUAL_BITS) else 64,
        keys=keys,
        split=SPLIT,
        least_warps=8 if wide or blackwell else 4,
        num_stages=2,
    )


def num_shares(device: Device, num_blocks: int, num_splits: int) -> int:
    """Programs that share out the splits of a row block."""
    return max(1, min(num_splits, -(-PROGRAMS_PER_SM * device.num_sms // max(1, num_blocks))))


def attend(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: DeviceSequences,
    device: Device,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks_H: Tensor | None = None,
    out: Tensor | None = None,
    invariant: bool = True,
    tiling: Tiles | None = None,
) -> Tensor:
    """`kernels.attention.reference`: [T, H, d] in q's dtype; rows that belong to no sequence are left as they are.

    q_THd: tokens may lie apart, heads may not; caches [blocks, s, G, d]. `tiling` is `tiles` of the shapes unless given.
    """
    num_tokens, num_heads, dim = q_THd.shape
    num_kv = k_cache.shape[2]
    assert q_THd.stride()[1:] == (dim, 1), f"heads apart: strides {q_THd.stride()}"
    assert k_cache.shape[3] == dim, f"head sizes {dim} and {k_cache.shape[3]}"
    assert k_cache.stride() == v_cache.stride(), f"cache strides {k_cache.stride()} and {v_cache.stride()}"
    assert k_cache.stride()[2:] == (dim, 1), f"heads of the cache apart: strides {k_cache.stride()}"
    assert num_heads % num_kv == 0, f"{num_heads} heads of queries, {num_kv} of keys"
    assert seqs.num_single <= num_tokens, f"{seqs.num_single} single queries in {num_tokens} rows"
    out = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device) if out is None else out
    assert out.is_contiguous(), f"output strides {out.stride()}"
    tiling = tiling or tiles(head_dim=dim, element_size=q_THd.element_size(), arch=device.arch, invariant=invariant)
    scale = dim**-0.5 if scale is None else scale
    assert scale > 0, f"scale {scale}: maxima are taken before it is applied"
    for single in (True, False):
        _launch(q_THd, k_cache, v_cache, out, seqs, device, single, tiling, scale, window, sinks_H)
    return out


def _launch(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    seqs: DeviceSequences,
    device: Device,
    single: bool,
    tiling: Tiles,
    scale: float,
    window: int,
    sinks_H: Tensor | None,
) -> None:
    """The sequences with one query, or the others."""
    num_tokens, num_heads, dim = q_THd.shape
    num_kv, block_size = k_cache.shape[2], k_cache.shape[1]
    group = num_heads // num_kv
    first, end = (0, seqs.num_single) if single else (seqs.num_single, seqs.num_sequences)
    if first == end:
        return
    end_token = end if single else num_tokens
    rows = tiling.single_rows if single else tiling.rows
    blocks_each = -(-group // rows) if single else 0
    num_blocks = end * blocks_each if single else (num_tokens - first) * group // rows + end - first
    num_splits = max_splits(seqs.max_length, tiling.split, window) if single else 1
    shared = num_splits > 1
    workspace = [torch.empty(0, device=out.device)] * 2
    if shared:
        workspace = [out.new_empty(end * num_heads * num_splits, width, dtype=torch.float32) for width in (dim, 2)]
    padded = triton.next_power_of_2(dim)
    same = {"GROUP": group, "DIM": dim, "PADDED": padded, "WINDOW": window, "HAS_SINKS": sinks_H is not None}
    sinks = workspace[0] if sinks_H is None else sinks_H
    _attend[num_blocks, num_kv, num_shares(device, num_blocks * num_kv, num_splits)](
        q_THd, k_cache, v_cache, out, *workspace, sinks,
        seqs.cu_queries, seqs.lengths, seqs.block_table, first, end, first, end_token,
        scale * LOG2_E.value, q_THd.stride(0), k_cache.stride(0), seqs.block_table.stride(0), num_splits,
        **same, STRIDE_SLOT=k_cache.stride(1), BLOCK_SIZE=block_size, ROWS=rows, KEYS=tiling.keys, SPLIT_KEYS=tiling.split,
        BLOCKS_EACH=blocks_each, SHARED_OUT=shared, num_warps=tiling.num_warps(rows), num_stages=tiling.num_stages,
    )  # fmt: skip
    if shared:
        blocks_each = -(-group // MERGED_ROWS)
        merge_splits[end * blocks_each, num_kv](
            *workspace, out, sinks, seqs.cu_queries, seqs.lengths, first, end, first, end_token, num_splits,
            **same, ROWS=MERGED_ROWS, SPLIT_KEYS=tiling.split, BLOCKS_EACH=blocks_each, STAGES=MERGE_STAGES,
        )  # fmt: skip


def max_splits(max_length: int, split: int, window: int) -> int:
    """Splits in which a query of a sequence can see keys."""
    splits = -(-max_length // split)
    return min(splits, -(-(window - 1) // split) + 1) if window else splits


def _case(
    name: str,
    heads: int,
    num_kv: int,
    dim: int,
    arch: int,
    *,
    single: bool,
    block_size: int = 16,
    window: int = 0,
    sinks: bool = False,
    invariant: bool = True,
    shared_out: bool = False,
) -> Case:
    tiling = tiles(head_dim=dim, element_size=2, arch=arch, invariant=invariant)
    rows = tiling.single_rows if single else tiling.rows
    constexprs = {"GROUP": heads // num_kv, "DIM": dim, "PADDED": triton.next_power_of_2(dim), "BLOCK_SIZE": block_size}
    constexprs |= {"WINDOW": window, "HAS_SINKS": sinks, "ROWS": rows, "KEYS": tiling.keys, "SPLIT_KEYS": tiling.split}
    strides = {"stride_token": (heads + 2 * num_kv) * dim, "stride_block": block_size * num_kv * dim}
    wanted = "HMMA" if rows < 64 else "HGMMA" if arch == 90 else "UTC"
    return Case(
        name=f"attention.{name} {'decode' if single else 'prefill'} {'invariant' if invariant else 'fast'} sm_{arch}",
        kernel=_attend,
        args={
            **dict.fromkeys(("q", "k_cache", "v_cache", "out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("cu_queries", "lengths", "block_table"), torch.int32),
            **{"first_sequence": 0, "end_sequence": 64, "first_token": 0, "end_token": 64},
            **strides,
            **{"scale": 0.1, "table_width": 2048, "num_slots": 32},
        },
        constexprs={**constexprs, "STRIDE_SLOT": num_kv * dim, "BLOCKS_EACH": int(single), "SHARED_OUT": shared_out},
        num_warps=tiling.num_warps(rows),
        num_stages=tiling.num_stages,
        blocks_per_sm=2 if tiling.num_warps(rows) == 4 else 1,
        expect={arch: wanted},
    )


def _merge_case(heads: int, num_kv: int, dim: int, window: int, sinks: bool) -> Case:
    return Case(
        name=f"attention.merge {heads // num_kv}x{dim} window {window}",
        kernel=merge_splits,
        args={
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("cu_queries", "lengths"), torch.int32),
            **{"first_sequence": 0, "end_sequence": 64, "first_token": 0, "end_token": 64, "num_slots": 32},
        },
        constexprs={
            **{"GROUP": heads // num_kv, "DIM": dim, "PADDED": dim, "WINDOW": window, "HAS_SINKS": sinks},
            **{"ROWS": MERGED_ROWS, "SPLIT_KEYS": SPLIT, "BLOCKS_EACH": 1, "STAGES": MERGE_STAGES},
        },
        blocks_per_sm=4,
        wide=False,  # the statistics are a number a row
        expect={90: "", 100: ""},
    )


def cases() -> list[Case]:
    """The shapes of Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-120b and Qwen3-Next."""
    oss = {"window": 128, "sinks": True}
    found = [_merge_case(32, 4, 128, 0, False), _merge_case(64, 8, 64, 128, True)]
    for arch in (90, 100):
        found += [
            _case("qwen3 blocks of 16", 32, 4, 128, arch, single=True, shared_out=True),
            _case("qwen3 blocks of 16", 32, 4, 128, arch, single=False),
            _case("qwen3 blocks of 16", 32, 4, 128, arch, single=True, shared_out=True, invariant=False),
            _case("qwen3 blocks of 16", 32, 4, 128, arch, single=False, invariant=False),
            _case("qwen3 short", 32, 4, 128, arch, single=True),
            _case("qwen3 blocks of 64", 32, 4, 128, arch, single=True, block_size=64, shared_out=True),
            _case("mixtral", 32, 8, 128, arch, single=True, shared_out=True),
            _case("mixtral", 32, 8, 128, arch, single=False, block_size=64),
            _case("gpt-oss window", 64, 8, 64, arch, single=True, shared_out=True, **oss),
            _case("gpt-oss window", 64, 8, 64, arch, single=False, **oss),
            _case("qwen3-next", 16, 2, 256, arch, single=True, shared_out=True),
            _case("qwen3-next", 16, 2, 256, arch, single=False),
            _case("phi", 32, 8, 96, arch, single=False),
        ]
    return found
