"""Sampling of the next token: `kernels.ops.sampling` in Triton, without a sort.

A row is cut into chunks, one program each; a later launch sums up what they find, so no program
waits. A token's weight is `exp(-d)`, where d is its distance from the largest logit in units of the
temperature, as a 64-bit integer: sums of integers do not depend on their order. Top-k and top-p
keep the tokens up to some distance, and of those at that distance the first by id. The distance is
found bit by bit among candidates: the tokens within the nearest of a few fixed distances that is
far enough.

Launches: the largest logit; counts and sums of weights within the fixed distances; gathering the
candidates; choosing the token.

O sampled rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.top_k_top_p import draw_candidate, pick, share, weight_of
from expertwire.kernels.ops.sampling import Draws

CHUNK_TOKENS = 4096
_LEVELS = tl.constexpr(8)
# The last includes every token that is not banned.
_DISTANCES = tl.constexpr((1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 18.0, 3.4e38))


@triton.jit
def load_chunk(logits_ptr, row, chunk, vocab, CHUNK: tl.constexpr):
    """Return the ids of a chunk and its logits; a row with NaN has no probabilities, as one with +inf."""
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(logits_ptr + row * vocab + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    return token, tl.where(logits == logits, logits, float("inf"))


@triton.jit
def largest_kernel(logits_ptr, largest_ptr, first_ptr, vocab, num_chunks, CHUNK: tl.constexpr):
    """Grid (O, chunks): store each chunk's largest logit, fp32 [O, chunks], and the first token that has it, i32 [O, chunks]."""
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
    """Return the distance from the largest logit, fp32, not negative; infinite for a banned token."""
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
    """Grid (O, chunks): store the number of a chunk's tokens within each distance, i32 [O, chunks, distances], and their
    weight, i64 [O, chunks, distances].

    Where all tokens are candidates, only the weight is stored, in place of the first.
    """
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
    """Return the nearest fixed distance within which everything lies that is kept."""
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
    """Grid (O, chunks): gather candidates by ascending id: the bits of their distance and their ids, both i32 [O, V]."""
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
    """Return 53 random bits at the top of a 64-bit integer, by Philox-4x32-10."""
    zero = tl.full([], 0, tl.uint32)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, branch.to(tl.uint32), zero)
    return (first.to(tl.uint64) << 32) | ((second >> 11) << 11).to(tl.uint64)


@triton.jit
def _draw_any(logits_ptr, row, masses, largest, temperature, min_p, bits, vocab, CHUNK: tl.constexpr):
    """Draw among all tokens; `masses` are the weights of their chunks."""
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
    """Grid (O,): store the chosen token, i64 [O], or -1 where the largest logit is not finite."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS_C)
    exists, at = chunk < num_chunks, row * num_chunks + chunk
    largest, temperature = _largest(largest_ptr, row, num_chunks, CHUNKS_C), tl.load(temperature_ptr + row)
    values = tl.load(largest_ptr + at, mask=exists, other=float("-inf"))
    firsts = tl.load(first_ptr + at, mask=exists, other=vocab)
    token = tl.min(tl.where(values == largest, firsts, vocab), axis=0)
    token = tl.where(tl.abs(largest) < float("inf"), token, -1)
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


def sample(logits_OV: Tensor, draws: Draws, *, drawn: bool = True, filtered: bool = True) -> Tensor:
    """Return token ids i64 [O], or -1, as `kernels.ops.sampling.reference` does with uniform numbers of
    (seed, branch, position).

    logits fp32, contiguous; temperature, top_p, min_p fp32; the others i64; all on the device.
    `drawn` False says that all rows are greedy, `filtered` False that none has top-k or top-p: that
    saves launches and 8 bytes a logit.
    """
    num_rows, vocab = logits_OV.shape
    assert logits_OV.is_contiguous(), f"strides {logits_OV.stride()} of shape {tuple(logits_OV.shape)}"
    temperature_O, top_k_O, top_p_O, min_p_O, *counters = draws
    check_columns(num_rows, torch.float32, temperature_O, top_p_O, min_p_O)
    check_columns(num_rows, torch.int64, top_k_O, *counters)
    num_chunks = triton.cdiv(vocab, CHUNK_TOKENS)
    sizes = vocab, num_chunks
    largest, first = empty_rows(logits_OV, torch.float32, *sizes[1:]), empty_rows(logits_OV, torch.int32, *sizes[1:])
    token_O = torch.empty(num_rows, dtype=torch.int64, device=logits_OV.device)
    if num_rows == 0:
        return token_O
    grid, shape = (num_rows, num_chunks), {"CHUNK": CHUNK_TOKENS, "num_warps": 8}
    largest_kernel[grid](logits_OV, largest, first, *sizes, **shape)
    counts = masses = keys = tokens = first
    shape["CHUNKS_C"] = triton.next_power_of_2(num_chunks)
    filtered = filtered and drawn
    if drawn:
        masses = empty_rows(logits_OV, torch.int64, num_chunks, _LEVELS.value)
        counts = empty_rows(logits_OV, torch.int32, num_chunks, _LEVELS.value) if filtered else first
        weigh_kernel[grid](logits_OV, largest, *draws[:4], counts, masses, *sizes, FILTERED=filtered, **shape)
    if filtered:
        keys, tokens = (empty_rows(logits_OV, torch.int32, vocab) for _ in range(2))
        found = counts, masses, keys, tokens
        gather_kernel[grid](logits_OV, largest, *draws[:3], *found, *sizes, **shape)
    choose_kernel[(num_rows,)](
        logits_OV, largest, first, *draws, counts, masses, keys, tokens, token_O, *sizes, DRAWN=drawn, FILTERED=filtered, **shape,
    )  # fmt: skip
    return token_O


def check_columns(num_rows: int, dtype: torch.dtype, *columns: Tensor) -> None:
    for column in columns:
        assert column.shape == (num_rows,), f"{tuple(column.shape)} for {num_rows} rows"
        assert column.dtype == dtype, f"{column.dtype}, not {dtype}"
        assert column.is_contiguous(), f"strides {column.stride()}"


def empty_rows(logits_OV: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return memory for numbers of this shape for each row of logits."""
    return torch.empty(logits_OV.shape[0], *shape, dtype=dtype, device=logits_OV.device)
