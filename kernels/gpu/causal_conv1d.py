"""The causal convolution of recurrent mixers in Triton: `kernels.ops.causal_conv1d`.

A program takes a tile of tokens of one sequence and of channels; a decode is a tile of one token. The tails of prefills are
written by a second kernel: a tile reads the tail that a later one of its sequence replaces.

Every rounding of a sum is written out, so that both tile sizes agree on it.

T tokens, D width of the rows (the channels), K taps, B blocks of the state cache. In the kernels M tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.split_kv import Span, find_sequence, launch_range, rows_of
from expertwire.kernels.ops.recurrent import StateMetadata

ROWS, COLUMNS = 32, 128  # of a prefill's tile
DECODE_COLUMNS = 512
_BOUNDS = ["first_sequence", "end_sequence", "first_token", "end_token"]


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def source_block(table, start, every):
    """Return the block of the state before position `start`; of position 0, which has none, any."""
    return tl.load(table + tl.maximum(start - 1, 0) // every).to(tl.int64)


@triton.jit(do_not_specialize=_BOUNDS)
def causal_conv1d_kernel(
    x,
    weight,
    bias,
    tail,
    y,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    block_table,
    first_sequence,
    end_sequence,
    first_token,
    end_token,
    every,
    stride_x,
    stride_channel,
    stride_tap,
    table_width,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS_EACH: tl.constexpr,
):
    """Grid (channels, tiles of tokens). BLOCKS_EACH is 1 for decodes, whose tails are written, and 0 for prefills."""
    wait_for_previous_kernel()
    tile = tl.program_id(1)
    bounds = num_decodes, first_sequence, end_sequence, first_token, end_token
    first_sequence, end_sequence, first_token, end_token = launch_range(*bounds, BLOCKS_EACH)
    if BLOCKS_EACH > 0:
        first_token, end_token = first_token, tl.minimum(tl.load(num_decodes), end_token)
    sequence, block = find_sequence(
        cu_seqlens_q, tile, first_sequence, end_sequence, first_token, end_token, 1, ROWS, BLOCKS_EACH
    )
    row_M, end_row, to_position, _, end = rows_of(
        cu_seqlens_q, seq_lens, sequence, block, first_token, end_token, 1, ROWS
    )
    if end == 0:
        return
    table = block_table + sequence.to(tl.int64) * table_width
    start = to_position + tl.load(cu_seqlens_q + sequence)
    before = tail + source_block(table, start, every) * ((TAPS - 1) * WIDTH)
    after = tail + tl.load(table + start // every).to(tl.int64) * ((TAPS - 1) * WIDTH)
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists, live_M = channel < WIDTH, row_M < end_row
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if bias is not None:
        acc += tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(TAPS):
        past_M = row_M + to_position - start - (TAPS - 1) + k  # the tail's positions are negative
        here_M = live_M & (past_M >= 0)
        at_M = (row_M - (TAPS - 1) + k).to(tl.int64) * stride_x
        value = tl.load(x + at_M[:, None] + channel, mask=here_M[:, None] & exists, other=0.0)
        if k < TAPS - 1:
            earlier_M = live_M & (past_M < 0) & (start > 0)
            at_M = (past_M + TAPS - 1) * WIDTH
            old = tl.load(before + at_M[:, None] + channel, mask=earlier_M[:, None] & exists, other=0.0)
            value = tl.where(past_M[:, None] >= 0, value, old)
        if BLOCKS_EACH > 0 and k > 0:
            tl.debug_barrier()  # nobody reads what this replaces any more
            tl.store(after + (k - 1) * WIDTH + channel[None, :], value, mask=live_M[:, None] & exists)
        factor = tl.load(weight + channel * stride_channel + k * stride_tap, mask=exists, other=0.0).to(tl.float32)
        acc = tl.fma(value.to(tl.float32), tl.broadcast_to(factor[None, :], acc.shape), acc)
    at_M = row_M.to(tl.int64) * WIDTH
    tl.store(y + at_M[:, None] + channel, silu(acc).to(y.dtype.element_ty), mask=live_M[:, None] & exists)


@triton.jit(do_not_specialize=["num_sequences"])
def conv_tails_kernel(
    x,
    tail,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    block_table,
    num_sequences,
    every,
    stride_x,
    table_width,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (channels, prefills): write the last inputs of a prefill in each of its blocks."""
    wait_for_previous_kernel()
    sequence = tl.load(num_decodes) + tl.program_id(1)
    if sequence >= num_sequences:
        return
    row = tl.load(cu_seqlens_q + sequence)
    length = tl.load(seq_lens + sequence)
    start = length - (tl.load(cu_seqlens_q + sequence + 1) - row)
    if start == length:
        return
    table = block_table + sequence.to(tl.int64) * table_width
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < WIDTH
    before = tail + source_block(table, start, every) * ((TAPS - 1) * WIDTH)
    # From the last piece to the first, whose block may be the one that is read.
    first, last = start // every, (length - 1) // every
    for step in range(last - first + 1):
        interval = last - step
        target = tl.load(table + interval).to(tl.int64)
        # Where the next interval has the same block, that holds its tail.
        if (interval == last) | (tl.load(table + tl.minimum(interval + 1, last)) != target):
            end = tl.minimum(length, (interval + 1) * every)
            for k in tl.static_range(TAPS - 1):
                past = end - start - (TAPS - 1) + k
                at = (row + past).to(tl.int64) * stride_x
                value = tl.load(x + at + channel, mask=exists & (past >= 0), other=0.0)
                at = (past + TAPS - 1) * WIDTH
                old = tl.load(before + at + channel, mask=exists & (past < 0) & (start > 0), other=0.0)
                tl.debug_barrier()  # later taps read what this one does not replace: numbers move to the front
                here = tail + (target * (TAPS - 1) + k) * WIDTH + channel
                tl.store(here, tl.where(past >= 0, value, old), mask=exists)


