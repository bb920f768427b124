"""Mamba's selective scan in Triton: `kernels.ops.selective_scan`.

A program takes some channels of one sequence and goes through its tokens, one after another, with the state in registers; a
decode is a sequence of one token. A channel's numbers depend on no other channel, and every token is computed by the same
instructions, so that bits do not depend on how steps cut a sequence. Tokens are loaded many at a time, as the recurrence would
wait for each.

T tokens, D width of the rows (the channels), N numbers of the state for each channel, B blocks. In the kernel M tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.causal_conv1d import source_block
from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.mamba2 import softplus
from expertwire.kernels.ops.recurrent import StateMetadata
from expertwire.kernels.ops.selective_scan import ScanWeights

COLUMNS = 16  # channels of a program: few, as one sequence alone has to occupy the device
TOKENS = 16  # that are loaded at a time
NUM_WARPS = 1  # then the numbers of a channel's state lie in two threads


@triton.jit
def _row(matrix_M, is_row_M):
    """Return one row of a matrix, exactly."""
    return tl.sum(tl.where(is_row_M[:, None], matrix_M, 0.0), 0)


@triton.jit(do_not_specialize=["every", "table_width"])
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
    cu_seqlens_q,
    seq_lens,
    block_table,
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
):
    """Grid (channels, sequences). PADDED is SIZE or the next power of two."""
    wait_for_previous_kernel()
    sequence = tl.program_id(1).to(tl.int64)
    first_row, length = tl.load(cu_seqlens_q + sequence), tl.load(seq_lens + sequence)
    start = length - (tl.load(cu_seqlens_q + sequence + 1) - first_row)
    if start == length:
        return
    table = block_table + sequence * table_width
    channel, n, place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED), tl.arange(0, TOKENS)
    exists, is_n = channel < WIDTH, n < SIZE
    in_state, at = is_n[:, None] & exists, n[:, None] * WIDTH + channel
    A_Nd = tl.load(A + at, mask=in_state, other=0.0)
    skip_d, bias_d = tl.load(skip + channel, mask=exists, other=0.0), tl.load(dt_bias + channel, mask=exists, other=0.0)
    source = state_cache + source_block(table, start, every) * (SIZE * WIDTH)
    state_Nd = tl.load(source + at, mask=in_state & (start > 0), other=0.0)
    for begin in range(start, length, TOKENS):
        num = tl.minimum(length - begin, TOKENS)
        row_M, is_live_M = (first_row + begin - start + place).to(tl.int64), place < num
        loads, here = is_live_M[:, None] & exists, is_live_M[:, None] & is_n
        x_Md = tl.load(x + (row_M * stride_x)[:, None] + channel, mask=loads, other=0.0).to(tl.float32)
        dt_Md = tl.load(dt + (row_M * stride_dt)[:, None] + channel, mask=loads, other=0.0).to(tl.float32)
        B_MN = tl.load(B + (row_M * stride_write)[:, None] + n, mask=here, other=0.0).to(tl.float32)
        C_MN = tl.load(C + (row_M * stride_read)[:, None] + n, mask=here, other=0.0).to(tl.float32)
        dt_Md = softplus(dt_Md + bias_d)
        out = y + (first_row + begin - start).to(tl.int64) * WIDTH + channel
        for i in range(num):
            is_row_M = place == i
            x_d, dt_d = _row(x_Md, is_row_M), _row(dt_Md, is_row_M)
            state_Nd = tl.exp(dt_d[None, :] * A_Nd) * state_Nd + _row(B_MN, is_row_M)[:, None] * (dt_d * x_d)[None, :]
            y_d = tl.sum(_row(C_MN, is_row_M)[:, None] * state_Nd, 0) + skip_d * x_d
            tl.store(out + i * WIDTH, y_d.to(y.dtype.element_ty), mask=exists)
            end = begin + i + 1
            if (end % every == 0) | (end == length):
                interval, last = (end - 1) // every, (length - 1) // every
                target = tl.load(table + interval).to(tl.int64)
                # Where the next interval has the same block, that holds its state.
                if (end == length) | (tl.load(table + tl.minimum(interval + 1, last)) != target):
                    tl.store(state_cache + target * (SIZE * WIDTH) + at, state_Nd, mask=in_state)


def constexprs(width: int, size: int) -> dict[str, int]:
    """Return the compile-time arguments for a number of channels, with a number of numbers each."""
    padded = triton.next_power_of_2(size)
    return {"WIDTH": width, "SIZE": size, "COLUMNS": COLUMNS, "PADDED": padded, "TOKENS": TOKENS}


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
    if seqs.num_sequences:
        selective_scan_kernel[triton.cdiv(width, COLUMNS), seqs.num_sequences](
            *rows, *held, y_TD, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table, states.interval,
            *(tensor.stride(0) for tensor in rows), seqs.block_table.stride(0), **constexprs(width, size),
            num_warps=NUM_WARPS, **PDL,
        )  # fmt: skip
    return y_TD
