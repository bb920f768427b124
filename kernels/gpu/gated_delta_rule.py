"""The gated delta rule in Triton: decodes and prefills in one kernel; in `fast` mode decodes have their own.

A program takes one sequence, one head and some columns of its state, and goes through the chunks that the step has tokens
of: products by `tl.dot` for all 64 rows of a chunk, present or not, then a loop over the present ones that solves for u,
each from the rows before it. A decode and a prefill thus run the same instructions of the same kernel for a token, and its
bits do not depend on how steps cut its sequence as long as a row of `tl.dot` depends on nothing but itself, as attention
assumes too (`attention`). The interpreter shows the rest; a GPU has yet to show this. (The inverse of the triangular matrix
would replace the loop by products, but needs what all tokens of a chunk are before earlier ones are subtracted: of old ones the
results alone are known, and a row would depend on which those are.)

Products are of fp32. For bf16 models operands are rounded to TF32, whose 10 bits of mantissa are three more than those of
bf16; for fp32 models each is three products of TF32, whose error is about that of fp32.

The kernel of `fast` decodes reads the state and the chunk once, and multiplies in fp32 without matrix instructions. As
prefills then need not share its bits, they do take the inverse (Yang, Wang, Zhang, Shen and Kim, "Parallelizing Linear
Transformers with the Delta Rule over Sequence Length", 2024), which depends on no state and has a kernel of its own, for all
chunks side by side.

The state goes through global memory, where the L2 cache keeps it, from chunk to chunk, and keys are read twice: registers
are what the kernel is short of.

T tokens, S sequences, D width of the rows, H heads of values (and of the recurrent mixer), G heads of keys, d and v their
sizes, B blocks, s positions of a block of the chunk cache, M rows of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.ops.gated_delta_rule import CHUNK, EPS, DeltaCache
from expertwire.kernels.ops.recurrent import StateMetadata

_COLUMNS = 32  # of the state in a program
PARTS = 16  # programs that share the inverses of a sequence's chunks
NUM_WARPS = 8
DECODE_WARPS = 8


@triton.jit
def _normalised(x_Md, mask, EPS: tl.constexpr):
    """Load rows from pointers and divide them by their norms."""
    x = tl.load(x_Md, mask=mask, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) + EPS)[:, None]


@triton.jit
def _keys(new_Md, is_new, old_Md, is_old, EPS: tl.constexpr):
    """Return the keys of a chunk, from the step and from the cache; zeros where there are none."""
    return _normalised(new_Md, is_new[:, None], EPS) + tl.load(old_Md, mask=is_old[:, None], other=0.0)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _row(matrix, is_row):
    """Return one row of a matrix, exactly."""
    return tl.sum(tl.where(is_row[:, None], matrix, 0.0), 0)


@triton.jit
def _solve(weights, wanted, beta, u, first, end, CHUNK: tl.constexpr):
    """Return u with rows `first` to `end` computed, each from those before it."""
    place = tl.arange(0, CHUNK)
    for i in range(first, end):
        is_row = place == i
        known = tl.sum(_row(weights, is_row)[:, None] * u, 0)
        found = tl.sum(tl.where(is_row, beta, 0.0), 0) * (_row(wanted, is_row) - known)
        u = tl.where(is_row[:, None], found[None, :], u)
    return u


@triton.jit
def _inverse(matrix, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Return the inverse of 1 + N for a strictly lower triangular matrix N.

    D, the inverses of its blocks on the diagonal, are found row by row in all of them at once. With M = D times the rest of N,
    which has no more than three blocks above one another, the whole is (1 - M) (1 + M^2) D.
    """
    NUM: tl.constexpr = 4
    BLOCK: tl.constexpr = CHUNK // NUM
    place, block, inner = tl.arange(0, CHUNK), tl.arange(0, NUM), tl.arange(0, BLOCK)
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(on_diagonal, tl.reshape(matrix, (NUM, BLOCK, NUM, BLOCK)), 0.0), 2)
    inverse = tl.zeros((NUM, BLOCK, BLOCK), tl.float32) + tl.where(inner[:, None] == inner[None, :], 1.0, 0.0)[None]
    for i in range(1, BLOCK):
        is_row = (inner == i)[None, :, None]
        row = tl.sum(tl.where(is_row, diagonal, 0.0), 1)
        inverse = tl.where(is_row, inverse - tl.sum(row[:, :, None] * inverse, 1)[:, None, :], inverse)
    inverse = tl.reshape(tl.where(on_diagonal, inverse[:, :, None, :], 0.0), (CHUNK, CHUNK))
    rest = tl.where(place[:, None] // BLOCK == place[None, :] // BLOCK, 0.0, matrix)
    moved = tl.dot(inverse, rest, input_precision=PRECISION)
    inverse += tl.dot(moved, tl.dot(moved, inverse, input_precision=PRECISION), input_precision=PRECISION)
    return inverse - tl.dot(moved, inverse, input_precision=PRECISION)


@triton.jit
def inverse_kernel(
    qkv,
    a,
    b,
    A,
    dt_bias,
    inverse,
    k_cache,
    g_cache,
    num_decodes,
    cu_seqlens_q,
    seq_lens,
    chunk_blocks,
    stride_token,
    stride_a,
    stride_b,
    G: tl.constexpr,
    H: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (sequences, H, PARTS): for the new rows of prefills' chunks, rows of the inverse [T, H, CHUNK] by which u follows
    from what is wanted in new rows, and u in old ones."""
    wait_for_previous_kernel()
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_row, length = tl.load(cu_seqlens_q + sequence), tl.load(seq_lens + sequence)
    start = length - (tl.load(cu_seqlens_q + sequence + 1) - first_row)
    if (start == length) | (sequence < tl.load(num_decodes)):
        return
    group = head // (H // G)
    rate, bias = tl.load(A + head), tl.load(dt_bias + head)
    slot = tl.load(chunk_blocks + sequence).to(tl.int64) * CHUNK
    for begin in tl.range((start // CHUNK + tl.program_id(2)) * CHUNK, length, PARTS * CHUNK, disable_licm=True):
        place, dim = tl.arange(0, CHUNK), tl.arange(0, DIM)
        first, end = tl.maximum(start - begin, 0), tl.minimum(length - begin, CHUNK)
        is_old, is_new = place < first, (place >= first) & (place < end)
        row = (first_row + begin - start).to(tl.int64)
        time = tl.load(a + row * stride_a + head + place * stride_a, mask=is_new, other=0.0).to(tl.float32)
        g = tl.load(g_cache + slot * H + head + place * H, mask=is_old, other=0.0)
        decay = tl.cumsum(tl.where(is_new, rate * _softplus(time + bias), g), 0)
        beta = tl.load(b + row * stride_b + head + place * stride_b, mask=is_new, other=0.0).to(tl.float32)
        new = qkv + row * stride_token + (G + group) * DIM + place[:, None] * stride_token + dim
        k = _keys(new, is_new, k_cache + (slot * G + group) * DIM + place[:, None] * (G * DIM) + dim, is_old, EPS)
        is_met = (place[:, None] > place[None, :]) & is_new[:, None]
        faded = tl.exp(tl.where(is_met, decay[:, None] - decay[None, :], 0.0)) * tl.sigmoid(beta)[:, None]
        found = tl.where(is_met, faded * tl.dot(k, tl.trans(k), input_precision=PRECISION), 0.0)
        found = _inverse(found, CHUNK, PRECISION)
        target = inverse + (row * H + head) * CHUNK + place[:, None] * (H * CHUNK) + place
        tl.store(target, found, mask=is_new[:, None])


@triton.jit
def _state_at(
    cache, table, interval, head, H: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Return pointers [d, COLUMNS] to a program's part of an interval's state."""
    first = (tl.load(table + interval).to(tl.int64) * H + head) * DIM * SIZE + tl.program_id(2) * COLUMNS
    return cache + first + tl.arange(0, DIM)[:, None] * SIZE + tl.arange(0, COLUMNS)


@triton.jit(do_not_specialize=["every", "state_width"])
def gated_delta_rule_kernel(
    qkv,
    a,
    b,
    A,
    dt_bias,
    out,
    state_cache,
    k_cache,
    u_cache,
    g_cache,
    num_decodes,
    inverse,
    cu_seqlens_q,
    seq_lens,
    state_table,
    chunk_blocks,
    stride_token,
    stride_a,
    stride_b,
    every,
    state_width,
    G: tl.constexpr,
    H: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_DECODES: tl.constexpr,
):
    """Grid (sequences, H, v / COLUMNS). `inverse`: of `inverse_kernel`, without decodes."""
    wait_for_previous_kernel()
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first_row, length = tl.load(cu_seqlens_q + sequence), tl.load(seq_lens + sequence)
    start = length - (tl.load(cu_seqlens_q + sequence + 1) - first_row)
    first_sequence = 0 if WITH_DECODES else tl.load(num_decodes)
    if (start == length) | (sequence < first_sequence):
        return
    group = head // (H // G)
    state_table += sequence * state_width
    rate, bias = tl.load(A + head), tl.load(dt_bias + head)
    # What every chunk computes alike would occupy registers: it is not hoisted.
    for begin in tl.range(start // CHUNK * CHUNK, length, CHUNK, disable_licm=True):
        place, dim, column = tl.arange(0, CHUNK), tl.arange(0, DIM), tl.arange(0, COLUMNS)
        token_at, key_at = place[:, None] * stride_token + dim, place[:, None] * (G * DIM) + dim
        value_at = place[:, None] * (H * SIZE) + column
        first, end = tl.maximum(start - begin, 0), tl.minimum(length - begin, CHUNK)
        is_old, is_new = place < first, (place >= first) & (place < end)
        # Where the chunk begins, in the step and in its cache: offsets from there are small.
        row = (first_row + begin - start).to(tl.int64)
        slot = tl.load(chunk_blocks + sequence).to(tl.int64) * CHUNK
        new_q = qkv + row * stride_token + group * DIM
        new_v = qkv + row * stride_token + 2 * G * DIM + head * SIZE + tl.program_id(2) * COLUMNS
        keys = k_cache + (slot * G + group) * DIM
        values = u_cache + (slot * H + head) * SIZE + tl.program_id(2) * COLUMNS
        decays = g_cache + slot * H + head
        time = tl.load(a + row * stride_a + head + place * stride_a, mask=is_new, other=0.0).to(tl.float32)
        g = tl.load(decays + place * H, mask=is_old, other=0.0)
        g = tl.where(is_new, rate * _softplus(time + bias), g)
        decay, last = tl.cumsum(g, 0), tl.sum(g, 0)
        beta = tl.load(b + row * stride_b + head + place * stride_b, mask=is_new, other=0.0).to(tl.float32)
        v = tl.load(new_v + place[:, None] * stride_token + column, mask=is_new[:, None], other=0.0).to(tl.float32)
        # Before the sequence there are zeros; block 0 is never that of a state.
        position = tl.maximum(tl.maximum(start, begin) - 1, 0)
        source = _state_at(state_cache, state_table, position // every, head, H, DIM, SIZE, COLUMNS)
        k = _keys(new_q + G * DIM + token_at, is_new, keys + key_at, is_old, EPS)
        state = tl.load(source, mask=begin > 0, other=0.0)
        wanted = v - tl.exp(decay)[:, None] * tl.dot(k, state, input_precision=PRECISION)
        u = tl.load(values + value_at, mask=is_old[:, None], other=0.0)
        if WITH_DECODES:
            is_before = place[:, None] > place[None, :]
            faded = tl.exp(tl.where(is_before, decay[:, None] - decay[None, :], 0.0))
            weights = tl.where(is_before, faded * tl.dot(k, tl.trans(k), input_precision=PRECISION), 0.0)
            u = _solve(weights, wanted, tl.sigmoid(beta), u, first, end, CHUNK)
        else:
            u = tl.where(is_new[:, None], tl.sigmoid(beta)[:, None] * wanted, u)
            at = inverse + (row * H + head) * CHUNK + place[:, None] * (H * CHUNK) + place
            solved = tl.dot(tl.load(at, mask=is_new[:, None], other=0.0), u, input_precision=PRECISION)
            u = tl.where(is_new[:, None], solved, u)

        # Keys and state are read again, rather than kept in registers. The compiler takes no value from before a barrier.
        tl.debug_barrier()
        k = _keys(new_q + G * DIM + token_at, is_new, keys + key_at, is_old, EPS)
        state = tl.load(source, mask=begin > 0, other=0.0)
        q = _normalised(new_q + token_at, is_new[:, None], EPS) * (DIM**-0.5)
        seen = place[:, None] >= place[None, :]
        faded = tl.exp(tl.where(seen, decay[:, None] - decay[None, :], 0.0))
        weights = tl.where(seen, faded * tl.dot(q, tl.trans(k), input_precision=PRECISION), 0.0)
        known = tl.exp(decay)[:, None] * tl.dot(q, state, input_precision=PRECISION)
        o = tl.dot(weights, u, known, input_precision=PRECISION)
        found = out + (row * H + head) * SIZE + tl.program_id(2) * COLUMNS
        tl.store(found + value_at, o.to(out.dtype.element_ty), mask=is_new[:, None])

        if end == CHUNK:
            k *= tl.exp(last - decay)[:, None]
            state = tl.dot(tl.trans(k), u, tl.exp(last) * state, input_precision=PRECISION)
        else:
            tl.store(values + value_at, u, mask=is_new[:, None])
            # Other programs may still read an earlier chunk's: then `store_kernel` does it.
            if (tl.program_id(2) == 0) & (begin <= start):
                tl.store(decays + place * H, g, mask=is_new)
                if head % (H // G) == 0:
                    tl.store(keys + key_at, k, mask=is_new[:, None])
        # Within a block, a state is stored where it moves on; a new block also has it as it was.
        if (end == CHUNK) | ((begin % every == 0) & (first == 0)):
            target = _state_at(state_cache, state_table, begin // every, head, H, DIM, SIZE, COLUMNS)
            tl.store(target, state)
        tl.debug_barrier()  # before the next chunk reads it


@triton.jit
def store_kernel(
    qkv,
    a,
    A,
    dt_bias,
    k_cache,
    g_cache,
    cu_seqlens_q,
    seq_lens,
    chunk_blocks,
    stride_token,
    stride_a,
    G: tl.constexpr,
    H: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    EPS: tl.constexpr,
):
    """Grid (sequences, G): keep keys and decays of an unfinished chunk that begins within the step."""
    wait_for_previous_kernel()
    sequence, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end_row, length = tl.load(cu_seqlens_q + sequence + 1), tl.load(seq_lens + sequence)
    start = length - (end_row - tl.load(cu_seqlens_q + sequence))
    begin = length // CHUNK * CHUNK
    if (begin <= start) | (begin == length):
        return
    place, dim = tl.arange(0, CHUNK), tl.arange(0, DIM)
    is_new = place < length - begin
    row = (end_row - (length - begin)).to(tl.int64)
    slot = tl.load(chunk_blocks + sequence).to(tl.int64) * CHUNK
    token = qkv + row * stride_token + (G + group) * DIM
    k = _normalised(token + place[:, None] * stride_token + dim, is_new[:, None], EPS)
    tl.store(k_cache + (slot * G + group) * DIM + place[:, None] * (G * DIM) + dim, k, mask=is_new[:, None])
    for head in range(group * (H // G), (group + 1) * (H // G)):
        time = tl.load(a + row * stride_a + head + place * stride_a, mask=is_new, other=0.0).to(tl.float32)
        g = tl.load(A + head) * _softplus(time + tl.load(dt_bias + head))
        tl.store(g_cache + slot * H + head + place * H, g, mask=is_new)


@triton.jit(do_not_specialize=["every", "state_width"])
def decode_kernel(
    qkv,
    a,
    b,
    A,
    dt_bias,
    out,
    state_cache,
    k_cache,
    u_cache,
    g_cache,
    num_decodes,
    seq_lens,
    state_table,
    chunk_blocks,
    stride_token,
    stride_a,
    stride_b,
    every,
    state_width,
    G: tl.constexpr,
    H: tl.constexpr,
    DIM: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (sequences, H, v / COLUMNS): one token of a sequence, in fp32 but for the product that moves the state on."""
    wait_for_previous_kernel()
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if sequence >= tl.load(num_decodes):
        return
    group, part = head // (H // G), tl.program_id(2) * COLUMNS
    position = tl.load(seq_lens + sequence) - 1
    now, begin = position % CHUNK, position // CHUNK * CHUNK
    place, dim, column = tl.arange(0, CHUNK), tl.arange(0, DIM), tl.arange(0, COLUMNS)
    state_table += sequence * state_width
    slot = tl.load(chunk_blocks + sequence).to(tl.int64) * CHUNK
    keys = k_cache + (slot * G + group) * DIM + place[:, None] * (G * DIM) + dim
    values = u_cache + (slot * H + head) * SIZE + part + place[:, None] * (H * SIZE) + column
    decays = g_cache + slot * H + head + place * H
    token = qkv + sequence * stride_token

    source = _state_at(state_cache, state_table, tl.maximum(position - 1, 0) // every, head, H, DIM, SIZE, COLUMNS)
    state = tl.load(source, mask=begin > 0, other=0.0)
    is_old = place < now
    old = tl.load(keys, mask=is_old[:, None], other=0.0)
    u = tl.load(values, mask=is_old[:, None], other=0.0)
    g = tl.load(decays, mask=is_old, other=0.0)
    q = tl.load(token + group * DIM + dim).to(tl.float32)
    k = tl.load(token + (G + group) * DIM + dim).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q, 0) + EPS) * (DIM**-0.5)
    k *= tl.rsqrt(tl.sum(k * k, 0) + EPS)
    v = tl.load(token + 2 * G * DIM + head * SIZE + part + column).to(tl.float32)
    time = tl.load(a + sequence * stride_a + head).to(tl.float32) + tl.load(dt_bias + head)
    own = tl.load(A + head) * _softplus(time)
    beta = tl.sigmoid(tl.load(b + sequence * stride_b + head).to(tl.float32))

    total = tl.sum(g, 0) + own
    faded = tl.where(is_old, tl.exp(total - tl.cumsum(g, 0)), 0.0)  # behind the last there is nothing
    known = tl.exp(total) * tl.sum(k[:, None] * state, 0)
    known += tl.sum((faded * tl.sum(old * k[None, :], 1))[:, None] * u, 0)
    new = beta * (v - known)
    o = tl.exp(total) * tl.sum(q[:, None] * state, 0) + tl.sum(q * k, 0) * new
    o += tl.sum((faded * tl.sum(old * q[None, :], 1))[:, None] * u, 0)
    tl.store(out + (sequence * H + head) * SIZE + part + column, o.to(out.dtype.element_ty))

    if now == CHUNK - 1:
        is_now = (place == now)[:, None]
        old = tl.where(is_now, k[None, :], old * faded[:, None])
        u = tl.where(is_now, new[None, :], u)
        state = tl.dot(tl.trans(old), u, tl.exp(total) * state, input_precision=PRECISION)
    else:
        here = now.to(tl.int64)
        tl.store(u_cache + ((slot + here) * H + head) * SIZE + part + column, new)
        if tl.program_id(2) == 0:
            tl.store(g_cache + (slot + here) * H + head, own)
            if head % (H // G) == 0:
                tl.store(k_cache + ((slot + here) * G + group) * DIM + dim, k)
    if (now == CHUNK - 1) | (position % every == 0):
        target = _state_at(state_cache, state_table, position // every, head, H, DIM, SIZE, COLUMNS)
        tl.store(target, state)


def constexprs(cache: DeltaCache, dtype: torch.dtype) -> dict[str, object]:
    """Return the compile-time arguments for inputs of a dtype; `store_kernel` has some of them."""
    (num_heads, dim, size), num_keys = cache.state_BHdv.shape[1:], cache.k_BsGd.shape[2]
    return {
        "G": num_keys,
        "H": num_heads,
        "DIM": dim,
        "SIZE": size,
        "COLUMNS": min(_COLUMNS, size),
        "CHUNK": CHUNK,
        "EPS": EPS,
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def gated_delta_rule(
    qkv_TD: Tensor,
    a_TH: Tensor,
    b_TH: Tensor,
    A_H: Tensor,
    dt_bias_H: Tensor,
    cache: DeltaCache,
    states: StateMetadata,
    *,
    fast: bool = False,
) -> Tensor:
    """Run `kernels.ops.gated_delta_rule.reference`; d is a power of two from 16 to 256, v 16 or a multiple of 32.

    Rows that belong to no sequence are left as they are. `fast`: decodes and the inverses of prefills have kernels of their own,
    and other bits.
    """
    num_heads, dim, size = cache.state_BHdv.shape[1:]
    columns, chunk_blocks_S = min(_COLUMNS, size), states.chunk_blocks_S
    assert dim in (16, 32, 64, 128, 256), f"keys of {dim}"
    assert columns in (16, 32), f"values of {size}"
    assert size % columns == 0, f"values of {size}"
    assert all(tensor.is_contiguous() for tensor in cache), [tensor.stride() for tensor in cache]
    assert all(tensor.stride(1) == 1 for tensor in (qkv_TD, a_TH, b_TH)), "inputs apart"
    assert chunk_blocks_S is not None, "no blocks of the chunk cache"
    out_TD, seqs = qkv_TD.new_empty(len(qkv_TD), num_heads * size), states.seqs
    tables = seqs.block_table, chunk_blocks_S
    tensors = qkv_TD, a_TH, b_TH, A_H, dt_bias_H, out_TD, *cache, seqs.num_decodes
    sizes = qkv_TD.stride(0), a_TH.stride(0), b_TH.stride(0), states.interval, seqs.block_table.stride(0)
    constants, num_sequences = constexprs(cache, qkv_TD.dtype), seqs.num_sequences
    if fast and seqs.max_decodes:
        grid = seqs.max_decodes, num_heads, size // columns
        decode_kernel[grid](*tensors, seqs.seq_lens, *tables, *sizes, **constants, num_warps=DECODE_WARPS, **PDL)
    num_keys, inverse_THM = cache.k_BsGd.shape[2], None
    if fast and seqs.max_prefills:
        inverse_THM = qkv_TD.new_empty(len(qkv_TD), num_heads, CHUNK, dtype=torch.float32)
        inverse_kernel[(num_sequences, num_heads, PARTS)](
            qkv_TD, a_TH, b_TH, A_H, dt_bias_H, inverse_THM, cache.k_BsGd, cache.g_BsH, seqs.num_decodes, seqs.cu_seqlens_q,
            seqs.seq_lens, chunk_blocks_S, *sizes[:3], G=num_keys, H=num_heads, DIM=dim, CHUNK=CHUNK, EPS=EPS,
            PRECISION=constants["PRECISION"], PARTS=PARTS, num_warps=NUM_WARPS, **PDL,
        )  # fmt: skip
    if num_sequences and (seqs.max_prefills or not fast):
        where, grid = (inverse_THM, seqs.cu_seqlens_q, seqs.seq_lens), (num_sequences, num_heads, size // columns)
        gated_delta_rule_kernel[grid](
            *tensors, *where, *tables, *sizes, **constants, WITH_DECODES=not fast, num_warps=NUM_WARPS, **PDL
        )
    if seqs.max_prefills:
        store_kernel[(num_sequences, num_keys)](
            qkv_TD, a_TH, A_H, dt_bias_H, cache.k_BsGd, cache.g_BsH, seqs.cu_seqlens_q, seqs.seq_lens, chunk_blocks_S,
            *sizes[:2], G=num_keys, H=num_heads, DIM=dim, CHUNK=CHUNK, EPS=EPS, num_warps=NUM_WARPS, **PDL,
        )  # fmt: skip
    return out_TD
