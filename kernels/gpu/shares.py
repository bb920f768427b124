"""Keys of a row block shared out among programs by the size of the GPU, for `prefill`: which keys are whose, and how the results
become one.

T tokens, H query heads, G key/value heads, d head size of values; R rows, D padded head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.splits import find, first_visible, merge, narrow, rows_of, store_normalised, workspace_row

BOUNDS = ("first_sequence", "end_sequence", "first_token", "end_token")  # what a launch is for, as `narrow` takes it
MERGED_ROWS = 16
_ENOUGH = 0.85  # of the best occupation of a GPU


@triton.jit
def begin_of(first, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Where the keys of a row block begin whose first row is at position `first`: with the first block of the cache that it sees,
    of which the earlier positions are still there."""
    return first_visible(first, WINDOW, CHUNK) // BLOCK_SIZE * BLOCK_SIZE


@triton.jit
def share_of(begin, end, share, num_shares, KEYS: tl.constexpr, MIN_SHARE: tl.constexpr):
    """Which tiles of the keys [begin, end) belong to one of `num_shares` programs that share them out.

    Returns the first tile, the end (at most the first one if nothing is left), and how many shares have tiles.
    """
    tiles = tl.cdiv(end - begin, KEYS)
    each = tl.maximum(tl.cdiv(tiles, num_shares), MIN_SHARE // KEYS)
    return share * each, tl.minimum((share + 1) * each, tiles), tl.cdiv(tiles, each)


@triton.jit(do_not_specialize=[*BOUNDS, "num_shares"])
def merge_shares(
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
    num_shares,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
):
    """Grid (row blocks, G, ROWS / MERGED_ROWS): what the programs of row blocks that were shared out left in the workspace."""
    wait_for_previous()
    block, group = tl.program_id(0), tl.program_id(1)
    bounds = num_decodes, first_sequence, end_sequence, first_token, end_token
    first_sequence, end_sequence, first_token, end_token = narrow(*bounds, 0)
    sequence, block = find(cu_seqlens_q, block, first_sequence, end_sequence, first_token, end_token, GROUP, ROWS, 0)
    row_R, end_row, _, first, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, GROUP, ROWS
    )
    if end == 0:
        return
    begin = begin_of(first, BLOCK_SIZE, WINDOW, CHUNK)
    _, _, shares = share_of(begin, end, 0, num_shares, KEYS, MIN_SHARE)
    if shares == 1:
        return
    row_R = tl.min(row_R, 0) + tl.program_id(2) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    live_R = row_R < end_row
    dim = tl.arange(0, PADDED)
    total = tl.zeros([MERGED_ROWS, PADDED], tl.float32)
    top = tl.full([MERGED_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([MERGED_ROWS], tl.float32)
    for share in tl.range(0, shares):
        at_R = workspace_row(share * tl.num_programs(1) + group, row_R, first_token, end_token, GROUP)
        mask = live_R[:, None] & (dim < DIM)
        total_1 = tl.load(partials + at_R[:, None] * DIM + dim, mask=mask, other=0.0)
        top_1 = tl.load(statistics + at_R * 2, mask=live_R, other=float("-inf"))
        weight_1 = tl.load(statistics + at_R * 2 + 1, mask=live_R, other=0.0)
        total, top, weight = merge(total, top, weight, total_1, top_1, weight_1)
    store_normalised(out, row_R, end_row, group, total, top, weight, sinks, dim, GROUP, DIM, HAS_SINKS)


def num_shares(programs: int, places: int, most: int) -> int:
    """Into how many shares to cut the keys, at most `most`, of so many programs on a GPU that runs `places` at once.

    As few as keep the GPU nearly as busy as any number: the time is that of whole waves.
    """

    def occupation(shares: int) -> float:
        waves = programs * shares / places
        return waves / -(-programs * shares // places)

    if programs >= places or most <= 1:
        return 1
    busy = [occupation(shares) for shares in range(1, most + 1)]
    return next(shares for shares, share in enumerate(busy, 1) if share >= _ENOUGH * max(busy))


def _case(group: int, dim: int, *, window: int = 0, sinks: bool = False) -> Case:
    return Case(
        name=f"shares.merge {group}x{dim}",
        kernel=merge_shares,
        args={
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("out", "sinks"), torch.bfloat16),
            **dict.fromkeys(("num_decodes", "cu_seqlens_q", "seq_lens"), torch.int32),
            **dict.fromkeys((*BOUNDS, "num_shares"), 64),
        },
        constexprs={
            **{"GROUP": group, "DIM": dim, "PADDED": triton.next_power_of_2(dim), "BLOCK_SIZE": 16, "WINDOW": window},
            **{"CHUNK": 0, "HAS_SINKS": sinks, "ROWS": 128, "KEYS": 64, "MIN_SHARE": 1024, "MERGED_ROWS": MERGED_ROWS},
        },
        blocks_per_sm=4,
        wide=False,  # the statistics are a number a row
        expect={90: "", 100: ""},
        options=EARLY,
    )


def cases() -> list[Case]:
    """The shapes of Qwen3-30B-A3B, gpt-oss-120b and DeepSeek-V3's prompts with keys and values made again."""
    return [_case(8, 128), _case(8, 64, window=128, sinks=True), _case(1, 128)]
