"""Paged attention of prompts in Triton for `fast` numerics, at FlashAttention's tiles.

A program takes a block of R = 128 rows, the (query, head) pairs of one sequence that share a key head, and walks over the tiles
of keys that some row sees. Only tiles on the diagonal or the edge of a window are masked. As in FlashAttention-2, a tile is one
product of queries and keys, one online softmax in base 2 (log2 e is part of the scale), and one product of probabilities, kept in
registers and rounded to the dtype of the values, which accumulates in place.

What a tile of 128 rows, 64 keys and a head size of 128 costs on Hopper, by the machine code for sm_90 (255 registers, none
spilled, 98,560 B of shared memory): 16 HGMMA m64n64k16 and 8 m64n128k16, 1,024 cycles of an SM's tensor cores; some 850
instructions a warp outside the mask, a warp on each scheduler, of which 68 exp2 (8 cycles each), 72 maxima, 68 scale and shift,
76 additions, 132 multiplications (the sums so far), 32 conversions, 16 copies of 16 B; 32 KB of keys and values from L2, 32 B a
cycle. The softmax does not overlap with the products of its own program: Triton's pipeliner (WGMMAPipeline.cpp,
`dotCanBeProperlyAsync`) waits for scores that the same iteration needs, and scores carried over to the next iteration make ptxas
wait behind each HGMMA. So a program has four warps and two share an SM: one multiplies while the other exponentiates, starts or
ends. Two tiles take 2,048 cycles of products beside 1,700 of issue: between 59 % (in step) and some 85 % (out of step) of the
tensor cores' rate; 500 TFLOP/s are 63 % of 790. An estimate: it has never run on a GPU.

A short chunk of queries against a long context has too few rows to fill a GPU: then programs share out the tiles of a row block,
by the number of blocks and the size of the GPU, and a second kernel merges what they leave in a workspace (`shares`). So the bits
of a query depend on what is computed with it.

T tokens, H query heads, G key/value heads, d head size of queries and keys, v of values; R rows, N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu import attention
from expertwire.kernels.gpu.attention import attend_decodes, online_softmax
from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.shares import BOUNDS, MERGED_ROWS, begin_of, merge_shares, num_shares, share_of
from expertwire.kernels.gpu.splits import (
    LOG2_E,
    Span,
    find,
    first_visible,
    narrow,
    rows_of,
    store_normalised,
    store_statistics,
    workspace_row,
)
from expertwire.kernels.ops.attention import AttentionMetadata


@triton.jit
def load_tile(
    cache, slot_N, known_N, STRIDE_SLOT: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr
):
    """Numbers [FIRST, FIRST + SIZE) of the keys or values [N, DIM] in some slots; 0 where unknown or behind DIM.

    known_N None: anything that the cache holds will do.
    """
    dim = FIRST + tl.arange(0, SIZE)
    if STRIDE_SLOT % 8 == 0:
        # In units of 16 bytes an offset takes one register for keys and values together; two would spill.
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
    """Scores [R, N], -inf where a row does not see the key. The rows are worked out again, so that they do not lie in registers
    where no tile is masked."""
    row_R, _, to_position, _, _ = rows_of(cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS)
    position_R = row_R // GROUP + to_position
    scores = tl.where(key_N[None, :] <= position_R[:, None], scores, float("-inf"))
    if WINDOW > 0 or CHUNK > 0:
        low_R = first_visible(position_R, WINDOW, CHUNK)
        scores = tl.where(key_N[None, :] >= low_R[:, None], scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=[*BOUNDS, "table_width", "num_shares"])
def _prefill(
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
    num_shares,
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
    MIN_SHARE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_OUT: tl.constexpr,
):
    """Grid (row blocks, G, shares). DIM_1 + DIM_2, powers of two or 0, are what DIM is cut into; likewise DIM_V."""
    wait_for_previous()
    # The later blocks of a sequence see more keys: they start first.
    block, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    bounds = num_decodes, first_sequence, end_sequence, first_token, end_token
    first_sequence, end_sequence, first_token, end_token = narrow(*bounds, 0)
    sequence, block = find(cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, 0)
    row_R, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if end == 0:
        return
    begin = begin_of(first, BLOCK_SIZE, WINDOW, CHUNK)
    lowest = first_visible(end - 1, WINDOW, CHUNK)  # from here to `first` all rows see all keys
    start, stop, _ = share_of(begin, end, tl.program_id(2), num_shares, KEYS, MIN_SHARE)
    if start >= stop:
        return
    query_R = (row_R // GROUP).to(tl.int64) * stride_token + (group * GROUP + row_R % GROUP) * DIM
    q_1 = load_tile(q, query_R, row_R < end_row, 1, 0, DIM_1, DIM)
    if DIM_2 > 0:
        q_2 = load_tile(q, query_R, row_R < end_row, 1, DIM_1, DIM_2, DIM)
    table = block_table + sequence.to(tl.int64) * table_width
    k_cache += group * DIM
    v_cache += group * DIM_V
    total_1 = tl.zeros([ROWS, DIM_V1], tl.float32)
    if DIM_V2 > 0:
        total_2 = tl.zeros([ROWS, DIM_V2], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for tile in tl.range(start, stop, disable_licm=True):
        first_key = tl.multiple_of(begin + tile * KEYS, ALIGNED)
        key_N = first_key + tl.arange(0, KEYS)
        known_N = key_N < end
        slot_N = tl.load(table + tl.minimum(key_N, end - 1) // BLOCK_SIZE) * BLOCK_SIZE + key_N % BLOCK_SIZE
        # Unknown keys lie in masked tiles, where any score will do; for values it will not: 0 * NaN is not 0.
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
        p, old, top, weight = online_softmax(top, weight, scores, scale)
        p = p.to(v_1.dtype)
        total_1 = tl.dot(p, v_1, total_1 * old[:, None], input_precision="ieee")
        if DIM_V2 > 0:
            v_2 = load_tile(v_cache, slot_N, known_N, STRIDE_SLOT_V, DIM_V1, DIM_V2, DIM_V)
            total_2 = tl.dot(p, v_2, total_2 * old[:, None], input_precision="ieee")

    _, _, first_token, end_token = narrow(*bounds, 0)
    row_R, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    dim_1, dim_2 = tl.arange(0, DIM_V1), DIM_V1 + tl.arange(0, DIM_V2 if DIM_V2 > 0 else 1)
    if SHARED_OUT:
        begin = begin_of(first, BLOCK_SIZE, WINDOW, CHUNK)
        _, _, shares = share_of(begin, end, 0, num_shares, KEYS, MIN_SHARE)
        if shares > 1:
            slot = tl.program_id(2) * tl.num_programs(1) + group
            at_R = workspace_row(slot, row_R, first_token, end_token, GROUP)
            target = partials + at_R[:, None] * DIM_V
            live = (row_R < end_row)[:, None]
            tl.store(target + dim_1, total_1, mask=live)
            if DIM_V2 > 0:
                tl.store(target + dim_2, total_2, mask=live & (dim_2 < DIM_V))
            store_statistics(statistics, slot, row_R, first_token, end_token, end_row, top, weight, GROUP)
            return
    store_normalised(out, row_R, end_row, group, total_1, top, weight, sinks, dim_1, GROUP, DIM_V, HAS_SINKS)
    if DIM_V2 > 0:
        store_normalised(out, row_R, end_row, group, total_2, top, weight, sinks, dim_2, GROUP, DIM_V, HAS_SINKS)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A block of rows, a tile of keys, and how they run."""

    rows: int
    keys: int
    min_share: int = 1024  # keys, a multiple of `keys`: fewer are not worth a second launch
    num_warps: int
    num_stages: int
    blocks_per_sm: int  # that share a streaming multiprocessor


