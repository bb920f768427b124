"""The schedule of latent attention's splits, worked out on the device: who attends to which, and where the results wait.

The workspace is of slots with room for a token's rows, one a head, and is as large at any length of the sequences. While it
lasts, each split of a token has a slot of its own. Where the batch needs more, slots are shared out by the sequences' lengths,
at least one each, and the first splits of a sequence, as many as are too many, are folded into its first slot one after another.
Folding is what merging does, and both go in ascending order: the bits do not depend on how many are folded.

A unit of work is a block of rows and a slot; the programs stride over the units, so that ragged lengths are balanced. Neighbours
are the row blocks of the same splits, which read the same latents.

T tokens, H heads, C latent size, B sequences, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.select import position_of
from expertwire.kernels.gpu.splits import SPLIT, merge, merge_weights
from expertwire.kernels.ops.attention import AttentionMetadata

_MERGED_ROWS = 8
_MERGE_STAGES = 4
_SEQUENCES = tl.constexpr(256)  # that are looked at together
_PIECE = tl.constexpr(64)  # columns that are folded together
FIELDS = tl.constexpr(8)  # of a unit of work
_UNITS = 256  # that are written together


@triton.jit
def _tokens_of(cu_seqlens_q, sequence, first_token, end_token):
    """Return the first and the end of a sequence's tokens within a launch's."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), first_token), end_token)
    return start, tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence + 1), first_token), end_token)


@triton.jit
def _sequences_from(cu_seqlens_q, seq_lens, start, num_sequences, first_token, end_token, SPLIT_KEYS: tl.constexpr):
    """Return the tokens and the splits of the sequences [start, start + 256), 0 behind the last."""
    sequence = start + tl.arange(0, _SEQUENCES)
    known = sequence < num_sequences
    begin = tl.load(cu_seqlens_q + sequence, mask=known, other=0)
    end = tl.load(cu_seqlens_q + sequence + 1, mask=known, other=0)
    stop = tl.minimum(tl.maximum(end, first_token), end_token)
    tokens = stop - tl.minimum(tl.maximum(begin, first_token), end_token)
    splits = tl.cdiv(tl.load(seq_lens + sequence, mask=known, other=0) - end + stop, SPLIT_KEYS)
    return tokens, tl.where(tokens > 0, splits, 0)


@triton.jit
def _count_splits(cu_seqlens_q, seq_lens, num_sequences, first_token, end_token, SPLIT_KEYS: tl.constexpr):
    """Return the slots that a launch's tokens would take if each of their splits had one."""
    total = tl.zeros([_SEQUENCES], tl.int32)
    for start in range(0, num_sequences, _SEQUENCES):
        tokens, splits = _sequences_from(
            cu_seqlens_q, seq_lens, start, num_sequences, first_token, end_token, SPLIT_KEYS
        )
        total += tokens * splits
    return tl.sum(total, 0)


@triton.jit
def _slots_of(splits, wanted, num_slots, num_tokens):
    """Return the slots of a token with so many splits, where all tokens together want `wanted` and get `num_slots` at most."""
    share = 1 + splits * (num_slots - num_tokens) // tl.maximum(wanted, 1)
    return tl.where(wanted <= num_slots, splits, tl.minimum(splits, share))


@triton.jit
def _count_before(
    cu_seqlens_q,
    seq_lens,
    end_sequence,
    first_token,
    end_token,
    wanted,
    num_slots,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
):
    """Return the slots and the units of work of the sequences before `end_sequence`."""
    slots = tl.zeros([_SEQUENCES], tl.int32)
    units = tl.zeros([_SEQUENCES], tl.int32)
    for start in range(0, end_sequence, _SEQUENCES):
        tokens, splits = _sequences_from(
            cu_seqlens_q, seq_lens, start, end_sequence, first_token, end_token, SPLIT_KEYS
        )
        slots_each = _slots_of(splits, wanted, num_slots, end_token - first_token)
        slots += tokens * slots_each
        units += tl.cdiv(tokens * H, ROWS) * slots_each
    return tl.sum(slots, 0), tl.sum(units, 0)


