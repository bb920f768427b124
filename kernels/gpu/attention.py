"""Paged attention for grouped queries in Triton: decode, chunked prefill and mixed steps by one kernel.

A program takes a block of R rows, the (query, head) pairs of one sequence that share a key head, and walks over tiles of
keys of a fixed size at absolute positions, with the online softmax of Milakov and Gimelshein (2018); `splits` says what happens
after every SPLIT keys. Rows of sequences with one query are too few to fill a GPU: then programs share out the splits, write
them to a workspace, and a second kernel merges them. So how the work is shared out, which the batch decides, cannot change a
bit: a query's result depends on its own sequence alone.

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
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.splits import (
    LOG2_E,
    SPLIT,
    Span,
    find,
    first_visible,
    max_splits,
    merge,
    merge_workspace,
    num_shares,
    rows_of,
    store_normalised,
    store_statistics,
    workspace_row,
)

# Architectures on which a test on a GPU found tiles of 64 and 128 rows to give equal bits.
EQUAL_BITS: frozenset[int] = frozenset()


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
    CHUNK: tl.constexpr,
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
        if CHUNK > 0:
            visible &= key[None, :] >= (position_R // CHUNK * CHUNK)[:, None]
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
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
    SHARED_OUT: tl.constexpr,
):
    """Grid (row blocks, G, programs that share out a row block's splits)."""
    wait_for_previous()
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
    begin = first_visible(first, WINDOW, CHUNK) // KEYS * KEYS
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
            CHUNK,
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


def attend(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: DeviceSequences,
    device: Device,
    *,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
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
        _launch(q_THd, k_cache, v_cache, out, seqs, device, single, tiling, scale, window, chunk, sinks_H)
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
    chunk: int,
    sinks_H: Tensor | None,
) -> None:
    """The sequences with one query, or the others."""
    num_tokens, num_heads, dim = q_THd.shape
    num_kv, block_size = k_cache.shape[2], k_cache.shape[1]
    first, end = (0, seqs.num_single) if single else (seqs.num_single, seqs.num_sequences)
    if first == end:
        return
    tokens = first, end if single else num_tokens
    span = Span(seqs=seqs, sequences=(first, end), tokens=tokens, group=num_heads // num_kv)
    rows = tiling.single_rows if single else tiling.rows
    blocks_each, num_blocks = span.blocks(rows)
    num_splits = max_splits(seqs.max_length, tiling.split, window, chunk) if single else 1
    workspace = span.workspace(out, num_splits if num_splits > 1 else 0)
    _attend[num_blocks, num_kv, num_shares(device, num_blocks * num_kv, num_splits)](
        q_THd, k_cache, v_cache, out, *workspace, workspace[0] if sinks_H is None else sinks_H,
        seqs.cu_queries, seqs.lengths, seqs.block_table, *span.bounds,
        scale * LOG2_E.value, q_THd.stride(0), k_cache.stride(0), seqs.block_table.stride(0), num_splits,
        STRIDE_SLOT=k_cache.stride(1), GROUP=span.group, DIM=dim, PADDED=triton.next_power_of_2(dim), BLOCK_SIZE=block_size,
        WINDOW=window, CHUNK=chunk, HAS_SINKS=sinks_H is not None, ROWS=rows, KEYS=tiling.keys, SPLIT_KEYS=tiling.split,
        BLOCKS_EACH=blocks_each, SHARED_OUT=num_splits > 1,
        num_warps=tiling.num_warps(rows), num_stages=tiling.num_stages, **EARLY,
    )  # fmt: skip
    if num_splits > 1:
        merge_workspace(
            workspace, out, span, num_splits, split=tiling.split, window=window, chunk=chunk, sinks_H=sinks_H
        )


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
    chunk: int = 0,
    sinks: bool = False,
    invariant: bool = True,
    shared_out: bool = False,
) -> Case:
    tiling = tiles(head_dim=dim, element_size=2, arch=arch, invariant=invariant)
    rows = tiling.single_rows if single else tiling.rows
    constexprs = {"GROUP": heads // num_kv, "DIM": dim, "PADDED": triton.next_power_of_2(dim), "BLOCK_SIZE": block_size}
    constexprs |= {
        "WINDOW": window,
        "CHUNK": chunk,
        "HAS_SINKS": sinks,
        "ROWS": rows,
        "KEYS": tiling.keys,
        "SPLIT_KEYS": tiling.split,
    }
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
        options=EARLY,
    )


def cases() -> list[Case]:
    """The shapes of Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-120b, Qwen3-Next, Phi-3, Llama 4 and DeepSeek-V3's prompts."""
    oss = {"window": 128, "sinks": True}
    found = []
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
            _case("llama4 chunk", 40, 8, 128, arch, single=False, chunk=8192),
            _case("deepseek expanded", 128, 128, 192, arch, single=False, invariant=False),
        ]
    return found