def tiles(*, dim: int, value_dim: int, element_size: int, arch: int) -> Tiles:
    """From the head sizes, the dtype's size in bytes and the architecture: the widest that compile without spills."""
    if element_size > 2:
        return Tiles(rows=64, keys=32, num_warps=8, num_stages=2, blocks_per_sm=1)
    if max(dim, value_dim) > 192:
        return Tiles(rows=128, keys=32 if arch >= 100 else 64, num_warps=8, num_stages=2, blocks_per_sm=1)
    if max(dim, value_dim) > 128:
        return Tiles(rows=128, keys=64 if arch >= 100 else 128, num_warps=8, num_stages=2, blocks_per_sm=1)
    if arch >= 100:
        return Tiles(rows=128, keys=64, num_warps=8, num_stages=3, blocks_per_sm=1)
    return Tiles(rows=128, keys=64, num_warps=4, num_stages=3, blocks_per_sm=2)


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
    """`kernels.ops.attention.reference`: [T, H, v] in q's dtype; rows that belong to no sequence are left as they are.

    q_THd: tokens may lie apart, heads may not; caches [blocks, s, G, d] and [blocks, s, G, v], contiguous; v may differ from d if
    there are no decodes. `tiling` is `tiles` of the shapes unless given. Caches in fp8 are `attention.attend`'s: such tiles
    leave no registers to convert them.
    """
    if kv_scales_2G is not None:
        scales = {"scale": scale, "kv_scales_2G": kv_scales_2G}
        options = {"window": window, "chunk": chunk, "sinks_H": sinks_H, "out": out}
        return attention.attend(q_THd, k_cache, v_cache, seqs, device, **scales, **options)
    num_tokens, num_heads, dim = q_THd.shape
    num_kv, value_dim = v_cache.shape[2:]
    for name, cache in {"k_cache": k_cache, "v_cache": v_cache}.items():
        assert cache.is_contiguous(), f"{name} strides {cache.stride()}"
    assert num_heads % num_kv == 0, f"{num_heads} heads of queries, {num_kv} of keys"
    out = q_THd.new_empty(num_tokens, num_heads, value_dim) if out is None else out
    assert out.is_contiguous(), f"output strides {out.stride()}"
    options = {"scale": scale, "window": window, "chunk": chunk, "sinks_H": sinks_H}
    attend_decodes(q_THd, k_cache, v_cache, seqs, device, out=out, invariant=False, **options)
    size = q_THd.element_size()
    tiling = tiling or tiles(dim=dim, value_dim=value_dim, element_size=size, arch=device.arch)
    _launch(q_THd, k_cache, v_cache, out, seqs, device, tiling, **options)
    return out