@triton.jit(do_not_specialize=["num_sequences", "first_token", "end_token", "num_slots"])
def plan_units(
    units,
    slots,
    cu_seqlens_q,
    seq_lens,
    num_sequences,
    first_token,
    end_token,
    num_slots,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Grid (B,), or (T,) where each token has a list of TOP_K positions: `units` and `slots` of `Workspace`."""
    wait_for_previous()
    num_tokens = end_token - first_token
    if TOP_K > 0:
        start = first_token + tl.program_id(0)
        stop = start + 1
        sequence, position = position_of(cu_seqlens_q, seq_lens, start, num_sequences)
        length, to_position = tl.minimum(position + 1, TOP_K), -start
        splits: tl.constexpr = (TOP_K + SPLIT_KEYS - 1) // SPLIT_KEYS
        slots_each: tl.constexpr = splits
        blocks: tl.constexpr = (H + ROWS - 1) // ROWS
        slots_before = tl.program_id(0) * slots_each
        units_before = slots_before * blocks
    else:
        sequence = tl.program_id(0)
        wanted = _count_splits(cu_seqlens_q, seq_lens, num_sequences, first_token, end_token, SPLIT_KEYS)
        slots_before, units_before = _count_before(
            cu_seqlens_q, seq_lens, sequence, first_token, end_token, wanted, num_slots, H, ROWS, SPLIT_KEYS
        )
        start, stop = _tokens_of(cu_seqlens_q, sequence, first_token, end_token)
        to_position = tl.load(seq_lens + sequence) - tl.load(cu_seqlens_q + sequence + 1)
        length = to_position + stop
        splits = tl.where(start < stop, tl.cdiv(length, SPLIT_KEYS), 0)
        slots_each = _slots_of(splits, wanted, num_slots, num_tokens)
        blocks = tl.maximum(tl.cdiv((stop - start) * H, ROWS), 1)
        tl.store(slots + 2 * sequence, slots_before)
        tl.store(slots + 2 * sequence + 1, slots_each)
    folded = splits - slots_each + 1
    num_units = blocks * slots_each
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(units, units_before + num_units)
    for i in range(0, num_units, UNITS):
        unit = i + tl.arange(0, UNITS)
        slot = unit // blocks
        first_row = start * H + unit % blocks * ROWS
        end_row = tl.minimum(first_row + ROWS, stop * H)
        end = length if TOP_K > 0 else to_position + (end_row - 1) // H + 1
        target, mask = units + (1 + units_before + unit) * FIELDS, unit < num_units
        tl.store(target, first_row, mask=mask)
        tl.store(target + 1, end_row, mask=mask)
        tl.store(target + 2, (slots_before + slot * (stop - start) - start) * H, mask=mask)
        tl.store(target + 3, tl.where(slot == 0, 0, slot + folded - 1), mask=mask)
        tl.store(target + 4, tl.minimum(slot + folded, tl.cdiv(end, SPLIT_KEYS)), mask=mask)
        tl.store(target + 5, end, mask=mask)
        tl.store(target + 6, tl.zeros([UNITS], tl.int32) + sequence, mask=mask)
        tl.store(target + 7, tl.zeros([UNITS], tl.int32) + to_position, mask=mask)


@triton.jit
def fold(partials, statistics_R, from_R, into_R, live_R, top_1, weight_1, RANK: tl.constexpr, COLUMNS: tl.constexpr):
    """Merge rows of a split into those of the splits before it, both in the workspace.

    Column by column: the values of whole rows do not fit the registers twice.
    """
    tl.debug_barrier()  # what other threads have stored
    top = tl.load(statistics_R, mask=live_R, other=float("-inf"))
    weight = tl.load(statistics_R + 1, mask=live_R, other=0.0)
    top, weight, old, new = merge_weights(top, weight, top_1, weight_1)
    for start in range(0, COLUMNS, _PIECE):
        column = start + tl.arange(0, _PIECE)
        mask = live_R[:, None] & (column < COLUMNS)
        into = partials + into_R[:, None] * RANK + column
        total_1 = tl.load(partials + from_R[:, None] * RANK + column, mask=mask, other=0.0)
        total = tl.load(into, mask=mask, other=0.0)
        tl.store(into, tl.fma(total, old[:, None], total_1 * new[:, None]), mask=mask)
    tl.debug_barrier()  # all have read what is written now and by the next split
    tl.store(statistics_R, top, mask=live_R)
    tl.store(statistics_R + 1, weight, mask=live_R)


@triton.jit(do_not_specialize=["num_sequences", "first_token", "end_token"])
def merge_slots(
    partials,
    statistics,
    slots,
    out,
    cu_seqlens_q,
    seq_lens,
    num_sequences,
    first_token,
    end_token,
    H: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (T, blocks of H): the slots of each token, in order, into out [T, H, C], divided by the weights' sums."""
    wait_for_previous()
    token = first_token + tl.program_id(0)
    sequence, position = position_of(cu_seqlens_q, seq_lens, token, num_sequences)
    if position < 0:
        return
    if TOP_K > 0:
        keys = tl.minimum(position + 1, TOP_K)
        at, stride, folded = (token - first_token) * ((TOP_K + SPLIT_KEYS - 1) // SPLIT_KEYS), 1, 1
    else:
        keys = position + 1
        start, stop = _tokens_of(cu_seqlens_q, sequence, first_token, end_token)
        folded = tl.cdiv(position + stop - token, SPLIT_KEYS) - tl.load(slots + 2 * sequence + 1) + 1
        at, stride = tl.load(slots + 2 * sequence) + token - start, stop - start
    splits = tl.cdiv(keys, SPLIT_KEYS)
    head, latent = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    live = head < H
    total = tl.zeros([ROWS, RANK], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for slot in tl.range(0, tl.maximum(splits - folded, 0) + 1, num_stages=STAGES, disable_licm=True):
        row = (at + slot * stride) * H + head
        total_1 = tl.load(partials + row[:, None] * RANK + latent, mask=live[:, None], other=0.0)
        top_1 = tl.load(statistics + row * 2, mask=live, other=float("-inf"))
        weight_1 = tl.load(statistics + row * 2 + 1, mask=live, other=0.0)
        total, top, weight = merge(total, top, weight, total_1, top_1, weight_1)
    value = total * tl.div_rn(1.0, weight)[:, None]
    row = (token * H + head).to(tl.int64)
    tl.store(out + row[:, None] * RANK + latent, value.to(out.dtype.element_ty), mask=live[:, None])


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """All undefined at first.

    num_programs: that attend. values: fp32 [num_slots * H, C], unnormalised sums; behind them R rows of each program, for a split
    that is to be folded. statistics: fp32 [parts, num_slots * H, 2], maxima and weights, of each part of the values' columns.
    slots: i32 [B, 2], a sequence's first slot and the number of slots of each of its tokens; they are ordered by number, then by
    token. units: i32 [1 + units, 8], how many there are, and of each its first row and the end of its rows, what to add to a row
    for its place in `values`, its first split and the end of its splits, the end of its keys, its sequence, and what to add to a
    token for its position.
    """

    num_slots: int
    num_programs: int
    values: Tensor
    statistics: Tensor
    slots: Tensor
    units: Tensor


def allocate(
    out_THC: Tensor, seqs: AttentionMetadata, num_slots: int, num_programs: int, *, rows: int, parts: int
) -> Workspace:
    """Return a workspace for units of so many rows."""
    num_heads, rank = out_THC.shape[1:]
    num_rows, num_units = num_slots * num_heads, num_slots * triton.cdiv(num_heads, rows)
    values = out_THC.new_empty(num_rows + num_programs * rows, rank, dtype=torch.float32)
    assert values.numel() < 1 << 31, f"{tuple(values.shape)} values: offsets are i32"
    return Workspace(
        num_slots=num_slots,
        num_programs=num_programs,
        values=values,
        statistics=out_THC.new_empty(parts, num_rows, 2, dtype=torch.float32),
        slots=out_THC.new_empty(seqs.num_sequences, 2, dtype=torch.int32),
        units=out_THC.new_empty(1 + num_units, FIELDS.value, dtype=torch.int32),
    )


def plan(
    workspace: Workspace,
    num_heads: int,
    seqs: AttentionMetadata,
    tokens: tuple[int, int],
    *,
    rows: int,
    split: int,
    top_k: int,
) -> None:
    """Give the splits of the tokens [first, end) their slots: at least one for each token."""
    assert (tokens[1] - tokens[0]) * (triton.cdiv(top_k, split) or 1) <= workspace.num_slots, (
        f"tokens {tokens} in {workspace.num_slots} slots"
    )
    plan_units[tokens[1] - tokens[0] if top_k else seqs.num_sequences,](
        workspace.units, workspace.slots, seqs.cu_seqlens_q, seqs.seq_lens, seqs.num_sequences, *tokens,
        workspace.num_slots, **_plan_constexprs(num_heads, rows, split, top_k), **EARLY,
    )  # fmt: skip


def merge_workspace(
    workspace: Workspace,
    out_THC: Tensor,
    seqs: AttentionMetadata,
    tokens: tuple[int, int],
    *,
    split: int,
    top_k: int,
) -> None:
    """Merge the slots into the rows of the tokens [first, end) that belong to sequences."""
    num_heads, rank = out_THC.shape[1:]
    merge_slots[tokens[1] - tokens[0], triton.cdiv(num_heads, _MERGED_ROWS)](
        workspace.values, workspace.statistics, workspace.slots, out_THC, seqs.cu_seqlens_q, seqs.seq_lens,
        seqs.num_sequences, *tokens, **_constexprs(num_heads, rank, split, top_k), **EARLY,
    )  # fmt: skip


def _plan_constexprs(num_heads: int, rows: int, split: int, top_k: int) -> dict[str, int]:
    return {"H": num_heads, "ROWS": rows, "SPLIT_KEYS": split, "TOP_K": top_k, "UNITS": _UNITS}


def _constexprs(num_heads: int, rank: int, split: int, top_k: int) -> dict[str, int]:
    sizes = {"H": num_heads, "RANK": rank, "SPLIT_KEYS": split, "TOP_K": top_k}
    return {**sizes, "ROWS": _MERGED_ROWS, "STAGES": _MERGE_STAGES}


def cases() -> list[Case]:
    """DeepSeek-V3, V3.2 and V2-Lite."""
    bounds = {"num_sequences": 64, "first_token": 0, "end_token": 64}
    plans = [
        Case(
            name=f"mla_splits.plan{f' chosen {top_k}' if top_k else ''}",
            kernel=plan_units,
            args={
                **dict.fromkeys(("units", "slots", "cu_seqlens_q", "seq_lens"), torch.int32),
                **bounds,
                "num_slots": 2048,
            },
            constexprs=_plan_constexprs(128, 64, SPLIT, top_k),
            wide=False,  # numbers
            expect={90: "", 100: ""},
            options=EARLY,
        )
        for top_k in (0, 2048)
    ]
    return plans + [
        Case(
            name=f"mla_splits.merge {num_heads}x512{f' chosen {top_k}' if top_k else ''}",
            kernel=merge_slots,
            args={
                **dict.fromkeys(("partials", "statistics"), torch.float32),
                **{"out": torch.bfloat16, **dict.fromkeys(("slots", "cu_seqlens_q", "seq_lens"), torch.int32)},
                **bounds,
            },
            constexprs=_constexprs(num_heads, 512, SPLIT, top_k),
            blocks_per_sm=2,
            wide=False,  # the statistics are a number a row
            expect={90: "", 100: ""},
            options=EARLY,
        )
        for num_heads, top_k in ((128, 0), (128, 2048), (16, 0))
    ]