def causal_conv1d(
    x_TD: Tensor, weight_DK: Tensor, bias_D: Tensor | None, tail_BkD: Tensor, states: StateMetadata
) -> Tensor:
    """Run `kernels.ops.causal_conv1d.reference`; rows that belong to no sequence are not written."""
    seqs, (width, taps) = states.seqs, weight_DK.shape
    assert x_TD.shape[1] == width, f"{tuple(x_TD.shape)} inputs, {width} channels"
    assert x_TD.stride(1) == 1, f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
    assert tail_BkD.shape[1:] == (taps - 1, width), f"tails {tuple(tail_BkD.shape)} of {taps} taps, {width} channels"
    assert tail_BkD.is_contiguous(), f"strides {tail_BkD.stride()} of tails"
    assert tail_BkD.dtype == x_TD.dtype, f"tails {tail_BkD.dtype} of inputs {x_TD.dtype}"
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    described = seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table
    for is_decode, end in ((True, seqs.max_decodes), (False, seqs.max_prefill_tokens)):
        if end == 0:
            continue
        span = Span(seqs=seqs, is_decode=is_decode, first=0, end=end, group=1)
        rows, columns = (1, DECODE_COLUMNS) if is_decode else (ROWS, COLUMNS)
        each, tiles = span.blocks(rows)
        causal_conv1d_kernel[triton.cdiv(width, columns), tiles](
            x_TD, weight_DK, bias_D, tail_BkD, y_TD, *described, *span.bounds, states.interval, x_TD.stride(0),
            *weight_DK.stride(), seqs.block_table.stride(0), WIDTH=width, TAPS=taps, ROWS=rows, COLUMNS=columns,
            BLOCKS_EACH=each, num_warps=4, **PDL,
        )  # fmt: skip
    if seqs.max_prefill_tokens:
        conv_tails_kernel[triton.cdiv(width, DECODE_COLUMNS), seqs.max_prefills](
            x_TD, tail_BkD, *described, seqs.num_sequences, states.interval, x_TD.stride(0),
            seqs.block_table.stride(0), WIDTH=width, TAPS=taps, COLUMNS=DECODE_COLUMNS, num_warps=4, **PDL,
        )  # fmt: skip
    return y_TD
