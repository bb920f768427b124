"""Sampling the next token: `kernels.ops.sampling` in Triton, without a sort.

A row is cut into chunks, a program each; what they find is summed up by whoever needs it next, so nothing waits. A
token's weight is `exp(-d)`, where d is its distance from the largest logit in units of the temperature, as a 64-bit
integer: sums of integers do not depend on their order. What top-k and top-p keep are the tokens up to some distance,
and of those at it the first by id. The distance is found bit by bit, among those candidates only that lie within the
nearest of a few fixed distances that is far enough.

Launches: the largest logit; counts and sums of weights within the fixed distances; the candidates, gathered; the token.

S sampled rows, V vocabulary, C chunks of a row, L fixed distances.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.candidates import draw_candidate, pick, share, weight_of
from expertwire.kernels.gpu.compile import Case

CHUNK_TOKENS = 4096
_LEVELS = tl.constexpr(8)
# The last is that of every token that is not banned.
_DISTANCES = tl.constexpr((1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 18.0, 3.4e38))


@triton.jit
def load_chunk(logits_ptr, row, chunk, vocab, CHUNK: tl.constexpr):
    """Ids of a chunk, and its logits; what is not a number is banned."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    return token, tl.where(logits == logits, logits, float("-inf"))


@triton.jit
def largest_kernel(logits_ptr, largest_ptr, first_ptr, vocab, num_chunks, CHUNK: tl.constexpr):
    """Of each chunk the largest logit fp32 [S, C], and the first token that has it i32 [S, C]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token, logits = load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
    largest = tl.max(logits, axis=0)
    first = tl.min(tl.where(logits == largest, token, vocab - 1), axis=0)
    tl.store(largest_ptr + row * num_chunks + chunk, largest)
    tl.store(first_ptr + row * num_chunks + chunk, first)


@triton.jit
def _largest(largest_ptr, row, num_chunks, CHUNKS_C: tl.constexpr):
    chunk = tl.arange(0, CHUNKS_C)
    return tl.max(tl.load(largest_ptr + row * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf")), axis=0)


@triton.jit
def _is_drawn(largest, temperature):
    return (temperature > 0) & (tl.abs(largest) < float("inf"))


@triton.jit
def _distance(logits, largest, temperature):
    """fp32, not negative; infinite for a banned token."""
    return tl.where(logits == largest, 0.0, tl.div_rn(largest - logits, temperature))


@triton.jit
def weigh_kernel(
    logits_ptr,
    largest_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    counts_ptr,
    masses_ptr,
    vocab,
    num_chunks,
    FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_C: tl.constexpr,
):
    """Of each chunk the number of tokens within each distance i32 [S, C, L], and their weight i64 [S, C, L]; where all tokens
    are candidates, the weight only, in place of the first."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest, temperature = _largest(largest_ptr, row, num_chunks, CHUNKS_C), tl.load(temperature_ptr + row)
    if _is_drawn(largest, temperature):
        _, logits = load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
        distance = _distance(logits, largest, temperature)
        weight = weight_of(distance)
        at = (row * num_chunks + chunk) * _LEVELS
        if FILTERED and ((tl.load(top_k_ptr + row) > 0) | (tl.load(top_p_ptr + row) < 1)):
            for level in tl.static_range(_LEVELS):
                within = distance <= _DISTANCES[level]
                tl.store(counts_ptr + at + level, tl.sum(within.to(tl.int32), axis=0))
                tl.store(masses_ptr + at + level, tl.sum(tl.where(within, weight, 0), axis=0))
        else:
            kept = tl.exp(-distance) >= tl.load(min_p_ptr + row)
            tl.store(masses_ptr + at, tl.sum(tl.where(kept, weight, 0), axis=0))


@triton.jit
def _level(counts_ptr, masses_ptr, row, num_chunks, top_k, top_p, CHUNKS_C: tl.constexpr):
    """The nearest distance within which lies all that is kept."""
    level = tl.arange(0, _LEVELS)
    chunk = tl.arange(0, CHUNKS_C)[:, None]
    at = (row * num_chunks + chunk) * _LEVELS + level[None, :]
    if top_k > 0:
        counts = tl.sum(tl.load(counts_ptr + at, mask=chunk < num_chunks, other=0), axis=0)
        enough = counts >= top_k
    else:
        masses = tl.sum(tl.load(masses_ptr + at, mask=chunk < num_chunks, other=0), axis=0)
        total = tl.sum(tl.where(level == _LEVELS - 1, masses, 0), axis=0)
        enough = masses >= share(total, top_p)
    return tl.minimum(tl.sum((enough == 0).to(tl.int32), axis=0), _LEVELS - 1)


