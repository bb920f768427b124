"""Mamba-2's recurrence in Triton: `kernels.ops.mamba2`.

A program takes a head, or a part of its d, of one sequence. That of a prefill loops over the chunks of which a step has
tokens, with the state in registers; steps and their sums, which depend on no state, have a kernel of their own, for all chunks
side by side. A decode's program computes its token's chunk by the same operations, with one live row: products have the rows of
a whole chunk, as tensor cores take 64 of them anyway, so that its bits are those of a prefill. It reads the state and the
chunk's stored inputs and, but once in 64 tokens, writes no state.

The state, weights of tokens, and inputs that move the state are fp32 numbers, multiplied with numbers of the model by
`fp32.dot_fp32`. Of fp32 models these are three products of tf32, for which registers do not suffice: such models are for tests.

T tokens, D width of the rows, H heads of d numbers, N numbers of the state for each of them, B blocks, S sequences. In the
kernels M are the positions of a chunk that read, K those that are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.fp32 import dot_fp32, softplus
from expertwire.kernels.ops.mamba2 import CHUNK, Mamba2Cache, Mamba2Weights
from expertwire.kernels.ops.recurrent import StateMetadata


@triton.jit
def discretize(raw, bias, dt_min, dt_max):
    """Return steps dt."""
    return tl.minimum(tl.maximum(softplus(raw.to(tl.float32) + bias), dt_min), dt_max)


@triton.jit
def chunk_sums(raw, A, dt_bias, dts, block, begin, start, length, first_row, head, dt_min, dt_max, stride_raw,
               HEADS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Return dt of a chunk's tokens, zeros behind the last, and the sums of dt A, in powers of two.

    The chunk begins at position `begin`. The step has tokens from `start` to `length`, in rows from `first_row` on; dt of earlier
    ones is in the chunk cache.
    """
    place = tl.arange(0, CHUNK)
    position = begin + place
    is_new = (position >= start) & (position < length)
    raw_K = tl.load(raw + (first_row + position - start).to(tl.int64) * stride_raw + head, mask=is_new, other=0.0)
    dt_K = discretize(raw_K, tl.load(dt_bias + head), dt_min, dt_max)
    old_K = tl.load(dts + (block * CHUNK + place) * HEADS + head, mask=position < start, other=0.0)
    dt_K = tl.where(is_new, dt_K, old_K)
    return dt_K, tl.cumsum(dt_K * (tl.load(A + head) * 1.4426950408889634), 0)


@triton.jit
def chunk_outputs(C_MN, B_KN, x_Kd, h_Nd, decay_MK, sums_M, D):
    """Return a head's outputs in fp32 for a chunk, from the state before it. `decay_MK`: of one that is read, times its dt."""
    y_Md = dot_fp32(C_MN, h_Nd, tl.zeros([C_MN.shape[0], x_Kd.shape[1]], tl.float32)) * tl.exp2(sums_M)[:, None]
    weights_MK = decay_MK * tl.dot(C_MN, tl.trans(B_KN), input_precision="tf32x3")
    return dot_fp32(weights_MK, x_Kd, y_Md) + x_Kd.to(tl.float32) * D


@triton.jit
def move_on(h_Nd, dt_K, sums_K, total, x_Kd, B_KN):
    """Return the state after a whole chunk, whose last sum is `total`."""
    moving_Kd = x_Kd.to(tl.float32) * (tl.exp2(total - sums_K) * dt_K)[:, None]
    return dot_fp32(tl.trans(B_KN), moving_Kd, h_Nd * tl.exp2(total))


