"""Work planning and merging of latent attention's splits, on the device.

The workspace consists of slots with room for one token's rows, one a head, and has the same size
for any sequence length. As long as it suffices, each split of a token has a slot of its own. Where
the batch needs more, slots are assigned in proportion to the sequences' lengths, at least one each,
and as many first splits of a sequence as do not fit are merged into its first slot one after
another. That uses the arithmetic of the final merge, and both go in ascending order: the bits do
not depend on how many splits are merged early.

A work unit is a block of rows and a slot. Programs stride over the units, which balances ragged
lengths. Neighbouring units are the row blocks of the same splits, which read the same latents.

T tokens, H heads, c latent size, S sequences. In the kernels M rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.split_kv import merge, merge_weights
from expertwire.kernels.gpu.top_k_positions import position_of
from expertwire.kernels.ops.attention import AttentionMetadata

_MERGED_ROWS = 8
_MERGE_STAGES = 4
_SEQUENCES = tl.constexpr(256)  # looked at together
_PIECE = tl.constexpr(64)  # columns merged together
FIELDS = tl.constexpr(8)  # of a unit of work
_UNITS = 256  # written together


@triton.jit
def _tokens_of(cu_seqlens_q, sequence, first_token, end_token):
    """Return the first and the end of a sequence's tokens within a launch's."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), first_token), end_token)
    return start, tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence + 1), first_token), end_token)


