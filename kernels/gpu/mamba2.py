"""Mamba-2's recurrence in Triton: `kernels.ops.mamba2`.

A program takes a head, or a part of its d, of one sequence. That of a prefill loops over the chunks of which a step has tokens,
with the state in registers. A decode's computes its token's chunk by the same code, with one live row: products have the rows
of a whole chunk, as tensor cores take 64 of them anyway, so that its bits are those of a prefill. It reads the state and the
chunk's stored inputs and, but once in 64 tokens, writes no state.

Products of fp32 numbers (the state, weights of tokens, inputs that move the state) with numbers of the model's 16 bits are two
products: of the upper and of the lower half of the fp32 number. Numbers of fp32 models are multiplied as three products of
tf32, for which registers do not suffice: such models are for tests.

T tokens, D width of the rows, H heads of d numbers, N numbers of the state for each of them, B blocks, S sequences. In the
kernels M are the positions of a chunk that read, K those that are read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.ops.mamba2 import CHUNK, Mamba2Cache, Mamba2Weights
from expertwire.kernels.ops.recurrent import StateMetadata


@triton.jit
def softplus(x):
    """Return log(1 + e^x) to a few last bits, for small results too."""
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)  # log(1 + e) = 2 artanh(z), z <= 1/3
    w = z * z
    p = 1.0 / 15
    for i in tl.static_range(7):
        p = tl.fma(p, w, 1.0 / (13 - 2 * i))
    return tl.maximum(x, 0.0) + 2.0 * z * p


@triton.jit
def discretize(raw, bias, dt_min, dt_max):
    """Return steps dt."""
    return tl.minimum(tl.maximum(softplus(raw.to(tl.float32) + bias), dt_min), dt_max)


@triton.jit
def dot_fp32(a, b, acc):
    """Return acc + a b, where one of them is fp32 and the other has the model's numbers."""
    if a.dtype == b.dtype:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    elif a.dtype == tl.float32:
        upper = a.to(b.dtype)
        acc = tl.dot((a - upper.to(tl.float32)).to(b.dtype), b, acc)
        acc = tl.dot(upper, b, acc)
    else:
        upper = b.to(a.dtype)
        acc = tl.dot(a, (b - upper.to(tl.float32)).to(a.dtype), acc)
        acc = tl.dot(a, upper, acc)
    return acc


@triton.jit
def load_rows(new, new_K, is_new_K, stored, stored_K, is_stored_K, column, exists, DECODE: tl.constexpr):
    """Return columns [K, *] of a chunk's rows: the step's, and those of earlier steps. A decode has stored its own."""
    old = tl.load(stored + stored_K[:, None] + column, mask=is_stored_K[:, None] & exists, other=0.0)
    if not DECODE:
        found = tl.load(new + new_K[:, None] + column, mask=is_new_K[:, None] & exists, other=0.0)
        old = tl.where(is_stored_K[:, None], old, found)
    return old


@triton.jit
def locate(head, part, HEADS: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr,
           COLUMNS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Return a program's columns of x and B in rows, and its part of a state [N, d]; of each, which exist."""
    column, n = part * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, PADDED)
    B_column = HEADS * DIM + head // (HEADS // GROUPS) * SIZE + n
    state_Nd = head * (SIZE * DIM) + n[:, None] * DIM + column
    return head * DIM + column, column < DIM, B_column, n < SIZE, state_Nd, (n < SIZE)[:, None] & (column < DIM)


