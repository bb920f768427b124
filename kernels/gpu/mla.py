"""Multi-head latent attention in Triton, absorbed for decode and prefill alike; see `kernels.ops.mla` for the mathematics.

As `attention`: blocks of 64 rows, (query, head) pairs of one sequence, tiles of keys and splits at absolute positions, partial
results merged in order by another kernel. Two things differ. The tile of latents is read once and serves as keys and as values.
And the sums of 64 rows, 64 x 512 fp32 numbers, fill half of the register file, so there is no room for the total of the earlier
splits beside them: every split goes through the workspace, in prefill too (4 KB written and read for a row and a split, where a
split's products take 2.2 MFLOP a row). Its slots are given out on the device (`mla_splits`): decodes and prefills share a launch,
of 1,024 (chosen positions) to 2,048 tokens with 128 heads, at any length.

With chosen positions a token is a sequence of its own, of the positions in its list, which the kernel reads.

With 128 heads a token's latents meet 128 rows: 240 FLOP a byte, so decode is nearly compute bound, the rows are full, and
padding is a matter of models with few heads only.

Tiles of a cache in fp8 are converted to the queries' dtype, and its scale counts as in `attention`.

T tokens, H heads, C latent size, r rotated size, l = C + r; R rows, N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.attention import rows_of_keys, soften
from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.mla_splits import FIELDS, Workspace, allocate, fold, merge_workspace, plan
from expertwire.kernels.gpu.rope_and_cache import check_scales, quantized, rotate_pairs
from expertwire.kernels.gpu.splits import LOG2_E, SPLIT
from expertwire.kernels.ops.attention import FP8, AttentionMetadata

WORKSPACE_ROWS = 1 << 18  # of partial results: 0.5 GB with 512 latent numbers
HEADS = 8
_PROGRAMS_PER_SM = 4  # that share out the units of work


@triton.jit
def _latents_at(
    chosen,
    token,
    table,
    tile,
    end,
    stride_block,
    STRIDE_SLOT: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """The keys [N] of a tile, which of them lie before the end, and where those lie in the cache; TOP_K: keys of a list."""
    if TOP_K == 0:
        return rows_of_keys(table, tile, end, stride_block, STRIDE_SLOT, KEYS, BLOCK_SIZE)
    else:
        key = tile + tl.arange(0, KEYS)
        known = key < end
        position = tl.load(chosen + token * TOP_K + key, mask=known, other=0).to(tl.int32)
        block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        return key, known, block * stride_block + position % BLOCK_SIZE * STRIDE_SLOT


@triton.jit
def _attend_split(
    q_Rr,
    q1_RC,
    q2_RC,
    position_R,
    cache,
    kv_scale,
    chosen,
    table,
    partials,
    statistics,
    unit,
    split,
    num_rows,
    scale,
    stride_block,
    STRIDE_SLOT: tl.constexpr,
    H: tl.constexpr,
    RANK: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One split of a unit of work, into its slot. What only the end needs is read again there, for want of registers."""
    part = tl.program_id(1)
    HALF: tl.constexpr = RANK // 2
    latent, rotated = tl.arange(0, HALF), RANK + tl.arange(0, ROTATED)
    token = tl.load(unit) // H  # whose list it is
    stop = tl.minimum(tl.load(unit + 5), (split + 1) * SPLIT_KEYS)
    total_1 = tl.zeros([ROWS, HALF], tl.float32)
    total_2 = tl.zeros([ROWS, HALF], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for tile in tl.range(split * SPLIT_KEYS, stop, KEYS, disable_licm=True):
        key, known, offset = _latents_at(
            chosen, token, table, tile, stop, stride_block, STRIDE_SLOT, KEYS, BLOCK_SIZE, TOP_K
        )
        row = cache + offset[:, None]
        k_Nr = tl.load(row + rotated, mask=known[:, None], other=0.0).to(q_Rr.dtype)
        c1_NC = tl.load(row + latent, mask=known[:, None], other=0.0).to(q_Rr.dtype)
        c2_NC = tl.load(row + HALF + latent, mask=known[:, None], other=0.0).to(q_Rr.dtype)
        scores = tl.dot(q_Rr, tl.trans(k_Nr), input_precision="ieee")
        scores = tl.dot(q1_RC, tl.trans(c1_NC), scores, input_precision="ieee")
        scores = tl.dot(q2_RC, tl.trans(c2_NC), scores, input_precision="ieee")
        visible = known[None, :] if TOP_K > 0 else key[None, :] <= position_R[:, None]
        p, old, top, weight = soften(top, weight, scores, scale, visible)
        p = p.to(c1_NC.dtype)
        if PARTS == 1:
            total_1 = tl.dot(p, c1_NC, total_1 * old[:, None], input_precision="ieee")
            total_2 = tl.dot(p, c2_NC, total_2 * old[:, None], input_precision="ieee")
        else:
            c_NC = tl.load(row + part * HALF + latent, mask=known[:, None], other=0.0).to(q_Rr.dtype)
            total_1 = tl.dot(p, c_NC, total_1 * old[:, None], input_precision="ieee")
    if kv_scale is not None:
        total_1, total_2 = total_1 * tl.load(kv_scale), total_2 * tl.load(kv_scale)
    first_row, place = tl.load(unit), tl.load(unit + 2)
    row_R = first_row + tl.arange(0, ROWS)
    live_R = row_R < tl.load(unit + 1)
    at, folds = place, False
    if TOP_K == 0:
        folds = split > tl.load(unit + 3)
        at += folds.to(tl.int32) * (num_rows + tl.program_id(0) * ROWS - first_row - place)
    target = partials + at * RANK + row_R[:, None] * RANK + part * HALF + latent
    tl.store(target, total_1, mask=live_R[:, None])
    if PARTS == 1:
        tl.store(target + HALF, total_2, mask=live_R[:, None])
    notes = statistics + (part * num_rows + place + row_R) * 2
    if folds:
        values = partials + part * HALF
        fold(values, notes, at + row_R, place + row_R, live_R, top, weight, RANK, RANK // PARTS)
    else:
        tl.store(notes, top, mask=live_R)
        tl.store(notes + 1, weight, mask=live_R)


@triton.jit(do_not_specialize=["num_rows", "table_width"])
def _attend_latent(
    q,
    cache,
    kv_scale,
    chosen,
    partials,
    statistics,
    units,
    block_table,
    num_rows,
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
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (programs that share out the units of work, PARTS).

    The sums lie in two halves, so that not all of them are in motion when they are written; with two PARTS each is a program's.
    TOP_K: positions in a token's list, 0 if it sees all.
    """
    wait_for_previous()
    HALF: tl.constexpr = RANK // 2
    latent, rotated = tl.arange(0, HALF), RANK + tl.arange(0, ROTATED)
    if kv_scale is not None:
        scale *= tl.load(kv_scale)
    # What only the end of a split needs must not lie in registers all the time: it is not hoisted, and read again.
    for i in tl.range(tl.program_id(0), tl.load(units), tl.num_programs(0), disable_licm=True):
        unit = units + (i + 1) * FIELDS
        row_R = tl.load(unit) + tl.arange(0, ROWS)
        live_R, position_R = row_R < tl.load(unit + 1), row_R // H + tl.load(unit + 7)
        query = q + ((row_R // H).to(tl.int64) * stride_token + row_R % H * stride_head)[:, None]
        q_Rr = tl.load(query + rotated, mask=live_R[:, None], other=0.0)
        q1_RC = tl.load(query + latent, mask=live_R[:, None], other=0.0)
        q2_RC = tl.load(query + HALF + latent, mask=live_R[:, None], other=0.0)
        table = block_table + tl.load(unit + 6).to(tl.int64) * table_width
        if TOP_K == 0:
            for split in tl.range(tl.load(unit + 3), tl.load(unit + 4), disable_licm=True):
                _attend_split(
                    q_Rr, q1_RC, q2_RC, position_R, cache, kv_scale, chosen, table, partials, statistics, unit, split,
                    num_rows, scale, stride_block, STRIDE_SLOT, H, RANK, ROTATED, BLOCK_SIZE, ROWS, KEYS,
                    SPLIT_KEYS, TOP_K, PARTS
                )  # fmt: skip
        else:  # a slot for each split of a list
            split = tl.load(unit + 3)
            if split < tl.load(unit + 4):
                _attend_split(
                    q_Rr, q1_RC, q2_RC, position_R, cache, kv_scale, chosen, table, partials, statistics, unit, split,
                    num_rows, scale, stride_block, STRIDE_SLOT, H, RANK, ROTATED, BLOCK_SIZE, ROWS, KEYS,
                    SPLIT_KEYS, TOP_K, PARTS
                )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """One for all steps."""

    rows: int
    keys: int
    split: int  # keys, a multiple of `keys`
    parts: int  # programs that share out the latent numbers of the results
    num_warps: int
    num_stages: int


def tiles(*, rank: int, element_size: int, arch: int, fp8: bool = False) -> Tiles:
    """From the shapes, the size of the queries' dtype in bytes, the architecture, and whether the cache is fp8."""
    # Tensor memory, 512 columns, takes half of the sums beside the scores; so do registers beside a tile that is converted.
    blackwell = arch >= 100
    keys = 32 if blackwell or rank * element_size > 1024 else 64
    parts = 2 if blackwell or fp8 else 1
    return Tiles(rows=64, keys=keys, split=SPLIT, parts=parts, num_warps=8, num_stages=2)


def attend(
    q_THl: Tensor,
    cache: Tensor,
    seqs: AttentionMetadata,
    device: Device,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
    tiling: Tiles | None = None,
    workspace_rows: int = WORKSPACE_ROWS,
) -> Tensor:
    """`kernels.ops.mla.reference`: [T, H, C] in q's dtype; rows that belong to no sequence are left as they are.

    q_THl: tokens and heads may lie apart. chosen: ascending, all that the token sees where those are no more than k; contiguous.
    `tiling` is `tiles` of the shapes unless given. Three launches (plan, attend, merge) for as many tokens as `workspace_rows`
    have a slot for, however long the sequences are.
    """
    num_tokens, num_heads, width = q_THl.shape
    assert cache.shape[2] == width, f"rows of {cache.shape[2]} numbers, queries of {width}"
    assert cache.stride(2) == q_THl.stride(2) == 1, f"strides {cache.stride()} and {q_THl.stride()}"
    assert scale > 0, f"scale {scale}: maxima are taken before it is applied"
    check_scales(kv_scale, cache, 1)
    assert seqs.max_decodes <= num_tokens, f"{seqs.max_decodes} decodes in {num_tokens} rows"
    for size in (rank, width - rank):
        assert size == triton.next_power_of_2(size) >= 16, f"{rank} latent numbers and {width - rank} rotated ones"
    out = q_THl.new_empty(num_tokens, num_heads, rank) if out is None else out
    assert out.is_contiguous(), f"output strides {out.stride()}"
    fp8 = cache.dtype == FP8
    tiling = tiling or tiles(rank=rank, element_size=q_THl.element_size(), arch=device.arch, fp8=fp8)
    top_k = 0
    if chosen is not None:
        top_k = chosen.shape[1]
        assert chosen.shape == (num_tokens, top_k), f"lists {tuple(chosen.shape)} of {num_tokens} tokens"
        assert chosen.is_contiguous(), f"lists with strides {chosen.stride()}"
    # A token has a slot for each split of its list, or one at least, however long its sequence is.
    splits = triton.cdiv(top_k or seqs.max_seq_len, tiling.split)
    least = splits if top_k else 1
    num_slots = max(least, min(workspace_rows // num_heads, num_tokens * splits))
    step = num_slots // least
    num_programs = min(_PROGRAMS_PER_SM * device.num_sms, num_slots * triton.cdiv(num_heads, tiling.rows))
    workspace = allocate(out, seqs, num_slots, num_programs, rows=tiling.rows, parts=tiling.parts)
    for first in range(0, num_tokens, step):
        tokens = first, min(first + step, num_tokens)
        plan(workspace, num_heads, seqs, tokens, rows=tiling.rows, split=tiling.split, top_k=top_k)
        _launch(q_THl, cache, kv_scale, chosen, workspace, seqs, device, tiling, scale)
        merge_workspace(workspace, out, seqs, tokens, split=tiling.split, top_k=top_k)
    return out


def _options(arch: int) -> dict[str, int | bool]:
    """As in `linear`, ptxas for Blackwell otherwise spills a few registers; for Hopper, with Triton 3.6.0, it does so with it."""
    return {"maxnreg": 255, **EARLY} if arch >= 100 else EARLY


def _launch(
    q_THl: Tensor,
    cache: Tensor,
    kv_scale: Tensor | None,
    chosen: Tensor | None,
    workspace: Workspace,
    seqs: AttentionMetadata,
    device: Device,
    tiling: Tiles,
    scale: float,
) -> None:
    num_heads, rank = q_THl.shape[1], workspace.values.shape[1]
    _attend_latent[workspace.num_programs, tiling.parts](
        q_THl, cache, kv_scale, chosen, workspace.values, workspace.statistics, workspace.units, seqs.block_table,
        workspace.num_slots * num_heads,
        scale * LOG2_E.value, q_THl.stride(0), q_THl.stride(1), cache.stride(0), seqs.block_table.stride(0),
        STRIDE_SLOT=cache.stride(1), H=num_heads, RANK=rank, ROTATED=q_THl.shape[2] - rank, BLOCK_SIZE=cache.shape[1],
        ROWS=tiling.rows, KEYS=tiling.keys, SPLIT_KEYS=tiling.split, PARTS=tiling.parts,
        TOP_K=0 if chosen is None else chosen.shape[1],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **_options(device.arch),
    )  # fmt: skip


@triton.jit
def _store_pairs(target, first, second, divisor, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The halves [HEADS, r / 2] of rows, each from its place in `target` on; the divisor is a cache's in fp8."""
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
def _rope_and_cache(
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
    """Grid (T, 1 + tiles of heads): the cache's row first, which is taken for a tile with one head, then the queries."""
    wait_for_previous()
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
    norm_C: Tensor,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    cache: Tensor,
    *,
    interleaved: bool = True,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`kernels.ops.mla.rope_and_cache`; a token with a negative slot is not stored.

    q_THr, out: tokens and heads may lie apart, as parts of longer rows do; out may be q_THr itself.
    """
    num_tokens, num_heads, rotated = q_THr.shape
    rank = norm_C.shape[0]
    out = torch.empty(q_THr.shape, dtype=q_THr.dtype, device=q_THr.device) if out is None else out
    assert kv_Tl.shape == (num_tokens, rank + rotated), f"{tuple(kv_Tl.shape)}, not {(num_tokens, rank + rotated)}"
    assert cache.shape[2] == rank + rotated, f"rows of {cache.shape[2]} numbers, not {rank + rotated}"
    assert tables[0].shape[1] == rotated, f"tables for {tables[0].shape[1]} dimensions, not {rotated}"
    assert out.shape == q_THr.shape, f"output {tuple(out.shape)}, not {tuple(q_THr.shape)}"
    check_scales(kv_scale, cache, 1)
    for name, tensor in {"q": q_THr, "kv": kv_Tl, "norm": norm_C, "cache": cache, "out": out}.items():
        assert tensor.stride(-1) == 1, f"{name}: strides {tensor.stride()}"
    for size in (rank, rotated // 2):
        assert size == triton.next_power_of_2(size), f"{rank} latent numbers and {rotated} rotated ones"
    if num_tokens:
        _rope_and_cache[num_tokens, 1 + triton.cdiv(num_heads, HEADS)](
            q_THr, kv_Tl, norm_C, *tables, positions_T, slot_mapping_T, out, cache, kv_scale,
            eps, q_THr.stride(0), q_THr.stride(1), kv_Tl.stride(0), out.stride(0), out.stride(1),
            cache.stride(0), cache.stride(1),
            H=num_heads, RANK=rank, PAIRS=rotated // 2, BLOCK_SIZE=cache.shape[1], INTERLEAVED=interleaved, HEADS=HEADS,
            num_warps=1, **EARLY,
        )  # fmt: skip
    return out


def _case(name: str, heads: int, block_size: int, arch: int, *, fp8: bool = False, top_k: int = 0) -> Case:
    rank, rotated = 512, 64
    tiling = tiles(rank=rank, element_size=2, arch=arch, fp8=fp8)
    width = rank + rotated
    return Case(
        name=f"mla.{name}{' fp8' * fp8}{' chosen' * (top_k > 0)} blocks of {block_size} sm_{arch}",
        kernel=_attend_latent,
        args={
            **{"q": torch.bfloat16, "cache": FP8 if fp8 else torch.bfloat16},
            **{"kv_scale": torch.float32 if fp8 else None, "chosen": torch.int64 if top_k else None},
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("units", "block_table"), torch.int32),
            **{
                "num_rows": 1 << 18,
                "scale": 0.1,
                "stride_token": heads * width,
                "stride_head": width,
                "stride_block": block_size * width,
            },
            "table_width": 2048,
        },
        constexprs={
            **{"STRIDE_SLOT": width, "H": heads, "RANK": rank, "ROTATED": rotated, "BLOCK_SIZE": block_size},
            **{"ROWS": tiling.rows, "KEYS": tiling.keys, "SPLIT_KEYS": tiling.split, "PARTS": tiling.parts},
            "TOP_K": top_k,
        },
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        expect={arch: "HGMMA" if arch == 90 else "UTC"},
        narrow_copies=(fp8 and tiling.keys == 32) or top_k > 0,  # the rotated numbers of a tile are 2 KB; lists
        options=_options(arch),
    )


def _store_case(interleaved: bool, *, fp8: bool = False) -> Case:
    return Case(
        name=f"mla.rope_and_cache {'interleaved' if interleaved else 'halves'} {'fp8' if fp8 else 'bf16'}",
        kernel=_rope_and_cache,
        args={
            **dict.fromkeys(("q", "kv", "norm", "q_out"), torch.bfloat16),
            **{"cache": FP8 if fp8 else torch.bfloat16, "kv_scale": torch.float32 if fp8 else None},
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
    found = [_store_case(interleaved, fp8=fp8) for fp8 in (False, True) for interleaved in (True, False)]
    for arch in (90, 100):
        found += [
            _case("deepseek-v3", 128, 64, arch),
            _case("deepseek-v3", 128, 16, arch),
            _case("deepseek-v2-lite", 16, 64, arch),
            _case("deepseek-v3", 128, 64, arch, fp8=True),
            _case("deepseek-v3.2", 128, 64, arch, top_k=2048),
            _case("deepseek-v3.2", 128, 64, arch, fp8=True, top_k=2048),
        ]
    return found
