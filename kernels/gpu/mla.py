"""Multi-head latent attention in Triton, absorbed for decode and prefill alike; see `kernels.mla` for the mathematics.

As `attention`: blocks of 64 rows, (query, head) pairs of one sequence, tiles of keys and splits at absolute positions,
partial results merged in order by a second kernel. Two things differ. The tile of latents is read once and serves as keys and
as values. And the sums of 64 rows, 64 x 512 fp32 numbers, fill half of the register file, so there is no room for the total
of the earlier splits beside them: every split goes through the workspace, in prefill too, in launches of as many tokens as
the workspace takes (4 KB written and read for a row and a split, where a split's products take 2.2 MFLOP a row).

With 128 heads a token's latents meet 128 rows: 240 FLOP a byte, so decode is nearly compute bound, the rows are full, and
padding is a matter of models with few heads only.

T tokens, H heads, C latent size, r rotated size, l = C + r; R rows, N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.attention import DeviceSequences, owners
from expertwire.kernels.gpu.attention import rows_of_keys, soften
from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.rotate_and_store import rotate_pairs
from expertwire.kernels.gpu.splits import (
    LOG2_E,
    SPLIT,
    Span,
    find,
    max_splits,
    merge_workspace,
    num_shares,
    rows_of,
    store_statistics,
    workspace_row,
)

WORKSPACE_ROWS = 1 << 18  # of partial results: 0.5 GB with 512 latent numbers
HEADS = 8


@triton.jit(do_not_specialize=["first_sequence", "end_sequence", "first_token", "end_token", "table_width"])
def _attend_latent(
    q,
    cache,
    partials,
    statistics,
    cu_queries,
    lengths,
    block_table,
    first_sequence,
    end_sequence,
    first_token,
    end_token,
    scale,
    stride_token,
    stride_head,
    stride_block,
    table_width,
    STRIDE_SLOT: tl.constexpr,
    H: tl.constexpr,
    RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (row blocks, programs that share out a row block's splits, PARTS).

    The sums lie in two halves, so that not all of them are in motion when they are written; with two PARTS each is a program's.
    """
    wait_for_previous()
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, block = find(
        cu_queries, block, first_sequence, end_sequence, first_token, end_token, H, ROWS, BLOCKS_EACH
    )
    row_R, end_row, to_position, _, end = rows_of(cu_queries, lengths, sequence, block, first_token, end_token, H, ROWS)
    if end == 0:
        return
    part = tl.program_id(2)
    HALF: tl.constexpr = RANK // 2
    latent, rotated = tl.arange(0, HALF), RANK + tl.arange(0, ROTATED)
    live_R, position_R = row_R < end_row, row_R // H + to_position
    query = q + ((row_R // H).to(tl.int64) * stride_token + row_R % H * stride_head)[:, None]
    q_Rr = tl.load(query + rotated, mask=live_R[:, None], other=0.0)
    q1_RC = tl.load(query + latent, mask=live_R[:, None], other=0.0)
    q2_RC = tl.load(query + HALF + latent, mask=live_R[:, None], other=0.0)
    table = block_table + sequence.to(tl.int64) * table_width
    # What only the end of a split needs must not lie in registers all the time: it is not hoisted, and the rows are worked out
    # again.
    for split in tl.range(tl.program_id(1), tl.cdiv(end, SPLIT_KEYS), tl.num_programs(1), disable_licm=True):
        stop = tl.minimum(end, (split + 1) * SPLIT_KEYS)
        total_1 = tl.zeros([ROWS, HALF], tl.float32)
        total_2 = tl.zeros([ROWS, HALF], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        for tile in range(split * SPLIT_KEYS, stop, KEYS):
            key, known, offset = rows_of_keys(table, tile, stop, stride_block, STRIDE_SLOT, KEYS, BLOCK_SIZE)
            row = cache + offset[:, None]
            k_Nr = tl.load(row + rotated, mask=known[:, None], other=0.0)
            c1_NC = tl.load(row + latent, mask=known[:, None], other=0.0)
            c2_NC = tl.load(row + HALF + latent, mask=known[:, None], other=0.0)
            scores = tl.dot(q_Rr, tl.trans(k_Nr), input_precision="ieee")
            scores = tl.dot(q1_RC, tl.trans(c1_NC), scores, input_precision="ieee")
            scores = tl.dot(q2_RC, tl.trans(c2_NC), scores, input_precision="ieee")
            visible = key[None, :] <= position_R[:, None]
            p, old, top, weight = soften(top, weight, scores, scale, visible)
            p = p.to(c1_NC.dtype)
            if PARTS == 1:
                total_1 = tl.dot(p, c1_NC, total_1 * old[:, None], input_precision="ieee")
                total_2 = tl.dot(p, c2_NC, total_2 * old[:, None], input_precision="ieee")
            else:
                c_NC = tl.load(row + part * HALF + latent, mask=known[:, None], other=0.0)
                total_1 = tl.dot(p, c_NC, total_1 * old[:, None], input_precision="ieee")
        row_R, end_row, _, _, _ = rows_of(cu_queries, lengths, sequence, block, first_token, end_token, H, ROWS)
        live_R = row_R < end_row
        store_statistics(statistics, split, row_R, first_token, end_token, end_row, top, weight, H)
        at_R = workspace_row(split, row_R, first_token, end_token, H)
        target = partials + at_R[:, None] * RANK + part * HALF + latent
        tl.store(target, total_1, mask=live_R[:, None])
        if PARTS == 1:
            tl.store(target + HALF, total_2, mask=live_R[:, None])


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One for all steps."""

    rows: int
    keys: int
    split: int  # keys, a multiple of `keys`
    parts: int  # programs that share out the latent numbers of the results
    num_warps: int
    num_stages: int


def tiles(*, rank: int, element_size: int, arch: int) -> Tiles:
    """From the shapes, the dtype's size in bytes and the architecture."""
    # Tensor memory, 512 columns, takes half of the sums beside the scores.
    blackwell = arch >= 100
    keys = 32 if blackwell or rank * element_size > 1024 else 64
    parts = 2 if blackwell else 1
    return Tiles(rows=64, keys=keys, split=SPLIT, parts=parts, num_warps=8, num_stages=2)


def attend(
    q_THl: Tensor,
    cache: Tensor,
    seqs: DeviceSequences,
    device: Device,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
    out: Tensor | None = None,
    tiling: Tiles | None = None,
    workspace_rows: int = WORKSPACE_ROWS,
) -> Tensor:
    """`kernels.mla.reference`: [T, H, C] in q's dtype; rows that belong to no sequence are left as they are.

    q_THl: tokens and heads may lie apart. `tiling` is `tiles` of the shapes unless given. With `chosen` positions the cache is
    contiguous.
    """
    num_tokens, num_heads, width = q_THl.shape
    assert cache.shape[2] == width, f"rows of {cache.shape[2]} numbers, queries of {width}"
    assert cache.stride(2) == q_THl.stride(2) == 1, f"strides {cache.stride()} and {q_THl.stride()}"
    assert scale > 0, f"scale {scale}: maxima are taken before it is applied"
    assert seqs.num_single <= num_tokens, f"{seqs.num_single} single queries in {num_tokens} rows"
    for size in (rank, width - rank):
        assert size == triton.next_power_of_2(size) >= 16, f"{rank} latent numbers and {width - rank} rotated ones"
    out = q_THl.new_empty(num_tokens, num_heads, rank) if out is None else out
    assert out.is_contiguous(), f"output strides {out.stride()}"
    tiling = tiling or tiles(rank=rank, element_size=q_THl.element_size(), arch=device.arch)
    if chosen is not None:
        cache, seqs = _chosen_sequences(chosen, cache, seqs)
    num_splits = max_splits(seqs.max_length, tiling.split)
    tokens = max(1, workspace_rows // (num_heads * num_splits))
    for first in range(0, seqs.num_single, tokens):
        some = first, min(first + tokens, seqs.num_single)
        span = Span(seqs=seqs, sequences=some, tokens=some, group=num_heads)
        _launch(q_THl, cache, out, span, device, tiling, scale, num_splits)
    if seqs.num_sequences > seqs.num_single:
        sequences = seqs.num_single, seqs.num_sequences
        for first in range(seqs.num_single, num_tokens, tokens):
            some = first, min(first + tokens, num_tokens)
            span = Span(seqs=seqs, sequences=sequences, tokens=some, group=num_heads)
            _launch(q_THl, cache, out, span, device, tiling, scale, num_splits)
    return out


def _chosen_sequences(chosen_Tk: Tensor, cache: Tensor, seqs: DeviceSequences) -> tuple[Tensor, DeviceSequences]:
    """The cache in blocks of one token, and each query as a sequence of the positions that it chose, in their order."""
    block_size, width = cache.shape[1:]
    sequence_T, last_T = owners(seqs, len(chosen_Tk))
    none_Tk = (chosen_Tk < 0) | (last_T < 0)[:, None]
    positions_Tk = torch.where(none_Tk, seqs.max_length - 1, chosen_Tk).sort(1).values[:, : seqs.max_length]
    slots_Tk = seqs.block_table[sequence_T].gather(1, positions_Tk // block_size) * block_size
    each = DeviceSequences(
        num_single=len(chosen_Tk),
        max_length=positions_Tk.shape[1],
        cu_queries=torch.arange(len(chosen_Tk) + 1, dtype=torch.int32, device=cache.device),
        lengths=(~none_Tk).sum(1, dtype=torch.int32),
        block_table=(slots_Tk + positions_Tk % block_size).int(),
    )
    return cache.view(-1, 1, width), each


def _launch(
    q_THl: Tensor,
    cache: Tensor,
    out: Tensor,
    span: Span,
    device: Device,
    tiling: Tiles,
    scale: float,
    num_splits: int,
) -> None:
    num_heads, rank = out.shape[1:]
    seqs = span.seqs
    each, num_blocks = span.blocks(tiling.rows)
    workspace = span.workspace(out, num_splits)
    _attend_latent[num_blocks, num_shares(device, num_blocks, num_splits), tiling.parts](
        q_THl, cache, *workspace, seqs.cu_queries, seqs.lengths, seqs.block_table, *span.bounds,
        scale * LOG2_E.value, q_THl.stride(0), q_THl.stride(1), cache.stride(0), seqs.block_table.stride(0),
        STRIDE_SLOT=cache.stride(1), H=num_heads, RANK=rank, ROTATED=q_THl.shape[2] - rank, BLOCK_SIZE=cache.shape[1],
        ROWS=tiling.rows, KEYS=tiling.keys, SPLIT_KEYS=tiling.split, BLOCKS_EACH=each, PARTS=tiling.parts,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **EARLY,
    )  # fmt: skip
    merge_workspace(workspace, out, span, num_splits, split=tiling.split)


@triton.jit
def _rotate_and_store(
    q,
    kv,
    norm,
    cos_table,
    sin_table,
    positions,
    slots,
    q_out,
    cache,
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
    """Grid (T, 1 + tiles of heads): the cache's row first, which is taken for a tile with one head, then the queries."""
    wait_for_previous()
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(positions + token).to(tl.int64), tl.load(slots + token).to(tl.int64)
    at = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * stride_slot
    head = tl.arange(0, HEADS)
    if tile == 0:
        latent = tl.arange(0, RANK)
        x = tl.load(kv + token * stride_kv + latent).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 0) / RANK + eps) * tl.load(norm + latent).to(tl.float32)
        tl.store(cache + at + latent, x.to(cache.dtype.element_ty), mask=slot >= 0)
        source, target = kv + token * stride_kv + RANK + head * 0, cache + at + RANK + head * 0
        live, stored = head < 1, (head < 1) & (slot >= 0)
    else:
        head += (tile - 1) * HEADS
        source = q + token * stride_token + head * stride_head
        target = q_out + token * stride_out_token + head * stride_out_head
        live, stored = head < H, head < H
    pair = tl.arange(0, PAIRS)
    if INTERLEAVED:
        both = tl.arange(0, 2 * PAIRS)
        x = tl.load(source[:, None] + both, mask=live[:, None], other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [HEADS, PAIRS, 2]))
    else:
        first = tl.load(source[:, None] + pair, mask=live[:, None], other=0.0).to(tl.float32)
        second = tl.load(source[:, None] + PAIRS + pair, mask=live[:, None], other=0.0).to(tl.float32)
    first, second = rotate_pairs(first, second, cos_table, sin_table, position, pair, PAIRS)
    if INTERLEAVED:
        x = tl.reshape(tl.join(first, second), [HEADS, 2 * PAIRS])
        tl.store(target[:, None] + both, x.to(target.dtype.element_ty), mask=stored[:, None])
    else:
        tl.store(target[:, None] + pair, first.to(target.dtype.element_ty), mask=stored[:, None])
        tl.store(target[:, None] + PAIRS + pair, second.to(target.dtype.element_ty), mask=stored[:, None])


def rotate_and_store(
    q_THr: Tensor,
    kv_Tl: Tensor,
    norm_C: Tensor,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    cache: Tensor,
    *,
    interleaved: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """`kernels.mla.rotate_and_store`; a token with a negative slot is not stored.

    q_THr, out: tokens and heads may lie apart, as parts of longer rows do; out may be q_THr itself.
    """
    num_tokens, num_heads, rotated = q_THr.shape
    rank = norm_C.shape[0]
    out = torch.empty(q_THr.shape, dtype=q_THr.dtype, device=q_THr.device) if out is None else out
    assert kv_Tl.shape == (num_tokens, rank + rotated), f"{tuple(kv_Tl.shape)}, not {(num_tokens, rank + rotated)}"
    assert cache.shape[2] == rank + rotated, f"rows of {cache.shape[2]} numbers, not {rank + rotated}"
    assert tables[0].shape[1] == rotated, f"tables for {tables[0].shape[1]} dimensions, not {rotated}"
    assert out.shape == q_THr.shape, f"output {tuple(out.shape)}, not {tuple(q_THr.shape)}"
    for name, tensor in {"q": q_THr, "kv": kv_Tl, "norm": norm_C, "cache": cache, "out": out}.items():
        assert tensor.stride(-1) == 1, f"{name}: strides {tensor.stride()}"
    for size in (rank, rotated // 2):
        assert size == triton.next_power_of_2(size), f"{rank} latent numbers and {rotated} rotated ones"
    if num_tokens:
        _rotate_and_store[num_tokens, 1 + triton.cdiv(num_heads, HEADS)](
            q_THr, kv_Tl, norm_C, *tables, positions_T, slot_mapping_T, out, cache,
            eps, q_THr.stride(0), q_THr.stride(1), kv_Tl.stride(0), out.stride(0), out.stride(1),
            cache.stride(0), cache.stride(1),
            H=num_heads, RANK=rank, PAIRS=rotated // 2, BLOCK_SIZE=cache.shape[1], INTERLEAVED=interleaved, HEADS=HEADS,
            num_warps=1, **EARLY,
        )  # fmt: skip
    return out


def _case(name: str, heads: int, block_size: int, arch: int, *, single: bool) -> Case:
    rank, rotated = 512, 64
    tiling = tiles(rank=rank, element_size=2, arch=arch)
    width = rank + rotated
    return Case(
        name=f"mla.{name} blocks of {block_size} {'decode' if single else 'prefill'} sm_{arch}",
        kernel=_attend_latent,
        args={
            **dict.fromkeys(("q", "cache"), torch.bfloat16),
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("cu_queries", "lengths", "block_table"), torch.int32),
            **{"first_sequence": 0, "end_sequence": 64, "first_token": 0, "end_token": 64, "scale": 0.1},
            **{"stride_token": heads * width, "stride_head": width, "stride_block": block_size * width},
            "table_width": 2048,
        },
        constexprs={
            **{"STRIDE_SLOT": width, "H": heads, "RANK": rank, "ROTATED": rotated, "BLOCK_SIZE": block_size},
            **{"ROWS": tiling.rows, "KEYS": tiling.keys, "SPLIT_KEYS": tiling.split, "PARTS": tiling.parts},
            "BLOCKS_EACH": -(-heads // tiling.rows) if single else 0,
        },
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        expect={arch: "HGMMA" if arch == 90 else "UTC"},
        options=EARLY,
    )


def _store_case(interleaved: bool) -> Case:
    return Case(
        name=f"mla.rotate_and_store {'interleaved' if interleaved else 'halves'} bf16",
        kernel=_rotate_and_store,
        args={
            **dict.fromkeys(("q", "kv", "norm", "q_out", "cache"), torch.bfloat16),
            **dict.fromkeys(("cos_table", "sin_table"), torch.float32),
            **dict.fromkeys(("positions", "slots"), torch.int64),
            **{"eps": 1e-6, "stride_token": 128 * 192, "stride_head": 192, "stride_kv": 2112},
            **{"stride_out_token": 128 * 576, "stride_out_head": 576, "stride_block": 64 * 576, "stride_slot": 576},
        },
        constexprs={"H": 128, "RANK": 512, "PAIRS": 32, "BLOCK_SIZE": 64, "INTERLEAVED": interleaved, "HEADS": HEADS},
        num_warps=1,
        blocks_per_sm=8,
        expect={90: "", 100: ""},
        options=EARLY,
    )


def cases() -> list[Case]:
    """DeepSeek-V3 (128 heads) and V2-Lite (16)."""
    found = [_store_case(True), _store_case(False)]
    for arch in (90, 100):
        found += [
            _case("deepseek-v3", 128, 64, arch, single=True),
            _case("deepseek-v3", 128, 16, arch, single=True),
            _case("deepseek-v3", 128, 64, arch, single=False),
            _case("deepseek-v2-lite", 16, 64, arch, single=False),
        ]
    return found
