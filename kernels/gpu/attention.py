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
instructions a row: it is used where a test on a GPU found equal bits (`EQUAL_BITS`). `fast` takes 16 rows (mma.sync) for single
queries, and another kernel for the others (`prefill`).

Tiles of a cache in fp8 are converted to the queries' dtype, exactly, so that the products are those of any cache. The keys' scale
is part of the softmax's, and the values' multiplies the sums of a split: neither costs anything a key.

T tokens, H query heads, G key/value heads, d head size, B sequences; R rows, N keys of a tile, D padded head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.rope_and_cache import check_scales
from expertwire.kernels.gpu.splits import (
    BOUNDS,
    LOG2_E,
    SPLIT,
    Span,
    find,
    first_visible,
    max_splits,
    merge,
    merge_workspace,
    narrow,
    rows_of,
    share_out,
    sharing_programs,
    store_normalised,
    store_statistics,
    workspace_row,
)
from expertwire.kernels.ops.attention import FP8, AttentionMetadata

# Architectures on which a test on a GPU found tiles of 64 and 128 rows to give equal bits.
EQUAL_BITS: frozenset[int] = frozenset()


@triton.jit
def soften(top, weight, scores, scale, visible):
    """`online_softmax` of the scores that are visible."""
    return online_softmax(top, weight, tl.where(visible, scores, float("-inf")), scale)