@triton.jit
def gather_kernel(
    logits_ptr,
    largest_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    counts_ptr,
    masses_ptr,
    keys_ptr,
    tokens_ptr,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS_C: tl.constexpr,
):
    """Candidates by ascending id: the bits of their distance i32 [S, V], which are in its order, and their ids i32 [S, V]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest, temperature = _largest(largest_ptr, row, num_chunks, CHUNKS_C), tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if _is_drawn(largest, temperature) & ((top_k > 0) | (top_p < 1)):
        level = _level(counts_ptr, masses_ptr, row, num_chunks, top_k, top_p, CHUNKS_C)
        limit = 0.0
        for i in tl.static_range(_LEVELS):
            limit = tl.where(level == i, _DISTANCES[i], limit)
        earlier = tl.arange(0, CHUNKS_C)
        counts = tl.load(counts_ptr + (row * num_chunks + earlier) * _LEVELS + level, mask=earlier < chunk, other=0)
        token, logits = load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
        distance = _distance(logits, largest, temperature)
        within = distance <= limit
        at = row * vocab + tl.sum(counts, axis=0) + tl.cumsum(within.to(tl.int32), axis=0) - 1
        tl.store(keys_ptr + at, distance.to(tl.int32, bitcast=True), mask=within)
        tl.store(tokens_ptr + at, token, mask=within)


@triton.jit
def random_bits(seed, branch, position):
    """53 bits, on top of a 64-bit integer: Philox-4x32-10."""
    zero = tl.full([], 0, tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, branch.to(tl.uint32), zero)
    return (first.to(tl.uint64) << 32) | ((second >> 11) << 11).to(tl.uint64)


@triton.jit
def _draw_any(logits_ptr, row, masses, largest, temperature, min_p, bits, vocab, CHUNK: tl.constexpr):
    """Where all tokens are candidates, of whose chunks the weights are `masses`."""
    chunk = tl.arange(0, masses.shape[0])
    target = tl.umulhi(bits, tl.sum(masses, axis=0).to(tl.uint64)).to(tl.int64)
    chosen = pick(chunk, masses, 0, target)
    before = tl.sum(tl.where(chunk < chosen, masses, 0), axis=0)
    token, logits = load_chunk(logits_ptr, row, chosen, vocab, CHUNK)
    distance = _distance(logits, largest, temperature)
    weight = tl.where(tl.exp(-distance) >= min_p, weight_of(distance), 0)
    return pick(token, weight, before, target)


@triton.jit
def choose_kernel(
    logits_ptr,
    largest_ptr,
    first_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    branch_ptr,
    position_ptr,
    counts_ptr,
    masses_ptr,
    keys_ptr,
    tokens_ptr,
    token_ptr,
    vocab,
    num_chunks,
    DRAWN: tl.constexpr,
    FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_C: tl.constexpr,
):
    """The token i64 [S]."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_C)
    exists, at = chunk < num_chunks, row * num_chunks + chunk
    largest, temperature = _largest(largest_ptr, row, num_chunks, CHUNKS_C), tl.load(temperature_ptr + row)
    values = tl.load(largest_ptr + at, mask=exists, other=float("-inf"))
    firsts = tl.load(first_ptr + at, mask=exists, other=vocab)
    token = tl.min(tl.where(values == largest, firsts, vocab), axis=0)
    if DRAWN and _is_drawn(largest, temperature):
        top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        bits = random_bits(tl.load(seed_ptr + row), tl.load(branch_ptr + row), tl.load(position_ptr + row))
        if FILTERED and ((top_k > 0) | (top_p < 1)):
            level = _level(counts_ptr, masses_ptr, row, num_chunks, top_k, top_p, CHUNKS_C)
            num = tl.sum(tl.load(counts_ptr + at * _LEVELS + level, mask=exists, other=0), axis=0)
            total = tl.sum(tl.load(masses_ptr + at * _LEVELS + _LEVELS - 1, mask=exists, other=0), axis=0)
            keys, ids = keys_ptr + row * vocab, tokens_ptr + row * vocab
            token = draw_candidate(keys, ids, num, vocab, top_k, top_p, min_p, total, bits, CHUNK // 2)
        else:
            masses = tl.load(masses_ptr + at * _LEVELS, mask=exists, other=0)
            token = _draw_any(logits_ptr, row, masses, largest, temperature, min_p, bits, vocab, CHUNK)
    tl.store(token_ptr + row, token.to(tl.int64))


def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    seed_S: Tensor,
    branch_S: Tensor,
    position_S: Tensor,
    *,
    drawn: bool = True,
    filtered: bool = True,
) -> Tensor:
    """Token ids i64 [S], as `kernels.ops.sampling.reference` with `kernels.ops.sampling.uniform` of (seed, branch, position).

    logits fp32, contiguous; temperature, top_p, min_p fp32; the others i64. All is on the device. The host may say that no
    row is drawn (all are greedy), or that none has top-k or top-p: launches are saved, and 8 bytes a logit for a while.
    """
    num_rows, vocab = logits_SV.shape
    assert logits_SV.is_contiguous(), f"strides {logits_SV.stride()} of shape {tuple(logits_SV.shape)}"
    check_columns(num_rows, torch.float32, temperature_S, top_p_S, min_p_S)
    check_columns(num_rows, torch.int64, top_k_S, seed_S, branch_S, position_S)
    num_chunks = triton.cdiv(vocab, CHUNK_TOKENS)
    sizes = vocab, num_chunks
    largest, first = room(logits_SV, torch.float32, *sizes[1:]), room(logits_SV, torch.int32, *sizes[1:])
    token_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    if num_rows == 0:
        return token_S
    grid, shape = (num_rows, num_chunks), {"CHUNK": CHUNK_TOKENS, "num_warps": 8}
    largest_kernel[grid](logits_SV, largest, first, *sizes, **shape)
    counts = masses = keys = tokens = first
    shape["CHUNKS_C"] = triton.next_power_of_2(num_chunks)
    filtered = filtered and drawn
    if drawn:
        masses = room(logits_SV, torch.int64, num_chunks, _LEVELS.value)
        counts = room(logits_SV, torch.int32, num_chunks, _LEVELS.value) if filtered else first
        parameters = temperature_S, top_k_S, top_p_S, min_p_S
        weigh_kernel[grid](logits_SV, largest, *parameters, counts, masses, *sizes, FILTERED=filtered, **shape)
    if filtered:
        keys, tokens = (room(logits_SV, torch.int32, vocab) for _ in range(2))
        found = counts, masses, keys, tokens
        gather_kernel[grid](logits_SV, largest, temperature_S, top_k_S, top_p_S, *found, *sizes, **shape)
    choose_kernel[(num_rows,)](
        logits_SV, largest, first, temperature_S, top_k_S, top_p_S, min_p_S, seed_S, branch_S, position_S,
        counts, masses, keys, tokens, token_S, *sizes, DRAWN=drawn, FILTERED=filtered, **shape,
    )  # fmt: skip
    return token_S


