"""Split-KV: how rows are cut into blocks and keys into splits, and how partial results are merged.

A row is a (query, head) pair, and the heads that share a key head form a group; a block of M rows
belongs to one sequence. After every SPLIT_KEYS keys, at absolute positions, a partial result is
complete and is merged into the total of the splits before it. Either the program that loops over
the splits merges, or it writes each partial result to a workspace and `merge_splits_kernel` merges
with the same arithmetic in the same order. `mla_split_kv` does the same for latent attention.

T tokens, H query heads, G key/value heads, d head size, S sequences. In the kernels M rows of a
block, D padded head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops.attention import AttentionMetadata

SPLIT = 1024  # keys
MERGED_ROWS = 8
_MERGE_STAGES = 4
_PROGRAMS_PER_SM = 8  # enough for ragged lengths
LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments that select the sequences and tokens of a launch; no kernel is specialised on their values.
BOUNDS = ("first_sequence", "end_sequence", "first_token", "end_token", "row_blocks", "num_programs")


@triton.jit
def launch_range(num_decodes, first_sequence, end_sequence, first_token, end_token, BLOCKS_EACH: tl.constexpr):
    """Return the sequences and tokens of a launch, from the bounds that the host passed.

    Prefills follow the decodes, and their tokens are counted from the first prefill's on. Without
    prefills the last decode is returned, which has no such tokens.
    """
    if BLOCKS_EACH > 0:
        return first_sequence, end_sequence, first_token, end_token
    else:
        decodes = tl.load(num_decodes)
        return tl.minimum(decodes, end_sequence - 1), end_sequence, decodes + first_token, decodes + end_token


@triton.jit
def assign_split(
    program, num_decodes, first_token, end_token, row_blocks, num_programs, num_splits, BLOCKS_EACH: tl.constexpr
):
    """Return a program's row block, its index among the programs of that row block, and their number.

    `num_programs` programs share the splits of a prefill's row block. The number of decodes is
    known on the device only, and `num_programs` is the least number for all of their row blocks
    together. The later blocks of a sequence see more keys, so they start first. A program whose
    index is not below the number has nothing to do.
    """
    num_sharing = num_programs
    if BLOCKS_EACH > 0:
        row_blocks = (tl.minimum(tl.load(num_decodes), end_token) - first_token) * BLOCKS_EACH
        exists, row_blocks = row_blocks > 0, tl.maximum(row_blocks, 1)
        num_sharing = tl.where(exists, tl.maximum(tl.minimum(tl.cdiv(num_programs, row_blocks), num_splits), 1), 0)
    return row_blocks - 1 - program % row_blocks, program // row_blocks, num_sharing


@triton.jit
def _first_block(
    cu_seqlens_q, sequence, first_sequence, first_token, end_token, GROUP: tl.constexpr, ROWS: tl.constexpr
):
    """Return an upper bound of the row blocks of the sequences before it: each may leave its last one uneven."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + sequence), first_token), end_token) - first_token
    return start * GROUP // ROWS + sequence - first_sequence