@triton.jit
def online_softmax(top, weight, scores, scale):
    """One tile of the online softmax: scores [R, N], whose maxima are kept times `scale`, in bits (log2 e is part of it).

    Returns the tile's unnormalised probabilities, the factor of all that came before, and the new maximum and weight [R].
    """
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
        k = tl.load(k_cache + offset, mask=mask, other=0.0).to(q.dtype)
        v = tl.load(v_cache + offset, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = key[None, :] <= position_R[:, None]
        if WINDOW > 0:
            visible &= key[None, :] > position_R[:, None] - WINDOW
        if CHUNK > 0:
            visible &= key[None, :] >= (position_R // CHUNK * CHUNK)[:, None]
        p, old, top, weight = soften(top, weight, scores, scale, visible)
        total = tl.dot(p.to(v.dtype), v, total * old[:, None], input_precision="ieee")
    return total, top, weight


@triton.jit(do_not_specialize=[*BOUNDS, "table_width", "num_slots"])
def _attend(
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
    SHARED_OUT: tl.constexpr,
):
    """Grid (row blocks and programs that share out their splits, G)."""
    wait_for_previous()
    group = tl.program_id(1)
    block, share, num_shares = share_out(
        tl.program_id(0), num_decodes, first_token, end_token, row_blocks, num_programs, num_slots, BLOCKS_EACH
    )
    bounds = num_decodes, first_sequence, end_sequence, first_token, end_token
    first_sequence, end_sequence, first_token, end_token = narrow(*bounds, BLOCKS_EACH)
    sequence, block = find(
        cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, BLOCKS_EACH
    )
    row_R, end_row, to_position, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if (end == 0) | (share >= num_shares):
        return
    begin = first_visible(first, WINDOW, CHUNK) // KEYS * KEYS
    dim = tl.arange(0, PADDED)
    query_R = (row_R // GROUP).to(tl.int64) * stride_token + (group * GROUP + row_R % GROUP) * DIM
    q_RD = tl.load(q + query_R[:, None] + dim, mask=(row_R < end_row)[:, None] & (dim < DIM), other=0.0)
    position_R = row_R // GROUP + to_position
    table = block_table + sequence.to(tl.int64) * table_width
    k_cache += group * DIM
    v_cache += group * DIM
    if kv_scales is not None:
        scale *= tl.load(kv_scales + group)

    total = tl.zeros([ROWS, PADDED], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    first_split = begin // SPLIT_KEYS + share
    # What only the end of a split needs must not lie in registers all the time: it is not hoisted (wherever that was found to
    # spill), and the rows are worked out again.
    for split in tl.range(first_split, tl.cdiv(end, SPLIT_KEYS), num_shares, disable_licm=SHARED_OUT or PADDED > 128):
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
        if kv_scales is not None:
            total_1 *= tl.load(kv_scales + tl.num_programs(1) + group)
        if SHARED_OUT:
            _, _, from_token, to_token = narrow(*bounds, BLOCKS_EACH)
            again, _, _ = share_out(
                tl.program_id(0), num_decodes, from_token, to_token, row_blocks, num_programs, num_slots, BLOCKS_EACH
            )
            sequence_1, block_1 = find(
                cu_seqlens_q, again, first_sequence, end_sequence, from_token, to_token, GROUP, ROWS, BLOCKS_EACH
            )
            row_R, end_row, _, _, _ = rows_of(
                cu_seqlens_q, seq_lens, sequence_1, block_1, from_token, to_token, GROUP, ROWS
            )
            slot = split % num_slots * tl.num_programs(1) + group
            at_R = workspace_row(slot, row_R, from_token, to_token, GROUP)
            mask = (row_R < end_row)[:, None] & (dim < DIM)
            tl.store(partials + at_R[:, None] * DIM + dim, total_1, mask=mask)
            store_statistics(statistics, slot, row_R, from_token, to_token, end_row, top_1, weight_1, GROUP)
        else:
            total, top, weight = merge(total, top, weight, total_1, top_1, weight_1)
    if not SHARED_OUT:
        _, _, from_token, to_token = narrow(*bounds, BLOCKS_EACH)
        row_R, end_row, _, _, _ = rows_of(cu_seqlens_q, seq_lens, sequence, block, from_token, to_token, GROUP, ROWS)
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
    device: Device,
    *,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    sinks_H: Tensor | None = None,
    kv_scales_2G: Tensor | None = None,
    out: Tensor | None = None,
    tiling: Tiles | None = None,
) -> Tensor:
    """`kernels.ops.attention.reference`: [T, H, d] in q's dtype; rows that belong to no sequence are left as they are.

    q_THd: tokens may lie apart, heads may not; caches [blocks, s, G, d]. `tiling` is `tiles` of the shapes unless given.
    """
    dim = q_THd.shape[2]
    out = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device) if out is None else out
    tiling = tiling or tiles(head_dim=dim, element_size=q_THd.element_size(), arch=device.arch)
    options = {"scale": scale, "window": window, "chunk": chunk, "sinks_H": sinks_H, "kv_scales_2G": kv_scales_2G}
    attend_decodes(q_THd, k_cache, v_cache, seqs, device, out=out, tiling=tiling, **options)
    _launch(q_THd, k_cache, v_cache, out, seqs, device, False, tiling, **options)
    return out


def attend_decodes(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    device: Device,
    *,
    out: Tensor,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    sinks_H: Tensor | None = None,
    kv_scales_2G: Tensor | None = None,
    invariant: bool = True,
    tiling: Tiles | None = None,
) -> None:
    """The rows of `attend` that belong to decodes, into `out` [T, H, d]."""
    num_tokens, num_heads, dim = q_THd.shape
    num_kv = k_cache.shape[2]
    assert q_THd.stride()[1:] == (dim, 1), f"heads apart: strides {q_THd.stride()}"
    assert k_cache.shape[3] == dim, f"head sizes {dim} and {k_cache.shape[3]}"
    assert k_cache.stride()[2:] == (dim, 1), f"heads of the cache apart: strides {k_cache.stride()}"
    assert num_heads % num_kv == 0, f"{num_heads} heads of queries, {num_kv} of keys"
    check_scales(kv_scales_2G, k_cache, 2 * num_kv)
    assert seqs.max_decodes <= num_tokens, f"{seqs.max_decodes} decodes in {num_tokens} rows"
    assert scale is None or scale > 0, f"scale {scale}: maxima are taken before it is applied"
    assert out.is_contiguous(), f"output strides {out.stride()}"
    tiling = tiling or tiles(head_dim=dim, element_size=q_THd.element_size(), arch=device.arch, invariant=invariant)
    options = {"scale": scale, "window": window, "chunk": chunk, "sinks_H": sinks_H, "kv_scales_2G": kv_scales_2G}
    _launch(q_THd, k_cache, v_cache, out, seqs, device, True, tiling, **options)


def _launch(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    seqs: AttentionMetadata,
    device: Device,
    is_decode: bool,
    tiling: Tiles,
    *,
    scale: float | None,
    window: int,
    chunk: int,
    sinks_H: Tensor | None,
    kv_scales_2G: Tensor | None,
) -> None:
    """The decodes, or the prefills."""
    num_heads, dim = q_THd.shape[1:]
    num_kv, block_size = k_cache.shape[2], k_cache.shape[1]
    end = seqs.max_decodes if is_decode else seqs.max_prefill_tokens
    if end == 0:
        return
    assert k_cache.stride() == v_cache.stride(), f"cache strides {k_cache.stride()} and {v_cache.stride()}"
    scale = dim**-0.5 if scale is None else scale
    span = Span(seqs=seqs, is_decode=is_decode, first=0, end=end, group=num_heads // num_kv)
    rows = tiling.single_rows if is_decode else tiling.rows
    blocks_each, row_blocks = span.blocks(rows)
    num_splits = max_splits(seqs.max_seq_len, tiling.split, window, chunk) if is_decode else 1
    workspace = span.workspace(out, num_splits if num_splits > 1 else 0)
    num_programs, grid = sharing_programs(device, row_blocks, num_splits, is_decode=is_decode, num_kv=num_kv)
    _attend[grid, num_kv](
        q_THd, k_cache, v_cache, kv_scales_2G, out, *workspace, workspace[0] if sinks_H is None else sinks_H,
        seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table, *span.bounds, row_blocks, num_programs,
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
    fp8: bool = False,
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
    mode = "invariant" if invariant else "fast"
    wanted = "HMMA" if rows < 64 else "HGMMA" if arch == 90 else "UTC"
    return Case(
        name=f"attention.{name}{' fp8' * fp8} {'decode' if single else 'prefill'} {mode} sm_{arch}",
        kernel=_attend,
        args={
            **dict.fromkeys(("q", "out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("k_cache", "v_cache"), FP8 if fp8 else torch.bfloat16),
            "kv_scales": torch.float32 if fp8 else None,
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens", "block_table"), torch.int32),
            **dict.fromkeys(BOUNDS, 64),
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
    """The shapes of Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-120b, Qwen3-Next, Phi-3 and Llama 4."""
    oss = {"window": 128, "sinks": True}
    found = []
    for arch in (90, 100):
        found += [
            _case("qwen3 blocks of 16", 32, 4, 128, arch, single=True, shared_out=True),
            _case("qwen3 blocks of 16", 32, 4, 128, arch, single=False),
            _case("qwen3 blocks of 16", 32, 4, 128, arch, single=True, shared_out=True, invariant=False),
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
            _case("qwen3", 32, 4, 128, arch, single=True, shared_out=True, fp8=True),
            _case("qwen3", 32, 4, 128, arch, single=False, fp8=True),
            _case("gpt-oss window", 64, 8, 64, arch, single=True, shared_out=True, fp8=True, **oss),
            _case("gpt-oss window", 64, 8, 64, arch, single=False, fp8=True, **oss),
            _case("qwen3-next", 16, 2, 256, arch, single=True, shared_out=True, fp8=True),
            _case("qwen3-next", 16, 2, 256, arch, single=False, fp8=True),
        ]
    return found
