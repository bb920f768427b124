"""Penalties, logit biases and bans, for all rows that have any: `kernels.ops.sampling.penalize` in Triton.

A row's tokens are counted in a workspace by integer atomics, whose order does not matter; then the
counts are applied. Products and sums round one by one, as the reference's do.

O sampled rows, V vocabulary, A requests with penalties.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64  # at once, since a count is as large as a logit
CHUNK_TOKENS = 2048
_PROMPT = tl.constexpr(1 << 30)  # added to the count of a token of the prompt
EXACT = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["tokens_stride"])
def count_kernel(
    tokens_ptr, slot_ptr, prompt_len_ptr, known_ptr, counts_ptr, tokens_stride, vocab, CHUNK: tl.constexpr
):
    """Grid (A, chunks of tokens): count the output's tokens and mark the prompt's, i32 [A, V], zeros before."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    slot, prompt_len = tl.load(slot_ptr + row).to(tl.int64), tl.load(prompt_len_ptr + row)
    known = i < tl.load(known_ptr + row)
    token = tl.load(tokens_ptr + slot * tokens_stride + i, mask=known, other=0)
    counts = counts_ptr + row * vocab + token
    tl.atomic_add(counts, 1, mask=known & (i >= prompt_len), sem="relaxed")
    tl.atomic_or(counts, _PROMPT, mask=known & (i < prompt_len), sem="relaxed")


@triton.jit
def penalize_kernel(
    logits_ptr, row_ptr, counts_ptr, repetition_ptr, presence_ptr, frequency_ptr, vocab, CHUNK: tl.constexpr
):
    """Grid (A, chunks of the vocabulary): apply the penalties in place."""
    a = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    exists = token < vocab
    at = logits_ptr + tl.load(row_ptr + a).to(tl.int64) * vocab + token
    logit = tl.load(at, mask=exists, other=0.0)
    count = tl.load(counts_ptr + a * vocab + token, mask=exists, other=0)
    repetition, presence, frequency = tl.load(repetition_ptr + a), tl.load(presence_ptr + a), tl.load(frequency_ptr + a)
    again = tl.where(logit > 0, tl.div_rn(logit, tl.zeros_like(logit) + repetition), logit * repetition)
    logit = tl.where(count > 0, again, logit)  # the same, if repetition is 1
    count = count & (_PROMPT - 1)
    logit = logit - tl.where(count > 0, presence + frequency * count.to(tl.float32), 0.0)
    tl.store(at, logit, mask=exists)


@triton.jit(do_not_specialize=["count"])
def add_kernel(logits_ptr, row_ptr, token_ptr, value_ptr, count, vocab, CHUNK: tl.constexpr):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    exists = i < count
    row, token = tl.load(row_ptr + i, mask=exists, other=0).to(tl.int64), tl.load(token_ptr + i, mask=exists, other=0)
    at, value = logits_ptr + row * vocab + token, tl.load(value_ptr + i, mask=exists, other=0.0)
    tl.store(at, tl.load(at, mask=exists, other=0.0) + value, mask=exists)


def penalize(
    logits_OV: Tensor,
    row_A: Tensor,
    slot_A: Tensor,
    prompt_len_A: Tensor,
    known_A: Tensor,
    parameters: Sequence[Tensor],
    token_table: Tensor,
    max_known: int,
) -> None:
    """Apply `kernels.ops.sampling.penalize` to some rows, in place.

    logits fp32, contiguous; rows, slots, lengths of prompts and numbers of known tokens i32 [A];
    `parameters`: repetition, presence and frequency fp32 [A], with repetition 1 and the others 0
    where there is none; `token_table` i32 [slots, tokens], of which no row knows more than
    `max_known`.
    """
    assert logits_OV.is_contiguous(), f"strides {logits_OV.stride()} of shape {tuple(logits_OV.shape)}"
    assert logits_OV.dtype == torch.float32, logits_OV.dtype
    vocab, shape = logits_OV.shape[1], {"CHUNK": CHUNK_TOKENS, "num_warps": 8}
    for start in range(0, len(row_A), MAX_ROWS):
        row, slot, prompt_len, known, *rest = (
            x_A[start : start + MAX_ROWS] for x_A in (row_A, slot_A, prompt_len_A, known_A, *parameters)
        )
        counts = torch.zeros(len(row), vocab, dtype=torch.int32, device=logits_OV.device)
        count_kernel[len(row), triton.cdiv(max_known, CHUNK_TOKENS)](
            token_table, slot, prompt_len, known, counts, token_table.stride(0), vocab, **shape
        )
        penalize_kernel[len(row), triton.cdiv(vocab, CHUNK_TOKENS)](
            logits_OV, row, counts, *rest, vocab, **shape, **EXACT
        )


def add(logits_OV: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add values fp32 to the logits of these rows and tokens, i32, as many as values.

    A logit may appear once, or several times with -inf.
    """
    if len(rows):
        grid = (triton.cdiv(len(rows), CHUNK_TOKENS),)
        add_kernel[grid](
            logits_OV, rows, tokens, values, len(rows), logits_OV.shape[1], CHUNK=CHUNK_TOKENS, num_warps=8
        )
