"""Mamba's selective scan in Triton: `kernels.ops.selective_scan`.

A program takes some channels of one sequence and goes through its tokens, one after another, with the state in registers. A
channel's numbers depend on no other channel, and every token is computed by the same operations, so that bits do not depend on
how steps cut a sequence. Tokens of a prefill are loaded several at a time, from multiples of their number on, as the recurrence
would wait for each; those that are not there move nothing.

T tokens, D width of the rows (the channels), N numbers of the state for each channel, B blocks. In the kernel M tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.causal_conv1d import source_block
from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.fp32 import softplus
from expertwire.kernels.ops.recurrent import StateMetadata
from expertwire.kernels.ops.selective_scan import ScanWeights

COLUMNS = 16  # channels of a program: few, as one sequence alone has to occupy the device
TOKENS = 8  # of a prefill that are loaded at a time, where intervals are multiples
# Decodes and prefills have to agree on every rounding.
NUM_WARPS, OPTIONS = 1, {"enable_fp_fusion": False}


@triton.jit
def _rows(matrix_Md, TOKENS: tl.constexpr):
    """Return the rows of a matrix, as a tuple: 1 or 8."""
    if TOKENS == 1:
        return (tl.reshape(matrix_Md, [matrix_Md.shape[1]]),)
    else:
        even, odd = tl.split(tl.reshape(tl.trans(matrix_Md), [matrix_Md.shape[1], 2, 2, 2]))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        r0, r4 = tl.split(a)
        r2, r6 = tl.split(c)
        r1, r5 = tl.split(b)
        r3, r7 = tl.split(d)
        return r0, r1, r2, r3, r4, r5, r6, r7


@triton.jit(do_not_specialize=["num_sequences", "every", "table_width"])
def selective_scan_kernel(
    x,
    dt,
    B,
    C,
    A,
    skip,
    dt_bias,
    state_cache,
    y,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    block_table,
    num_sequences,
    every,
    stride_x,
    stride_dt,
    stride_write,
    stride_read,
    table_width,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    DECODES: tl.constexpr,
):
    """Grid (channels, sequences): decodes or prefills. PADDED is SIZE or the next power of two; `every` a multiple of TOKENS."""
    wait_for_previous_kernel()
    sequence, end_sequence = tl.program_id(1), tl.load(num_decodes)
    if not DECODES:
        sequence, end_sequence = sequence + end_sequence, num_sequences
    if sequence >= end_sequence:
        return
    first_row, length = tl.load(cu_seqlens_q + sequence), tl.load(seq_lens + sequence)
    start = length - (tl.load(cu_seqlens_q + sequence + 1) - first_row)
    if start == length:
        return
    table = block_table + sequence.to(tl.int64) * table_width
    channel, n, place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED), tl.arange(0, TOKENS)
    exists, is_n = channel < WIDTH, n < SIZE
    in_state, at = is_n[:, None] & exists, n[:, None] * WIDTH + channel
    A_Nd = tl.load(A + at, mask=in_state, other=0.0) * 1.4426950408889634  # for powers of two
    skip_d, bias_d = tl.load(skip + channel, mask=exists, other=0.0), tl.load(dt_bias + channel, mask=exists, other=0.0)
    source = state_cache + source_block(table, start, every) * (SIZE * WIDTH)
    state_Nd = tl.load(source + at, mask=in_state & (start > 0), other=0.0)
    for begin in range(start // TOKENS * TOKENS, length, TOKENS):
        position = begin + place
        row_M, is_live_M = (first_row + position - start).to(tl.int64), (position >= start) & (position < length)
        loads, here = is_live_M[:, None] & exists, is_live_M[:, None] & is_n
        x_Md = tl.load(x + (row_M * stride_x)[:, None] + channel, mask=loads, other=0.0).to(tl.float32)
        dt_Md = tl.load(dt + (row_M * stride_dt)[:, None] + channel, mask=loads, other=0.0).to(tl.float32)
        B_MN = tl.load(B + (row_M * stride_write)[:, None] + n, mask=here, other=0.0).to(tl.float32)
        C_MN = tl.load(C + (row_M * stride_read)[:, None] + n, mask=here, other=0.0).to(tl.float32)
        # A token that is not there moves nothing: its dt is 0. The sum, of one, keeps Triton 3.6 from computing softplus after
        # the exchange between threads that `_rows` begins with, in several of them.
        dt_Md = tl.sum(tl.where(is_live_M[:, None], softplus(dt_Md + bias_d), 0.0)[:, :, None], 2)
        x_rows, dt_rows = _rows(x_Md, TOKENS), _rows(dt_Md, TOKENS)
        B_rows, C_rows = _rows(B_MN, TOKENS), _rows(C_MN, TOKENS)
        out = y + (first_row + begin - start).to(tl.int64) * WIDTH + channel
        for i in tl.static_range(TOKENS):
            moved_Nd = B_rows[i][:, None] * (dt_rows[i] * x_rows[i])[None, :]
            state_Nd = tl.fma(tl.exp2(dt_rows[i][None, :] * A_Nd), state_Nd, moved_Nd)
            y_d = tl.fma(skip_d, x_rows[i], tl.sum(C_rows[i][:, None] * state_Nd, 0))
            is_live = (begin + i >= start) & (begin + i < length)
            tl.store(out + i * WIDTH, y_d.to(y.dtype.element_ty), mask=exists & is_live)
        end = tl.minimum(begin + TOKENS, length)
        if (end % every == 0) | (end == length):
            interval, last = (end - 1) // every, (length - 1) // every
            target = tl.load(table + interval).to(tl.int64)
            # Where the next interval has the same block, that holds its state.
            if (end == length) | (tl.load(table + tl.minimum(interval + 1, last)) != target):
                tl.store(state_cache + target * (SIZE * WIDTH) + at, state_Nd, mask=in_state)


def constexprs(width: int, size: int, interval: int, decodes: bool) -> dict[str, int]:
    """Return the compile-time arguments for a number of channels, with a number of numbers each."""
    padded, tokens = triton.next_power_of_2(size), 1 if decodes or interval % TOKENS else TOKENS
    return {"WIDTH": width, "SIZE": size, "COLUMNS": COLUMNS, "PADDED": padded, "TOKENS": tokens, "DECODES": decodes}


def selective_scan(
    x_TD: Tensor,
    dt_TD: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    weights: ScanWeights,
    state_BND: Tensor,
    states: StateMetadata,
) -> Tensor:
    """Run `kernels.ops.selective_scan.reference`; rows that belong to no sequence are not written."""
    w, seqs, (size, width) = weights, states.seqs, weights.A_ND.shape
    rows = x_TD, dt_TD, B_TN, C_TN
    assert [tensor.shape[1] for tensor in rows] == [width, width, size, size], [tuple(t.shape) for t in rows]
    assert all(tensor.stride(1) == 1 for tensor in rows), [tensor.stride() for tensor in rows]
    assert state_BND.shape[1:] == w.A_ND.shape, f"states {tuple(state_BND.shape)} of {tuple(w.A_ND.shape)}"
    held = w.A_ND, w.skip_D, w.dt_bias_D, state_BND
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in held), [(t.dtype, t.stride()) for t in held]
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    for most, decodes in ((seqs.max_decodes, True), (seqs.max_prefills, False)):
        if most:
            selective_scan_kernel[triton.cdiv(width, COLUMNS), most](
                *rows, *held, y_TD, seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table, seqs.num_sequences,
                states.interval, *(tensor.stride(0) for tensor in rows), seqs.block_table.stride(0),
                **constexprs(width, size, states.interval, decodes), num_warps=NUM_WARPS, **OPTIONS, **PDL,
            )  # fmt: skip
    return y_TD
