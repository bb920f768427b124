"""Rows in blocks and keys in splits: how a step is cut, and how parts of a result become one (`mla_splits` for latents).

A row is a (query, head) pair, and the heads that share a key head make a group; a block of R rows belongs to one sequence. After
every SPLIT keys, at absolute positions, a result is closed and merged into the total of the splits before it. Either the program
that walks over the splits does that, or it writes each to a workspace, and `merge_splits` does it with the same arithmetic in the
same order.

T tokens, H query heads, G key/value heads, d head size, B sequences; R rows, D padded head size.
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
from expertwire.kernels.ops.attention import AttentionMetadata

SPLIT = 1024  # keys
_MERGED_ROWS = 8
_MERGE_STAGES = 4
_PROGRAMS_PER_SM = 8  # that share out the splits: enough for ragged lengths
LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments that say what a launch is for: no kernel is compiled again for their values.
BOUNDS = ("first_sequence", "end_sequence", "first_token", "end_token", "row_blocks", "num_programs")


@triton.jit
def narrow(num_decodes, first_sequence, end_sequence, first_token, end_token, BLOCKS_EACH: tl.constexpr):
    """A launch's sequences and tokens, of the bounds that the host gave: prefills are what follows the decodes, and their tokens
    are counted from the first one's on. Where there are none, the last decode is looked at, which has no such tokens."""
    if BLOCKS_EACH > 0:
        return first_sequence, end_sequence, first_token, end_token
    else:
        decodes = tl.load(num_decodes)
        return tl.minimum(decodes, end_sequence - 1), end_sequence, decodes + first_token, decodes + end_token


@triton.jit
def share_out(
    program, num_decodes, first_token, end_token, row_blocks, num_programs, num_splits, BLOCKS_EACH: tl.constexpr
):
    """A program's row block and its share of the splits: block, share, how many shares there are.

    `num_programs` share out the splits of a prefill's row block. Of decodes there are as many row blocks as the device says, and
    `num_programs` for all of them together, at least. The later blocks of a sequence see more keys: they start first. A program
    has nothing to do if its share is not one of those that there are.
    """
    shares = num_programs
    if BLOCKS_EACH > 0:
        row_blocks = (tl.minimum(tl.load(num_decodes), end_token) - first_token) * BLOCKS_EACH
        exists, row_blocks = row_blocks > 0, tl.maximum(row_blocks, 1)
        shares = tl.where(exists, tl.maximum(tl.minimum(tl.cdiv(num_programs, row_blocks), num_splits), 1), 0)
    return row_blocks - 1 - program % row_blocks, program // row_blocks, shares