@triton.jit
def locate(head, part, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
           COLUMNS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Return a program's columns of x and B in rows, and its part of a state [N, d]; of each, which exist."""
    column, n = part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    B_column = HEADS * DIM + head // (HEADS // GROUPS) * SIZE + n
    state_Nd = head * (SIZE * DIM) + n[:, None] * DIM + column
    return head * DIM + column, column < DIM, B_column, n < SIZE, state_Nd, (n < SIZE)[:, None] & (column < DIM)


@triton.jit
def mamba2_decode_kernel(
    xBC,
    raw,
    A,
    D,
    dt_bias,
    state,
    inputs,
    dts,
    y,
    num_decodes,
    seq_lens,
    block_table,
    chunk_blocks,
    dt_min,
    dt_max,
    every,
    stride_raw,
    table_width,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (H * parts of d, decodes): parts of COLUMNS. PADDED: of SIZE, which is N."""
    wait_for_previous_kernel()
    PARTS: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
    STATE: tl.constexpr = HEADS * SIZE * DIM
    KEPT: tl.constexpr = HEADS * DIM + GROUPS * SIZE
    WIDTH: tl.constexpr = KEPT + GROUPS * SIZE
    sequence = tl.program_id(1)
    if sequence >= tl.load(num_decodes):
        return
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    length = tl.load(seq_lens + sequence)
    start = length - 1
    table = block_table + sequence.to(tl.int64) * table_width
    source = tl.load(table + tl.maximum(start - 1, 0) // every).to(tl.int64)
    target = tl.load(table + start // every).to(tl.int64)
    x_column, is_x, B_column, is_n, state_Nd, is_state = locate(head, part, HEADS, GROUPS, DIM, SIZE, COLUMNS, PADDED)
    h_Nd = tl.load(state + source * STATE + state_Nd, mask=is_state & (start > 0), other=0.0)
    begin = start // CHUNK * CHUNK
    # The token's inputs join the chunk's. Every head of a group stores the same B, as it cannot wait for another's.
    row = xBC + sequence.to(tl.int64) * WIDTH
    block = tl.load(chunk_blocks + sequence).to(tl.int64)
    kept = inputs + (block * CHUNK + start % CHUNK) * KEPT
    tl.store(kept + x_column, tl.load(row + x_column, mask=is_x), mask=is_x)
    tl.store(kept + B_column, tl.load(row + B_column, mask=is_n), mask=is_n)
    tl.debug_barrier()
    dt_K, sums_K = chunk_sums(
        raw, A, dt_bias, dts, block, begin, start, length, sequence, head, dt_min, dt_max, stride_raw, HEADS, CHUNK
    )
    place, now = tl.arange(0, CHUNK), start - begin
    rows, is_row = inputs + block * (CHUNK * KEPT) + place[:, None] * KEPT, (place <= now)[:, None]
    B_KN, x_Kd = (
        tl.load(rows + B_column, mask=is_row & is_n, other=0.0),
        tl.load(rows + x_column, mask=is_row & is_x, other=0.0),
    )
    is_now = (place == now)[:, None]
    C_MN = tl.load(row + (B_column + GROUPS * SIZE)[None, :], mask=is_now & is_n, other=0.0)
    sum_t = tl.sum(tl.where(place == now, sums_K, 0.0), 0)
    decay_K = tl.exp2(tl.where(place <= now, sum_t - sums_K, float("-inf"))) * dt_K
    y_Md = chunk_outputs(C_MN, B_KN, x_Kd, h_Nd, decay_K[None, :], sums_K, tl.load(D + head))
    out = y + sequence.to(tl.int64) * (HEADS * DIM) + x_column
    tl.store(tl.broadcast_to(out[None, :], y_Md.shape), y_Md.to(y.dtype.element_ty), mask=is_now & is_x)
    if part == 0:
        tl.store(dts + (block * CHUNK + place) * HEADS + head, dt_K, mask=place == now)
    is_whole = begin + CHUNK == length
    if is_whole | (source != target) | (start == 0):
        # Read again, so that it need not be kept in registers.
        h_Nd = tl.load(state + source * STATE + state_Nd, mask=is_state & (start > 0), other=0.0)
        if is_whole:
            h_Nd = move_on(h_Nd, dt_K, sums_K, sum_t, x_Kd, B_KN)
        tl.store(state + target * STATE + state_Nd, h_Nd, mask=is_state)


@triton.jit(do_not_specialize=["num_sequences"])
def chunk_sums_kernel(
    raw,
    A,
    dt_bias,
    dts,
    sums,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    chunk_blocks,
    num_sequences,
    dt_min,
    dt_max,
    stride_raw,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (H, PARTS, prefills): dt and its sums for all chunks of which prefills have tokens, in `sums` [chunks, H, 2, CHUNK].

    The chunks of a sequence whose first row is r begin at r // CHUNK + 2 s, as rows of CHUNK tokens lie in two chunks at most.
    """
    wait_for_previous_kernel()
    sequence, head = tl.load(num_decodes) + tl.program_id(2), tl.program_id(0)
    if sequence >= num_sequences:
        return
    first_row, length = tl.load(cu_seqlens_q + sequence), tl.load(seq_lens + sequence)
    start = length - (tl.load(cu_seqlens_q + sequence + 1) - first_row)
    block = tl.load(chunk_blocks + sequence).to(tl.int64)
    begin = start // CHUNK * CHUNK
    number = first_row // CHUNK + 2 * sequence
    for chunk in range(tl.program_id(1), (length - begin + CHUNK - 1) // CHUNK, PARTS):
        dt_K, sums_K = chunk_sums(
            raw, A, dt_bias, dts, block, begin + chunk * CHUNK, start, length, first_row, head, dt_min, dt_max, stride_raw,
            HEADS, CHUNK,
        )  # fmt: skip
        at = sums + ((number + chunk).to(tl.int64) * HEADS + head) * (2 * CHUNK) + tl.arange(0, CHUNK)
        tl.store(at, dt_K)
        tl.store(at + CHUNK, sums_K)


@triton.jit(do_not_specialize=["num_sequences"])
def mamba2_prefill_kernel(
    xBC,
    sums,
    D,
    state,
    inputs,
    y,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    block_table,
    chunk_blocks,
    num_sequences,
    every,
    table_width,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (H * parts of d, prefills), see `mamba2_decode_kernel`; `sums` is of `chunk_sums_kernel`."""
    wait_for_previous_kernel()
    PARTS: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
    STATE: tl.constexpr = HEADS * SIZE * DIM
    KEPT: tl.constexpr = HEADS * DIM + GROUPS * SIZE
    WIDTH: tl.constexpr = KEPT + GROUPS * SIZE
    sequence = tl.load(num_decodes) + tl.program_id(1)
    if sequence >= num_sequences:
        return
    head, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    first_row = tl.load(cu_seqlens_q + sequence)
    length = tl.load(seq_lens + sequence)
    start = length - (tl.load(cu_seqlens_q + sequence + 1) - first_row)
    if start == length:
        return
    table = block_table + sequence.to(tl.int64) * table_width
    x_column, is_x, B_column, is_n, state_Nd, is_state = locate(head, part, HEADS, GROUPS, DIM, SIZE, COLUMNS, PADDED)
    place, skip = tl.arange(0, CHUNK), tl.load(D + head)
    first_chunk = start // CHUNK
    sums += ((first_row // CHUNK + 2 * sequence).to(tl.int64) * HEADS + head) * (2 * CHUNK)
    # The block that holds the state as it is in registers; -1: none does.
    held = tl.where(start > 0, tl.load(table + tl.maximum(start - 1, 0) // every), -1)
    h_Nd = tl.load(state + tl.maximum(held, 0).to(tl.int64) * STATE + state_Nd, mask=is_state & (held >= 0), other=0.0)
    for interval in range(start // every, (length + every - 1) // every):
        first, end = tl.maximum(interval * every, first_chunk * CHUNK), tl.minimum((interval + 1) * every, length)
        # What a turn needs is computed in it: registers are scarce.
        for begin in tl.range(first, end, CHUNK, disable_licm=True):
            row = (first_row + begin - start).to(tl.int64)
            new = xBC + row * WIDTH + place[:, None] * WIDTH
            is_old = (begin + place < start)[:, None]
            is_new = (begin + place < length)[:, None] & ~is_old
            C_MN = tl.load(new + (B_column + GROUPS * SIZE), mask=is_new & is_n, other=0.0)
            B_KN = tl.load(new + B_column, mask=is_new & is_n, other=0.0)
            x_Kd = tl.load(new + x_column, mask=is_new & is_x, other=0.0)
            if begin < start:  # here, as registers are scarce
                stored = inputs + tl.load(chunk_blocks + sequence).to(tl.int64) * (CHUNK * KEPT) + place[:, None] * KEPT
                B_KN += tl.load(stored + B_column, mask=is_old & is_n, other=0.0)
                x_Kd += tl.load(stored + x_column, mask=is_old & is_x, other=0.0)
            at = sums + (begin // CHUNK - first_chunk) * (HEADS * 2 * CHUNK)
            dt_K, sums_K = tl.load(at + place), tl.load(at + CHUNK + place)
            difference_MK = tl.where(place[:, None] >= place[None, :], sums_K[:, None] - sums_K[None, :], float("-inf"))
            y_Md = chunk_outputs(C_MN, B_KN, x_Kd, h_Nd, tl.exp2(difference_MK) * dt_K[None, :], sums_K, skip)
            out = y + row * (HEADS * DIM) + place[:, None] * (HEADS * DIM) + x_column
            tl.store(out, y_Md.to(y.dtype.element_ty), mask=is_new & is_x)
            if begin + CHUNK <= length:
                h_Nd = move_on(h_Nd, dt_K, sums_K, tl.load(at + 2 * CHUNK - 1), x_Kd, B_KN)
                held = -1
        target = tl.load(table + interval)
        # The state goes on in its block: it is stored where the step or the block ends.
        follower = tl.load(table + tl.minimum(end, length - 1) // every)
        if ((end == length) | (follower != target)) & (held != target):
            tl.store(state + target.to(tl.int64) * STATE + state_Nd, h_Nd, mask=is_state)
            held = target


@triton.jit(do_not_specialize=["num_sequences"])
def keep_inputs_kernel(
    xBC,
    raw,
    dt_bias,
    inputs,
    dts,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    chunk_blocks,
    num_sequences,
    dt_min,
    dt_max,
    stride_raw,
    HEADS: tl.constexpr,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid (columns, prefills): store the inputs of chunks that are left unfinished."""
    wait_for_previous_kernel()
    sequence = tl.load(num_decodes) + tl.program_id(1)
    if sequence >= num_sequences:
        return
    end_row = tl.load(cu_seqlens_q + sequence + 1)
    length = tl.load(seq_lens + sequence)
    place = tl.arange(0, CHUNK)
    row = (end_row - length % CHUNK + place).to(tl.int64)
    is_kept = (place < length % CHUNK) & (row >= tl.load(cu_seqlens_q + sequence))
    stored = tl.load(chunk_blocks + sequence).to(tl.int64) * CHUNK + place
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = is_kept[:, None] & (column < KEPT)
    tl.store(
        inputs + (stored * KEPT)[:, None] + column, tl.load(xBC + (row * WIDTH)[:, None] + column, mask=mask), mask=mask
    )
    if tl.program_id(0) == 0:
        head = tl.arange(0, PADDED_HEADS)
        is_step = is_kept[:, None] & (head < HEADS)
        value = tl.load(raw + (row * stride_raw)[:, None] + head, mask=is_step, other=0.0)
        bias = tl.load(dt_bias + head, mask=head < HEADS, other=0.0)[None, :]
        tl.store(dts + (stored * HEADS)[:, None] + head, discretize(value, bias, dt_min, dt_max), mask=is_step)


def constexprs(heads: int, groups: int, dim: int, size: int, columns: int) -> dict[str, int]:
    """Return the compile-time arguments of the kernels for decodes and prefills, with so many columns a program at most."""
    d, padded = (max(16, triton.next_power_of_2(number)) for number in (dim, size))
    return {
        "HEADS": heads, "GROUPS": groups, "DIM": dim, "SIZE": size, "COLUMNS": min(d, columns), "PADDED": padded,
        "CHUNK": CHUNK,
    }  # fmt: skip


def keep_constexprs(heads: int, groups: int, dim: int, size: int) -> dict[str, int]:
    """Return those of `keep_inputs_kernel`."""
    kept = heads * dim + groups * size
    return {
        "HEADS": heads, "KEPT": kept, "WIDTH": kept + groups * size, "COLUMNS": 64,
        "PADDED_HEADS": triton.next_power_of_2(heads), "CHUNK": CHUNK,
    }  # fmt: skip


# The kernels have to agree on every rounding.
OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
NUM_WARPS = 4
DECODE_COLUMNS, PREFILL_COLUMNS = 32, 64  # of a state in a program
SUMS_PARTS, SUMS_WARPS = 16, 1


def mamba2(xBC_TD: Tensor, dt_TH: Tensor, weights: Mamba2Weights, cache: Mamba2Cache, states: StateMetadata) -> Tensor:
    """Run `kernels.ops.mamba2.reference`; rows that belong to no sequence are not written."""
    seqs, blocks_S = states.seqs, states.chunk_blocks_S
    assert blocks_S is not None, "no blocks of the chunk cache"
    assert xBC_TD.is_contiguous(), f"strides {xBC_TD.stride()} of shape {tuple(xBC_TD.shape)}"
    assert dt_TH.stride(1) == 1, f"strides {dt_TH.stride()} of dt"
    assert all(tensor.is_contiguous() for tensor in (*cache, blocks_S)), [tensor.stride() for tensor in cache]
    assert cache.inputs_BsD.dtype == xBC_TD.dtype, f"inputs {cache.inputs_BsD.dtype} of {xBC_TD.dtype}"
    heads, size, dim = weights.A_H.shape[0], weights.state_size, weights.head_dim
    assert cache.state_BHNd.shape[1:] == (heads, size, dim), f"states {tuple(cache.state_BHNd.shape)}"
    assert cache.inputs_BsD.shape[1:] == (CHUNK, weights.stored_width), f"inputs {tuple(cache.inputs_BsD.shape)}"
    y_TD, shape = xBC_TD.new_empty(xBC_TD.shape[0], weights.widths[0]), (heads, weights.num_groups, dim, size)
    tensors = xBC_TD, dt_TH, weights.A_H, weights.D_H, weights.dt_bias_H, *cache, y_TD, seqs.num_decodes
    limits = weights.dt_min, weights.dt_max
    if seqs.max_decodes:
        shapes = constexprs(*shape, DECODE_COLUMNS)
        mamba2_decode_kernel[heads * triton.cdiv(dim, shapes["COLUMNS"]), seqs.max_decodes](
            *tensors, seqs.seq_lens, seqs.block_table, blocks_S, *limits, states.interval, dt_TH.stride(0),
            seqs.block_table.stride(0), **shapes, num_warps=NUM_WARPS, **OPTIONS, **PDL,
        )  # fmt: skip
    if seqs.max_prefill_tokens:
        shapes, keep = constexprs(*shape, PREFILL_COLUMNS), keep_constexprs(*shape)
        sequences = seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens
        # No more chunks: see `chunk_sums_kernel`.
        sums = dt_TH.new_empty(len(dt_TH) // CHUNK + 2 * seqs.num_sequences, heads, 2, CHUNK, dtype=torch.float32)
        chunk_sums_kernel[heads, SUMS_PARTS, seqs.max_prefills](
            dt_TH, weights.A_H, weights.dt_bias_H, cache.dt_BsH, sums, *sequences, blocks_S, seqs.num_sequences, *limits,
            dt_TH.stride(0), HEADS=heads, CHUNK=CHUNK, PARTS=SUMS_PARTS, num_warps=SUMS_WARPS, **OPTIONS, **PDL,
        )  # fmt: skip
        mamba2_prefill_kernel[heads * triton.cdiv(dim, shapes["COLUMNS"]), seqs.max_prefills](
            xBC_TD, sums, weights.D_H, *cache[:2], y_TD, *sequences, seqs.block_table, blocks_S, seqs.num_sequences,
            states.interval, seqs.block_table.stride(0), **shapes, num_warps=NUM_WARPS, **OPTIONS, **PDL,
        )  # fmt: skip
        # Not by the kernel before: what one program stores is where another may still read the sequence's first chunk.
        keep_inputs_kernel[triton.cdiv(keep["KEPT"], keep["COLUMNS"]), seqs.max_prefills](
            xBC_TD, dt_TH, weights.dt_bias_H, *cache[1:], *sequences, blocks_S,
            seqs.num_sequences, *limits, dt_TH.stride(0), **keep, num_warps=4, **OPTIONS, **PDL,
        )  # fmt: skip
    return y_TD