@triton.jit
def _sequences_from(cu_seqlens_q, seq_lens, start, num_sequences, first_token, end_token, SPLIT_KEYS: tl.constexpr):
    """Return the tokens and the splits of the sequences [start, start + 256), 0 after the last."""
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
    """Return the slots of a token with so many splits.

    All tokens together want `wanted` slots and get at most `num_slots`.
    """
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
    """Return the slots and the work units of the sequences before `end_sequence`."""
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
def plan_kernel(
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
    """Grid (S,), or (T,) where each token has a list of TOP_K positions: write `units` and `slots` of `Workspace`."""
    wait_for_previous_kernel()
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
    merged_early = splits - slots_each + 1
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
        tl.store(target + 3, tl.where(slot == 0, 0, slot + merged_early - 1), mask=mask)
        tl.store(target + 4, tl.minimum(slot + merged_early, tl.cdiv(end, SPLIT_KEYS)), mask=mask)
        tl.store(target + 5, end, mask=mask)
        tl.store(target + 6, tl.zeros([UNITS], tl.int32) + sequence, mask=mask)
        tl.store(target + 7, tl.zeros([UNITS], tl.int32) + to_position, mask=mask)


@triton.jit
def merge_into_slot(
    partials, statistics_M, from_M, into_M, live_M, row_max_1, row_sum_1, RANK: tl.constexpr, COLUMNS: tl.constexpr
):
    """Merge rows of a split into those of the splits before it, both in the workspace.

    Column by column, since the values of whole rows do not fit the registers twice.
    """
    tl.debug_barrier()  # what other threads have stored
    row_max = tl.load(statistics_M, mask=live_M, other=float("-inf"))
    row_sum = tl.load(statistics_M + 1, mask=live_M, other=0.0)
    row_max, row_sum, old, new = merge_weights(row_max, row_sum, row_max_1, row_sum_1)
    for start in range(0, COLUMNS, _PIECE):
        column = start + tl.arange(0, _PIECE)
        mask = live_M[:, None] & (column < COLUMNS)
        into = partials + into_M[:, None] * RANK + column
        acc_1 = tl.load(partials + from_M[:, None] * RANK + column, mask=mask, other=0.0)
        acc = tl.load(into, mask=mask, other=0.0)
        tl.store(into, tl.fma(acc, old[:, None], acc_1 * new[:, None]), mask=mask)
    tl.debug_barrier()  # all have read what is written now and by the next split
    tl.store(statistics_M, row_max, mask=live_M)
    tl.store(statistics_M + 1, row_sum, mask=live_M)


@triton.jit(do_not_specialize=["num_sequences", "first_token", "end_token"])
def merge_kernel(
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
    """Grid (T, blocks of H): merge the slots of each token in order into out [T, H, c], divided by the
    weights' sums.
    """
    wait_for_previous_kernel()
    token = first_token + tl.program_id(0)
    sequence, position = position_of(cu_seqlens_q, seq_lens, token, num_sequences)
    if position < 0:
        return
    if TOP_K > 0:
        keys = tl.minimum(position + 1, TOP_K)
        at, stride, merged_early = (token - first_token) * ((TOP_K + SPLIT_KEYS - 1) // SPLIT_KEYS), 1, 1
    else:
        keys = position + 1
        start, stop = _tokens_of(cu_seqlens_q, sequence, first_token, end_token)
        merged_early = tl.cdiv(position + stop - token, SPLIT_KEYS) - tl.load(slots + 2 * sequence + 1) + 1
        at, stride = tl.load(slots + 2 * sequence) + token - start, stop - start
    splits = tl.cdiv(keys, SPLIT_KEYS)
    head, latent = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK)
    live = head < H
    acc = tl.zeros([ROWS, RANK], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for slot in tl.range(0, tl.maximum(splits - merged_early, 0) + 1, num_stages=STAGES, disable_licm=True):
        row = (at + slot * stride) * H + head
        acc_1 = tl.load(partials + row[:, None] * RANK + latent, mask=live[:, None], other=0.0)
        row_max_1 = tl.load(statistics + row * 2, mask=live, other=float("-inf"))
        row_sum_1 = tl.load(statistics + row * 2 + 1, mask=live, other=0.0)
        acc, row_max, row_sum = merge(acc, row_max, row_sum, acc_1, row_max_1, row_sum_1)
    value = acc * tl.div_rn(1.0, row_sum)[:, None]
    row = (token * H + head).to(tl.int64)
    tl.store(out + row[:, None] * RANK + latent, value.to(out.dtype.element_ty), mask=live[:, None])


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """Memory of the work units and their partial results, undefined at first.

    num_programs: programs of the attention launch.
    values: fp32 [num_slots * H, c], unnormalised sums; after them M rows of each program, for a split that is merged early.
    statistics: fp32 [column_splits, num_slots * H, 2], maxima and weights for each part of the columns.
    slots: i32 [S, 2], a sequence's first slot and the number of slots of each of its tokens, ordered by slot, then by token.
    units: i32 [1 + units, 8], the number of units, and for each its first row, the end of its rows, what to add to a row to get
        its row in `values`, its first split, the end of its splits, the end of its keys, its sequence, and what to add to a token
        to get its position.
    """

    num_slots: int
    num_programs: int
    values: Tensor
    statistics: Tensor
    slots: Tensor
    units: Tensor


def allocate(
    out_THc: Tensor, seqs: AttentionMetadata, num_slots: int, num_programs: int, *, rows: int, column_splits: int
) -> Workspace:
    """Return a workspace for units of so many rows."""
    num_heads, rank = out_THc.shape[1:]
    num_rows, num_units = num_slots * num_heads, num_slots * triton.cdiv(num_heads, rows)
    values = out_THc.new_empty(num_rows + num_programs * rows, rank, dtype=torch.float32)
    assert values.numel() < 1 << 31, f"{tuple(values.shape)} values: offsets are i32"
    return Workspace(
        num_slots=num_slots,
        num_programs=num_programs,
        values=values,
        statistics=out_THc.new_empty(column_splits, num_rows, 2, dtype=torch.float32),
        slots=out_THc.new_empty(seqs.num_sequences, 2, dtype=torch.int32),
        units=out_THc.new_empty(1 + num_units, FIELDS.value, dtype=torch.int32),
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
    """Assign slots to the splits of the tokens [first, end): at least one for each token."""
    assert (tokens[1] - tokens[0]) * (triton.cdiv(top_k, split) or 1) <= workspace.num_slots, (
        f"tokens {tokens} in {workspace.num_slots} slots"
    )
    plan_kernel[tokens[1] - tokens[0] if top_k else seqs.num_sequences,](
        workspace.units, workspace.slots, seqs.cu_seqlens_q, seqs.seq_lens, seqs.num_sequences, *tokens,
        workspace.num_slots, **plan_constexprs(num_heads, rows, split, top_k), **PDL,
    )  # fmt: skip


def merge_workspace(
    workspace: Workspace,
    out_THc: Tensor,
    seqs: AttentionMetadata,
    tokens: tuple[int, int],
    *,
    split: int,
    top_k: int,
) -> None:
    """Merge the slots into the rows of the tokens [first, end) that belong to sequences."""
    num_heads, rank = out_THc.shape[1:]
    merge_kernel[tokens[1] - tokens[0], triton.cdiv(num_heads, _MERGED_ROWS)](
        workspace.values, workspace.statistics, workspace.slots, out_THc, seqs.cu_seqlens_q, seqs.seq_lens,
        seqs.num_sequences, *tokens, **merge_constexprs(num_heads, rank, split, top_k), **PDL,
    )  # fmt: skip


def plan_constexprs(num_heads: int, rows: int, split: int, top_k: int) -> dict[str, int]:
    return {"H": num_heads, "ROWS": rows, "SPLIT_KEYS": split, "TOP_K": top_k, "UNITS": _UNITS}


def merge_constexprs(num_heads: int, rank: int, split: int, top_k: int) -> dict[str, int]:
    sizes = {"H": num_heads, "RANK": rank, "SPLIT_KEYS": split, "TOP_K": top_k}
    return {**sizes, "ROWS": _MERGED_ROWS, "STAGES": _MERGE_STAGES}