@triton.jit
def _first_block(
    cu_seqlens_q, sequence, first_sequence, first_token, end_token, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """Row blocks of the sequences before it, at most: each may leave its last one uneven."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), first_token), end_token) - first_token
    return start * GROUP // ROWS + sequence - first_sequence


@triton.jit
def find(
    cu_seqlens_q,
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
            before = _first_block(cu_seqlens_q, middle, first_sequence, first_token, end_token, GROUP, ROWS) <= block
            sequence = tl.where(before, middle, sequence)
            end = tl.where(before, end, middle)
        return sequence, block - _first_block(
            cu_seqlens_q, sequence, first_sequence, first_token, end_token, GROUP, ROWS
        )


@triton.jit
def rows_of(cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """A block's rows, numbered token * GROUP + head in the group.

    Returns the rows' numbers [R], the end of those that exist, what to add to a token for its position; the position of the first
    row and the one behind the last row's, 0 if there are none.
    """
    end_query = tl.load(cu_seqlens_q + sequence + 1)
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), first_token), end_token)
    stop = tl.minimum(tl.maximum(end_query, first_token), end_token)
    first_row, end_row = start * GROUP + block * ROWS, stop * GROUP
    to_position = tl.load(seq_lens + sequence) - end_query
    last_row = tl.minimum(first_row + ROWS, end_row) - 1
    end = tl.where(first_row < end_row, to_position + last_row // GROUP + 1, 0)
    return first_row + tl.arange(0, ROWS), end_row, to_position, to_position + first_row // GROUP, end


@triton.jit
def first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """`kernels.ops.attention.first_visible`, of numbers or of vectors."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK > 0:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def rescale(top, top_before):
    """2^(before - top), the factor of sums that were relative to an earlier maximum; 0 as long as nothing was seen."""
    return tl.exp2(top_before - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def merge_weights(top, weight, top_1, weight_1):
    """A split's maximum exponent and weight [R] into those of the splits before it: both merged, and the factors of the values
    before it and of its own."""
    merged = tl.maximum(top, top_1)
    old, new = rescale(merged, top), rescale(merged, top_1)
    return merged, tl.fma(weight, old, weight_1 * new), old, new


@triton.jit
def merge(total, top, weight, total_1, top_1, weight_1):
    """A split's unnormalised values [R, D], their maximum exponent and their weight [R] into those of the splits before it.

    Every rounding is written out, since two kernels have to agree on it.
    """
    top, weight, old, new = merge_weights(top, weight, top_1, weight_1)
    return tl.fma(total, old[:, None], total_1 * new[:, None]), top, weight


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


@triton.jit(do_not_specialize=["first_sequence", "end_sequence", "first_token", "end_token", "num_slots"])
def merge_splits(
    partials,
    statistics,
    out,
    sinks,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    first_sequence,
    end_sequence,
    first_token,
    end_token,
    num_slots,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (row blocks, G): what the programs of the splits left in the workspace, which starts at `first_token`."""
    wait_for_previous()
    group = tl.program_id(1)
    block, share, num_shares = share_out(
        tl.program_id(0), num_decodes, first_token, end_token, tl.num_programs(0), 1, 1, BLOCKS_EACH
    )
    first_sequence, end_sequence, first_token, end_token = narrow(
        num_decodes, first_sequence, end_sequence, first_token, end_token, BLOCKS_EACH
    )
    sequence, block = find(
        cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, BLOCKS_EACH
    )
    row_R, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if (end == 0) | (share >= num_shares):
        return
    begin = first_visible(first, WINDOW, CHUNK)
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
class Span:
    """A launch for some decodes, or for some tokens of the prefills; bounds, of which the device may have less.

    first, end: decodes, or tokens from the first prefill's on. group: rows of a token for a key head.
    """

    seqs: AttentionMetadata
    is_decode: bool
    first: int
    end: int
    group: int

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """The first and the end of sequences and tokens, as `narrow` takes them."""
        sequences = (self.first, self.end) if self.is_decode else (0, self.seqs.num_sequences)
        return *sequences, self.first, self.end

    def blocks(self, rows: int) -> tuple[int, int]:
        """The number of blocks of so many rows of each decode, 0 for prefills; and of all at most."""
        num_tokens = self.end - self.first
        each = -(-self.group // rows) if self.is_decode else 0
        return each, num_tokens * each if self.is_decode else num_tokens * self.group // rows + self.seqs.max_prefills

    def workspace(self, out: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
        """For the splits of results like `out` [T, H, d]: values, and maxima and weights; fp32, undefined."""
        rows = num_splits * (self.end - self.first) * out.shape[1]
        values, statistics = (out.new_empty(rows, width, dtype=torch.float32) for width in (out.shape[2], 2))
        return values, statistics


def max_splits(max_length: int, split: int, window: int = 0, chunk: int = 0) -> int:
    """Splits in which a query of a sequence can see keys."""
    splits = [-(-max_length // split), *(-(-(reach - 1) // split) + 1 for reach in (window, chunk) if reach)]
    return min(splits)


def sharing_programs(
    device: Device, row_blocks: int, num_splits: int, *, is_decode: bool, num_kv: int = 1
) -> tuple[int, int]:
    """The programs for a key head that shall share out splits, as `share_out` takes them, and the grid that is enough for up to
    so many row blocks."""
    wanted = -(-_PROGRAMS_PER_SM * device.num_sms // num_kv)
    if is_decode:
        return wanted, min(row_blocks * num_splits, row_blocks + wanted)
    shares = max(1, min(num_splits, -(-wanted // max(1, row_blocks))))
    return shares, row_blocks * shares


def merge_workspace(
    workspace: tuple[Tensor, Tensor],
    out: Tensor,
    span: Span,
    num_splits: int,
    *,
    split: int,
    window: int = 0,
    chunk: int = 0,
    sinks_H: Tensor | None = None,
) -> None:
    """The splits that lie in `span.workspace(out, num_splits)`, into the span's rows of out [T, H, d]."""
    num_heads, dim = out.shape[1:]
    each, num_blocks = span.blocks(_MERGED_ROWS)
    merge_splits[num_blocks, num_heads // span.group](
        *workspace, out, workspace[0] if sinks_H is None else sinks_H,
        span.seqs.num_decodes, span.seqs.cu_seqlens_q, span.seqs.seq_lens, *span.bounds, num_splits,
        **_constexprs(span.group, dim, split, window, chunk, sinks_H is not None), BLOCKS_EACH=each, **EARLY,
    )  # fmt: skip


def _constexprs(group: int, dim: int, split: int, window: int, chunk: int, has_sinks: bool) -> dict[str, int | bool]:
    sizes = {"GROUP": group, "DIM": dim, "PADDED": triton.next_power_of_2(dim), "WINDOW": window, "CHUNK": chunk}
    return {**sizes, "HAS_SINKS": has_sinks, "ROWS": _MERGED_ROWS, "SPLIT_KEYS": split, "STAGES": _MERGE_STAGES}


def _case(group: int, dim: int, *, single: bool, window: int = 0, sinks: bool = False) -> Case:
    return Case(
        name=f"splits.merge {group}x{dim} {'decode' if single else 'prefill'} window {window}",
        kernel=merge_splits,
        args={
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens"), torch.int32),
            **{"first_sequence": 0, "end_sequence": 64, "first_token": 0, "end_token": 64, "num_slots": 32},
        },
        constexprs={
            **_constexprs(group, dim, SPLIT, window, 0, sinks),
            "BLOCKS_EACH": -(-group // _MERGED_ROWS) if single else 0,
        },
        blocks_per_sm=2 if dim > 256 else 4,
        wide=False,  # the statistics are a number a row
        expect={90: "", 100: ""},
        options=EARLY,
    )


def cases() -> list[Case]:
    """The shapes of Qwen3-30B-A3B, gpt-oss-120b, DeepSeek-V3 and V2-Lite; latent attention merges prefill, too."""
    return [
        _case(8, 128, single=True),
        _case(8, 64, single=True, window=128, sinks=True),
    ]