def _launch(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    seqs: AttentionMetadata,
    device: Device,
    tiling: Tiles,
    *,
    scale: float | None,
    window: int,
    chunk: int,
    sinks_H: Tensor | None,
) -> None:
    num_heads, dim = q_THd.shape[1:]
    num_kv, value_dim = v_cache.shape[2:]
    if seqs.max_prefill_tokens == 0:
        return
    span = Span(seqs=seqs, is_decode=False, first=0, end=seqs.max_prefill_tokens, group=num_heads // num_kv)
    _, num_blocks = span.blocks(tiling.rows)
    reach = min([seqs.max_prefill_len, *(limit + tiling.rows for limit in (window, chunk) if limit)])
    places = device.num_sms * tiling.blocks_per_sm
    # Not by `num_blocks`: a captured step's bound of the sequences may be far from what it will have.
    programs = -(-seqs.max_prefill_tokens * span.group // tiling.rows) * num_kv
    shares = num_shares(programs, places, reach // tiling.min_share)
    workspace = span.workspace(out, shares if shares > 1 else 0)
    sizes = _constexprs(span.group, value_dim, k_cache.shape[1], tiling, window, chunk, sinks_H is not None)
    arguments = sinks_H if sinks_H is not None else out, seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens
    (dim_1, dim_2), (value_1, value_2) = _cut(dim), _cut(value_dim)
    _prefill[num_blocks, num_kv, shares](
        q_THd, k_cache, v_cache, out, *workspace, *arguments, seqs.block_table, *span.bounds,
        (dim**-0.5 if scale is None else scale) * LOG2_E.value, q_THd.stride(0), seqs.block_table.stride(0), shares,
        **{**sizes, "DIM": dim}, DIM_1=dim_1, DIM_2=dim_2, DIM_V=value_dim, DIM_V1=value_1, DIM_V2=value_2,
        STRIDE_SLOT=k_cache.stride(1), STRIDE_SLOT_V=v_cache.stride(1), ALIGNED=gcd(tiling.keys, k_cache.shape[1]),
        SHARED_OUT=shares > 1, num_warps=tiling.num_warps, num_stages=tiling.num_stages, **EARLY,
    )  # fmt: skip
    if shares > 1:
        merge_shares[num_blocks, num_kv, tiling.rows // MERGED_ROWS](
            *workspace, out, *arguments, *span.bounds, shares, **sizes, PADDED=triton.next_power_of_2(value_dim),
            MERGED_ROWS=MERGED_ROWS, **EARLY,
        )  # fmt: skip


def _cut(dim: int) -> tuple[int, int]:
    """A head size as the sum of a power of two and of another, as matrix instructions take it, or of 0."""
    first = 1 << (dim.bit_length() - 1)
    return first, triton.next_power_of_2(max(dim - first, 16)) if dim > first else 0


def _constexprs(
    group: int, dim: int, block_size: int, tiling: Tiles, window: int, chunk: int, has_sinks: bool
) -> dict[str, int | bool]:
    sizes = {
        "GROUP": group,
        "DIM": dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": window,
        "CHUNK": chunk,
        "HAS_SINKS": has_sinks,
    }
    return {**sizes, "ROWS": tiling.rows, "KEYS": tiling.keys, "MIN_SHARE": tiling.min_share}


def _case(
    name: str,
    heads: int,
    num_kv: int,
    dim: int,
    arch: int,
    *,
    value_dim: int | None = None,
    window: int = 0,
    chunk: int = 0,
    sinks: bool = False,
    shared_out: bool = False,
) -> Case:
    value_dim, block_size = value_dim or dim, 16
    tiling = tiles(dim=dim, value_dim=value_dim, element_size=2, arch=arch)
    (dim_1, dim_2), (value_1, value_2) = _cut(dim), _cut(value_dim)
    return Case(
        name=f"prefill.{name}{' shared out' if shared_out else ''} sm_{arch}",
        kernel=_prefill,
        args={
            **dict.fromkeys(("q", "k_cache", "v_cache", "out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens", "block_table"), torch.int32),
            **dict.fromkeys(BOUNDS, 64),
            **{"scale": 0.1, "stride_token": (heads + 2 * num_kv) * dim, "table_width": 2048, "num_shares": 4},
        },
        constexprs={
            **_constexprs(heads // num_kv, dim, block_size, tiling, window, chunk, sinks),
            **{"DIM_1": dim_1, "DIM_2": dim_2, "DIM_V": value_dim, "DIM_V1": value_1, "DIM_V2": value_2},
            **{"STRIDE_SLOT": num_kv * dim, "STRIDE_SLOT_V": num_kv * value_dim, "ALIGNED": block_size},
            "SHARED_OUT": shared_out,
        },
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        blocks_per_sm=tiling.blocks_per_sm,
        narrow_copies=True,  # of the block table
        expect={arch: "HGMMA" if arch == 90 else "UTC"},
        options=EARLY,
    )


def cases() -> list[Case]:
    """The shapes of Qwen3-30B-A3B, gpt-oss-120b, Llama, Llama 4, Qwen3-Next, Phi-3, a head of 80 and DeepSeek-V3's prompts."""
    found = []
    for arch in (90, 100):
        found += [
            _case("qwen3", 32, 4, 128, arch),
            _case("qwen3", 32, 4, 128, arch, shared_out=True),
            _case("gpt-oss", 64, 8, 64, arch, sinks=True, shared_out=True),
            _case("gpt-oss window", 64, 8, 64, arch, window=128, sinks=True),
            _case("llama", 32, 8, 128, arch),
            _case("llama4 chunk", 40, 8, 128, arch, chunk=8192, shared_out=True),
            _case("qwen3-next", 16, 2, 256, arch, shared_out=True),
            _case("phi", 32, 8, 96, arch),
            _case("head of 80", 32, 32, 80, arch),
            _case("deepseek expanded", 128, 128, 192, arch, value_dim=128),
            _case("deepseek expanded", 128, 128, 192, arch, value_dim=128, shared_out=True),
        ]
    return found