@triton.jit
def find_sequence(
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
    """Return the sequence of a row block, and the block's number within it.

    Counted are the tokens [first_token, end_token) of the sequences [first_sequence, end_sequence).
    BLOCKS_EACH is the number of blocks of every sequence, or 0 if they differ.
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
    """Return a block's rows, numbered token * GROUP + head within the group.

    Returns the row numbers [M], the end of those that exist, what to add to a token to get its
    position, the position of the first row, and the position after the last row's, 0 if there are
    no rows.
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
    """Return `kernels.ops.attention.first_visible` of scalars or vectors."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK > 0:
        first = tl.maximum(first, position // CHUNK * CHUNK)
    return first


@triton.jit
def rescale(row_max, row_max_before):
    """Return 2^(row_max_before - row_max), the factor for sums relative to an earlier maximum; 0 if nothing was seen before."""
    return tl.exp2(row_max_before - tl.where(row_max == float("-inf"), 0.0, row_max))


@triton.jit
def merge_weights(row_max, row_sum, row_max_1, row_sum_1):
    """Merge a split's row maximum and row sum [M] into those of the splits before it.

    Returns both merged, and the factors for the values before it and for its own.
    """
    merged = tl.maximum(row_max, row_max_1)
    old, new = rescale(merged, row_max), rescale(merged, row_max_1)
    return merged, tl.fma(row_sum, old, row_sum_1 * new), old, new


@triton.jit
def merge(acc, row_max, row_sum, acc_1, row_max_1, row_sum_1):
    """Merge a split's unnormalised values [M, d], row maxima and row sums [M] into those before it.

    Every rounding is written out, since several kernels have to agree on it.
    """
    row_max, row_sum, old, new = merge_weights(row_max, row_sum, row_max_1, row_sum_1)
    return tl.fma(acc, old[:, None], acc_1 * new[:, None]), row_max, row_sum


@triton.jit
def store_normalised(
    out,
    row_M,
    end_row,
    group,
    acc,
    row_max,
    row_sum,
    sinks,
    dim,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Store the values divided by the sum of the weights, to which a sink adds its own."""
    live_M = row_M < end_row
    head_M = group * GROUP + row_M % GROUP
    if HAS_SINKS:
        sink = tl.load(sinks + head_M, mask=live_M, other=0.0).to(tl.float32) * LOG2_E
        merged = tl.maximum(row_max, sink)
        old = rescale(merged, row_max)
        factor = tl.div_rn(old, tl.fma(row_sum, old, tl.exp2(sink - merged)))
    else:
        factor = tl.div_rn(1.0, row_sum)
    at_M = (row_M // GROUP * (tl.num_programs(1) * GROUP) + head_M).to(tl.int64)
    value = (acc * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + at_M[:, None] * DIM + dim, value, mask=live_M[:, None] & (dim < DIM))


@triton.jit
def workspace_row(slot, row_M, first_token, end_token, GROUP: tl.constexpr):
    """Return the row of a workspace [slots * G, rows of the launch, d].

    This layout keeps neighbouring rows a fixed distance apart.
    """
    rows = (end_token - first_token) * GROUP
    return (tl.cast(slot, tl.int64) * rows - first_token * GROUP) + row_M


@triton.jit
def store_statistics(statistics, slot, row_M, first_token, end_token, end_row, row_max, row_sum, GROUP: tl.constexpr):
    """Store a split's maxima and weights."""
    at_M = workspace_row(slot, row_M, first_token, end_token, GROUP)
    tl.store(statistics + at_M * 2, row_max, mask=row_M < end_row)
    tl.store(statistics + at_M * 2 + 1, row_sum, mask=row_M < end_row)


@triton.jit(do_not_specialize=["first_sequence", "end_sequence", "first_token", "end_token", "num_slots"])
def merge_splits_kernel(
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
    """Grid (row blocks, G): merge the partial results of a workspace that starts at `first_token`."""
    wait_for_previous_kernel()
    group = tl.program_id(1)
    block, program_index, num_sharing = assign_split(
        tl.program_id(0), num_decodes, first_token, end_token, tl.num_programs(0), 1, 1, BLOCKS_EACH
    )
    first_sequence, end_sequence, first_token, end_token = launch_range(
        num_decodes, first_sequence, end_sequence, first_token, end_token, BLOCKS_EACH
    )
    sequence, block = find_sequence(
        cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, BLOCKS_EACH
    )
    row_M, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if (end == 0) | (program_index >= num_sharing):
        return
    begin = first_visible(first, WINDOW, CHUNK)
    dim = tl.arange(0, PADDED)
    live_M = row_M < end_row

    acc = tl.zeros([ROWS, PADDED], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for split in tl.range(begin // SPLIT_KEYS, tl.cdiv(end, SPLIT_KEYS), num_stages=STAGES, disable_licm=True):
        slot = split % num_slots * tl.num_programs(1) + group
        at_M = workspace_row(slot, row_M, first_token, end_token, GROUP)
        mask = live_M[:, None] & (dim < DIM)
        acc_1 = tl.load(partials + at_M[:, None] * DIM + dim, mask=mask, other=0.0)
        row_max_1 = tl.load(statistics + at_M * 2, mask=live_M, other=float("-inf"))
        row_sum_1 = tl.load(statistics + at_M * 2 + 1, mask=live_M, other=0.0)
        acc, row_max, row_sum = merge(acc, row_max, row_sum, acc_1, row_max_1, row_sum_1)
    store_normalised(out, row_M, end_row, group, acc, row_max, row_sum, sinks, dim, GROUP, DIM, HAS_SINKS)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A launch for some decodes or for some tokens of the prefills; the device may have fewer.

    first, end: decodes, or tokens counted from the first prefill's on. group: rows of a token that
    share a key head.
    """

    seqs: AttentionMetadata
    is_decode: bool
    first: int
    end: int
    group: int

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Return the first and the end of sequences and tokens, as `launch_range` takes them."""
        sequences = (self.first, self.end) if self.is_decode else (0, self.seqs.num_sequences)
        return *sequences, self.first, self.end

    def blocks(self, rows: int) -> tuple[int, int]:
        """Return the number of row blocks of each decode, 0 for prefills, and an upper bound for all."""
        num_tokens = self.end - self.first
        each = -(-self.group // rows) if self.is_decode else 0
        return each, num_tokens * each if self.is_decode else num_tokens * self.group // rows + self.seqs.max_prefills

    def workspace(self, out: Tensor, num_splits: int) -> tuple[Tensor, Tensor]:
        """Return fp32 memory for values, and for maxima and weights, of the splits of an `out` [T, H, d]."""
        rows = num_splits * (self.end - self.first) * out.shape[1]
        values, statistics = (out.new_empty(rows, width, dtype=torch.float32) for width in (out.shape[2], 2))
        return values, statistics


def max_splits(max_length: int, split: int, window: int = 0, chunk: int = 0) -> int:
    """Return the number of splits in which a query of a sequence can see keys."""
    splits = [-(-max_length // split), *(-(-(reach - 1) // split) + 1 for reach in (window, chunk) if reach)]
    return min(splits)


def split_grid(
    device: Device, row_blocks: int, num_splits: int, *, is_decode: bool, num_kv: int = 1
) -> tuple[int, int]:
    """Return how many programs share the splits of one key head, as `assign_split` takes it, and the grid.

    The grid suffices for up to `row_blocks` row blocks.
    """
    wanted = -(-_PROGRAMS_PER_SM * device.num_sms // num_kv)
    if is_decode:
        return wanted, min(row_blocks * num_splits, row_blocks + wanted)
    num_sharing = max(1, min(num_splits, -(-wanted // max(1, row_blocks))))
    return num_sharing, row_blocks * num_sharing


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
    """Merge the splits in `span.workspace(out, num_splits)` into the span's rows of `out` [T, H, d]."""
    num_heads, dim = out.shape[1:]
    each, num_blocks = span.blocks(MERGED_ROWS)
    merge_splits_kernel[num_blocks, num_heads // span.group](
        *workspace, out, workspace[0] if sinks_H is None else sinks_H,
        span.seqs.num_decodes, span.seqs.cu_seqlens_q, span.seqs.seq_lens, *span.bounds, num_splits,
        **merge_constexprs(span.group, dim, split, window, chunk, sinks_H is not None), BLOCKS_EACH=each, **PDL,
    )  # fmt: skip


def merge_constexprs(
    group: int, dim: int, split: int, window: int, chunk: int, has_sinks: bool
) -> dict[str, int | bool]:
    sizes = {"GROUP": group, "DIM": dim, "PADDED": triton.next_power_of_2(dim), "WINDOW": window, "CHUNK": chunk}
    return {**sizes, "HAS_SINKS": has_sinks, "ROWS": MERGED_ROWS, "SPLIT_KEYS": split, "STAGES": _MERGE_STAGES}