def check_columns(num_rows: int, dtype: torch.dtype, *columns: Tensor) -> None:
    for column in columns:
        assert column.shape == (num_rows,), f"{tuple(column.shape)} for {num_rows} rows"
        assert column.dtype == dtype, f"{column.dtype}, not {dtype}"
        assert column.is_contiguous(), f"strides {column.stride()}"


def room(logits_SV: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Room for numbers of this shape, a row of logits."""
    return torch.empty(logits_SV.shape[0], *shape, dtype=dtype, device=logits_SV.device)


def cases() -> list[Case]:
    i32, i64, fp32 = torch.int32, torch.int64, torch.float32
    types = {
        "logits_ptr": fp32,
        "largest_ptr": fp32,
        "first_ptr": i32,
        "temperature_ptr": fp32,
        "top_k_ptr": i64,
        "top_p_ptr": fp32,
        "min_p_ptr": fp32,
        "seed_ptr": i64,
        "branch_ptr": i64,
        "position_ptr": i64,
        "counts_ptr": i32,
        "masses_ptr": i64,
        "keys_ptr": i32,
        "tokens_ptr": i32,
        "token_ptr": i64,
    }
    drawn = {"DRAWN": True}
    kernels = [
        ("largest", largest_kernel, {}),
        ("weigh", weigh_kernel, {"FILTERED": True}),
        ("weigh all", weigh_kernel, {"FILTERED": False}),
        ("gather", gather_kernel, {}),
        ("choose", choose_kernel, {"FILTERED": True, **drawn}),
        ("choose of all", choose_kernel, {"FILTERED": False, **drawn}),
        ("choose greedy", choose_kernel, {"FILTERED": False, "DRAWN": False}),
    ]
    vocab = 201088  # 151936 compiles to the same
    num_chunks = triton.cdiv(vocab, CHUNK_TOKENS)
    found = []
    for name, kernel, flags in kernels:
        constexprs = {"CHUNK": CHUNK_TOKENS, **flags}
        if "CHUNKS_C" in kernel.arg_names:
            constexprs["CHUNKS_C"] = triton.next_power_of_2(num_chunks)
        args = {pointer: dtype for pointer, dtype in types.items() if pointer in kernel.arg_names}
        found.append(
            Case(
                name=f"sampling.{name} V{vocab}",
                kernel=kernel,
                args={**args, "vocab": vocab, "num_chunks": num_chunks},
                constexprs=constexprs,
                num_warps=8,
                expect={90: "", 100: ""},
                wide=False,  # results are a few numbers, or lie anywhere
            )
        )
    return found