@triton.jit
def chunk_outputs(
    xBC,
    raw,
    A,
    D,
    dt_bias,
    inputs,
    dts,
    y,
    block,
    dt_min,
    dt_max,
    stride_raw,
    first_row,
    begin,
    start,
    length,
    h_Nd,
    head,
    part,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Store a head's outputs for the tokens of the chunk from position `begin` on, from the state before it.

    The step has tokens from `start` to `length`, in rows from `first_row` on. `block` is the sequence's of the chunk cache.
    Return what the state needs to move on: dt and its sums, x and B.
    """
    KEPT: tl.constexpr = HEADS * DIM + GROUPS * SIZE
    WIDTH: tl.constexpr = KEPT + GROUPS * SIZE
    x_column, is_x, B_column, is_n, _, _ = locate(head, part, HEADS, GROUPS, DIM, SIZE, COLUMNS, PADDED)
    place = tl.arange(0, CHUNK)
    position = begin + place
    is_new, is_stored = (position >= start) & (position < length), position < (length if DECODE else start)
    row = (first_row + position - start).to(tl.int64)
    stored = block * CHUNK + place
    raw_K = tl.load(raw + row * stride_raw + head, mask=is_new, other=0.0)
    dt_K = discretize(raw_K, tl.load(dt_bias + head), dt_min, dt_max)
    dt_K = tl.where(is_new, dt_K, tl.load(dts + stored * HEADS + head, mask=position < start, other=0.0))
    sums_K = tl.cumsum(dt_K * tl.load(A + head), 0)
    rows = xBC, row * WIDTH, is_new, inputs, stored * KEPT, is_stored
    B_KN = load_rows(*rows, B_column, is_n, DECODE)
    C_MN = tl.load(xBC + (row * WIDTH)[:, None] + (B_column + GROUPS * SIZE), mask=is_new[:, None] & is_n, other=0.0)
    scores_MK = tl.dot(C_MN, tl.trans(B_KN), input_precision="tf32x3")
    if DECODE:  # one row is enough
        sum_t = tl.sum(tl.where(is_new, sums_K, 0.0), 0)
        decay_MK = (tl.exp(tl.minimum(sum_t - sums_K, 0.0)) * dt_K)[None, :]
    else:
        decay_MK = tl.exp(tl.minimum(sums_K[:, None] - sums_K[None, :], 0.0)) * dt_K[None, :]
    weights_MK = tl.where(place[:, None] >= place[None, :], decay_MK * scores_MK, 0.0)
    y_Md = dot_fp32(C_MN, h_Nd, tl.zeros([CHUNK, COLUMNS], tl.float32)) * tl.exp(sums_K)[:, None]
    x_Kd = load_rows(*rows, x_column, is_x, DECODE)
    y_Md = dot_fp32(weights_MK, x_Kd, y_Md)
    y_Md += x_Kd.to(tl.float32) * tl.load(D + head)
    out = y + (row * (HEADS * DIM))[:, None] + x_column
    tl.store(out, y_Md.to(y.dtype.element_ty), mask=is_new[:, None] & is_x)
    return dt_K, sums_K, x_Kd, B_KN


@triton.jit
def move_on(h_Nd, dt_K, sums_K, x_Kd, B_KN, CHUNK: tl.constexpr):
    """Return the state after a whole chunk."""
    total = tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, sums_K, 0.0), 0)
    moving_Kd = x_Kd.to(tl.float32) * (tl.exp(tl.minimum(total - sums_K, 0.0)) * dt_K)[:, None]
    return dot_fp32(tl.trans(B_KN), moving_Kd, h_Nd * tl.exp(total))


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
    moving = chunk_outputs(
        xBC, raw, A, D, dt_bias, inputs, dts, y, block, dt_min, dt_max, stride_raw, sequence, begin, start, length, h_Nd,
        head, part, HEADS, GROUPS, DIM, SIZE, COLUMNS, PADDED, CHUNK, True,
    )  # fmt: skip
    if part == 0:
        place = tl.arange(0, CHUNK)
        tl.store(dts + (block * CHUNK + place) * HEADS + head, moving[0], mask=begin + place == start)
    is_whole = begin + CHUNK == length
    if is_whole | (source != target) | (start == 0):
        # Read again, so that it need not be kept in registers.
        h_Nd = tl.load(state + source * STATE + state_Nd, mask=is_state & (start > 0), other=0.0)
        if is_whole:
            h_Nd = move_on(h_Nd, *moving, CHUNK)
        tl.store(state + target * STATE + state_Nd, h_Nd, mask=is_state)


@triton.jit(do_not_specialize=["num_sequences"])
def mamba2_prefill_kernel(
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
    cu_seqlens_q,
    seq_lens,
    block_table,
    chunk_blocks,
    num_sequences,
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
    """Grid (H * parts of d, prefills), see `mamba2_decode_kernel`."""
    wait_for_previous_kernel()
    PARTS: tl.constexpr = (DIM + COLUMNS - 1) // COLUMNS
    STATE: tl.constexpr = HEADS * SIZE * DIM
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
    _, _, _, _, state_Nd, is_state = locate(head, part, HEADS, GROUPS, DIM, SIZE, COLUMNS, PADDED)
    # The block that holds the state as it is in registers; -1: none does.
    held = tl.where(start > 0, tl.load(table + tl.maximum(start - 1, 0) // every), -1)
    h_Nd = tl.load(state + tl.maximum(held, 0).to(tl.int64) * STATE + state_Nd, mask=is_state & (held >= 0), other=0.0)
    # What a turn needs is computed in it: registers are scarce.
    for begin in tl.range(start // CHUNK * CHUNK, length, CHUNK, disable_licm=True):
        block = tl.load(chunk_blocks + sequence).to(tl.int64)
        moving = chunk_outputs(
            xBC, raw, A, D, dt_bias, inputs, dts, y, block, dt_min, dt_max, stride_raw, first_row, begin, start, length,
            h_Nd, head, part, HEADS, GROUPS, DIM, SIZE, COLUMNS, PADDED, CHUNK, False,
        )  # fmt: skip
        if begin + CHUNK <= length:
            h_Nd = move_on(h_Nd, *moving, CHUNK)
            held = -1
        end = tl.minimum(begin + CHUNK, length)
        target = tl.load(table + begin // every)
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


def constexprs(heads: int, groups: int, dim: int, size: int) -> dict[str, int]:
    """Return the compile-time arguments of the kernels for decodes and prefills."""
    columns, padded = (max(16, triton.next_power_of_2(number)) for number in (dim, size))
    return {
        "HEADS": heads, "GROUPS": groups, "DIM": dim, "SIZE": size, "COLUMNS": min(columns, 32), "PADDED": padded,
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
DECODE_WARPS, PREFILL_WARPS = 4, 8  # so that registers suffice


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
    shapes, keep = constexprs(*shape), keep_constexprs(*shape)
    programs, limits = heads * triton.cdiv(dim, shapes["COLUMNS"]), (weights.dt_min, weights.dt_max)
    tensors = xBC_TD, dt_TH, weights.A_H, weights.D_H, weights.dt_bias_H, *cache, y_TD, seqs.num_decodes
    numbers = *limits, states.interval, dt_TH.stride(0), seqs.block_table.stride(0)
    if seqs.max_decodes:
        mamba2_decode_kernel[programs, seqs.max_decodes](
            *tensors, seqs.seq_lens, seqs.block_table, blocks_S, *numbers, **shapes, num_warps=DECODE_WARPS, **OPTIONS, **PDL
        )  # fmt: skip
    if seqs.max_prefill_tokens:
        mamba2_prefill_kernel[programs, seqs.max_prefills](
            *tensors, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table, blocks_S, seqs.num_sequences, *numbers, **shapes,
            num_warps=PREFILL_WARPS, **OPTIONS, **PDL,
        )  # fmt: skip
        # Not by the kernel before: what one program stores is where another may still read the sequence's first chunk.
        keep_inputs_kernel[triton.cdiv(keep["KEPT"], keep["COLUMNS"]), seqs.max_prefills](
            xBC_TD, dt_TH, weights.dt_bias_H, *cache[1:], seqs.num_decodes, seqs.cu_seqlens_q, seqs.seq_lens, blocks_S,
            seqs.num_sequences, *limits, dt_TH.stride(0), **keep, num_warps=4, **OPTIONS, **PDL,
        )  # fmt: skip
    return y_TD
