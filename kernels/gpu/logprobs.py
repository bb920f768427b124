"""Log-probabilities of given tokens, and their ranks: `kernels.sampling.token_logprobs` in Triton.

A row is cut into chunks, a program each; their sums are added in a fixed order. X rows, V vocabulary, C chunks of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.sampling import CHUNK_TOKENS, check_columns, load_chunk, room


@triton.jit
def normalizer_kernel(logits_ptr, largest_ptr, total_ptr, vocab, num_chunks, CHUNK: tl.constexpr):
    """Of each chunk the largest logit, and the sum of exponentials relative to it: fp32 [X, C]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, logits = load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
    largest = tl.max(logits, axis=0)
    total = tl.sum(tl.exp(logits - tl.where(largest == float("-inf"), 0.0, largest)), axis=0)
    tl.store(largest_ptr + row * num_chunks + chunk, largest)
    tl.store(total_ptr + row * num_chunks + chunk, total)


@triton.jit
def logprob_kernel(
    logits_ptr,
    token_ptr,
    largest_ptr,
    total_ptr,
    logprob_ptr,
    better_ptr,
    vocab,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS_C: tl.constexpr,
):
    """Log-probability of the given tokens fp32 [X], and how many of each chunk's are larger i32 [X, C]."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    every = tl.arange(0, CHUNKS_C)
    parts = tl.load(largest_ptr + row * num_chunks + every, mask=every < num_chunks, other=float("-inf"))
    totals = tl.load(total_ptr + row * num_chunks + every, mask=every < num_chunks, other=0.0)
    largest = tl.max(parts, axis=0)
    normalizer = largest + tl.log(tl.sum(totals * tl.exp(parts - largest), axis=0))
    chosen = tl.load(logits_ptr + row * vocab + tl.load(token_ptr + row)).to(tl.float32) - normalizer
    token, logits = load_chunk(logits_ptr, row, chunk, vocab, CHUNK)
    better = (logits - normalizer > chosen) & (token < vocab)
    tl.store(better_ptr + row * num_chunks + chunk, tl.sum(better.to(tl.int32), axis=0))
    if chunk == 0:
        tl.store(logprob_ptr + row, chosen)


def token_logprobs(logits_XV: Tensor, token_X: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability fp32 [X] and rank i64 [X] (1 is the most probable) of the given tokens i64, as
    `kernels.sampling.token_logprobs`; logits fp32, contiguous."""
    num_rows, vocab = logits_XV.shape
    assert logits_XV.is_contiguous(), f"strides {logits_XV.stride()} of shape {tuple(logits_XV.shape)}"
    check_columns(num_rows, torch.int64, token_X)
    num_chunks = triton.cdiv(vocab, CHUNK_TOKENS)
    largest, total = (room(logits_XV, torch.float32, num_chunks) for _ in range(2))
    better = room(logits_XV, torch.int32, num_chunks)
    logprob_X = torch.empty(num_rows, dtype=torch.float32, device=logits_XV.device)
    if num_rows:
        grid, shape = (num_rows, num_chunks), {"CHUNK": CHUNK_TOKENS, "num_warps": 8}
        sizes = vocab, num_chunks
        normalizer_kernel[grid](logits_XV, largest, total, *sizes, **shape)
        shape["CHUNKS_C"] = triton.next_power_of_2(num_chunks)
        logprob_kernel[grid](logits_XV, token_X, largest, total, logprob_X, better, *sizes, **shape)
    return logprob_X, better.sum(dim=-1) + 1


def cases() -> list[Case]:
    i32, i64, fp32 = torch.int32, torch.int64, torch.float32
    vocab = 201088  # 151936 compiles to the same
    num_chunks = triton.cdiv(vocab, CHUNK_TOKENS)
    sizes = {"vocab": vocab, "num_chunks": num_chunks}
    parts = {"logits_ptr": fp32, "largest_ptr": fp32, "total_ptr": fp32}
    common = {"num_warps": 8, "expect": {90: "", 100: ""}, "wide": False}  # results are a few numbers
    return [
        Case(
            name=f"logprobs.normalizer V{vocab}",
            kernel=normalizer_kernel,
            args={**parts, **sizes},
            constexprs={"CHUNK": CHUNK_TOKENS},
            **common,
        ),
        Case(
            name=f"logprobs.logprob V{vocab}",
            kernel=logprob_kernel,
            args={**parts, "token_ptr": i64, "logprob_ptr": fp32, "better_ptr": i32, **sizes},
            constexprs={"CHUNK": CHUNK_TOKENS, "CHUNKS_C": triton.next_power_of_2(num_chunks)},
            **common,
        ),
    ]
