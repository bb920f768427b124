"""Split-KV for `prefill`: keys are split over programs by the size of the GPU.

Unlike `split_kv`, the number of splits follows the batch and the GPU, and so do the bits.

T tokens, H query heads, G key/value heads, d head size. In the kernels M rows of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertwire.kernels.gpu.dependent_launch import wait_for_previous_kernel
from expertwire.kernels.gpu.split_kv import (
    find_sequence,
    first_visible,
    launch_range,
    merge,
    rows_of,
    store_normalised,
    workspace_row,
)

BOUNDS = ("first_sequence", "end_sequence", "first_token", "end_token")  # as `launch_range` takes them
MERGED_ROWS = 16
_ENOUGH = 0.85  # of the best occupancy


@triton.jit
def first_key_of(first, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Return where the keys of a row block begin whose first row is at position `first`.

    That is the start of the first cache block that it sees; earlier positions of that block are
    still there.
    """
    return first_visible(first, WINDOW, CHUNK) // BLOCK_SIZE * BLOCK_SIZE


@triton.jit
def tiles_of_split(begin, end, split, num_splits, KEYS: tl.constexpr, MIN_SPLIT_KEYS: tl.constexpr):
    """Return the key tiles of one of `num_splits` programs that share the keys [begin, end).

    Returns the first tile, the end (at most the first tile if nothing is left), and the number of
    programs that have tiles.
    """
    tiles = tl.cdiv(end - begin, KEYS)
    each = tl.maximum(tl.cdiv(tiles, num_splits), MIN_SPLIT_KEYS // KEYS)
    return split * each, tl.minimum((split + 1) * each, tiles), tl.cdiv(tiles, each)


@triton.jit(do_not_specialize=[*BOUNDS, "num_splits"])
def merge_prefill_kernel(
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
    num_splits,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT_KEYS: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
):
    """Grid (row blocks, G, ROWS / MERGED_ROWS): merge the partial results of row blocks that were split."""
    wait_for_previous_kernel()
    block, group = tl.program_id(0), tl.program_id(1)
    bounds = num_decodes, first_sequence, end_sequence, first_token, end_token
    first_sequence, end_sequence, first_token, end_token = launch_range(*bounds, 0)
    sequence, block = find_sequence(
        cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, 0
    )
    row_M, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if end == 0:
        return
    begin = first_key_of(first, BLOCK_SIZE, WINDOW, CHUNK)
    _, _, splits = tiles_of_split(begin, end, 0, num_splits, KEYS, MIN_SPLIT_KEYS)
    if splits == 1:
        return
    row_M = tl.min(row_M, 0) + tl.program_id(2) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    live_M = row_M < end_row
    dim = tl.arange(0, PADDED)
    acc = tl.zeros([MERGED_ROWS, PADDED], tl.float32)
    row_max = tl.full([MERGED_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([MERGED_ROWS], tl.float32)
    for split in tl.range(0, splits):
        at_M = workspace_row(split * tl.num_programs(1) + group, row_M, first_token, end_token, GROUP)
        mask = live_M[:, None] & (dim < DIM)
        acc_1 = tl.load(partials + at_M[:, None] * DIM + dim, mask=mask, other=0.0)
        row_max_1 = tl.load(statistics + at_M * 2, mask=live_M, other=float("-inf"))
        row_sum_1 = tl.load(statistics + at_M * 2 + 1, mask=live_M, other=0.0)
        acc, row_max, row_sum = merge(acc, row_max, row_sum, acc_1, row_max_1, row_sum_1)
    store_normalised(out, row_M, end_row, group, acc, row_max, row_sum, sinks, dim, GROUP, DIM, HAS_SINKS)


def num_splits(programs: int, places: int, most: int) -> int:
    """Return into how many splits to cut the keys of `programs` row blocks, at most `most`.

    The GPU runs `places` programs at once. The result is the fewest splits that keep it nearly as
    busy as any number would: the time is that of whole waves.
    """

    def occupation(splits: int) -> float:
        waves = programs * splits / places
        return waves / -(-programs * splits // places)

    if programs >= places or most <= 1:
        return 1
    busy = [occupation(splits) for splits in range(1, most + 1)]
    return next(splits for splits, split in enumerate(busy, 1) if split >= _ENOUGH * max(busy))
