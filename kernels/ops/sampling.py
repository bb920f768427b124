"""Sampling of the next token: temperature, top-k, top-p, min-p, and one counter-based uniform number a token.

The number is Philox-4x32-10 of (seed, branch, position) (Salmon et al., "Parallel random numbers: as easy as 1, 2,
3", 2011): no generator state, so a draw does not depend on the batch, the rank or what was drawn before. The token
is found by inverting the cumulative distribution in the order of token ids.

A row that has no probabilities gives -1 instead of a token: its largest logit is not finite, as there is NaN or +inf, or
nothing but -inf. That is the model's fault: penalties, biases and bans are checked to leave a finite logit.

O sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels import threads

# The fields of a slot's sampling record that begin `Draws`, and their dtypes.
DRAW_PARAMETERS = {
    "temperature": np.float32,
    "top_k": np.int64,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.int64,
    "branch": np.int64,
}

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Draws(NamedTuple):
    """The draw of the next token of each row: the columns of `DRAW_PARAMETERS`, and the token's position i64."""

    temperature_O: Tensor
    top_k_O: Tensor
    top_p_O: Tensor
    min_p_O: Tensor
    seed_O: Tensor
    branch_O: Tensor
    position_O: Tensor


class Sample(Protocol):
    """Draws the next token of each row; see `sample`."""

    def __call__(self, logits_OV: Tensor, draws: Draws, *, drawn: bool = True, filtered: bool = True) -> Tensor:
        """Return token ids i64 [O], or -1."""
        ...


class Penalize(Protocol):
    """Applies the penalties of some rows in place; see `penalize_rows`."""

    def __call__(
        self,
        logits_OV: Tensor,
        rows: Tensor,
        slots: Tensor,
        prompt_lens: Tensor,
        num_known: Tensor,
        parameters: Sequence[Tensor],
        token_ids: Tensor,
        max_known: int,
        /,
    ) -> None: ...


class AddToLogits(Protocol):
    """Adds to single logits in place; see `add_to_logits`."""

    def __call__(self, logits_OV: Tensor, rows: Tensor, tokens: Tensor, values: Tensor, /) -> None: ...


def uniform(seed_O: np.ndarray, branch_O: np.ndarray, position_O: np.ndarray) -> np.ndarray:
    """Return fp64 [O] in [0, 1) with 53 random bits; seed i64, branch and position non-negative integers."""
    key = seed_O.astype(np.int64).view(np.uint64)
    keys = [key & _LOW, key >> _HALF]
    position = position_O.astype(np.uint64)
    counter = [position & _LOW, position >> _HALF, branch_O.astype(np.uint64), np.zeros_like(position)]
    for _ in range(_ROUNDS):
        first, second = counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]
        counter = [
            (second >> _HALF) ^ counter[1] ^ keys[0],
            second & _LOW,
            (first >> _HALF) ^ counter[3] ^ keys[1],
            first & _LOW,
        ]
        keys = [(keys[0] + _WEYL[0]) & _LOW, (keys[1] + _WEYL[1]) & _LOW]
    bits = (counter[0] << np.uint64(21)) | (counter[1] >> np.uint64(11))
    return bits.astype(np.float64) * 2.0**-53


def reference(
    logits_OV: Tensor, temperature_O: Tensor, top_k_O: Tensor, top_p_O: Tensor, min_p_O: Tensor, uniform_O: Tensor
) -> Tensor:
    """Return token ids i64 [O], or -1 for a row without probabilities.

    Logits fp32; temperature fp32, 0 is greedy; top_k i64, -1 keeps all; top_p, min_p fp32; uniform fp64. Top-k is
    applied first, and top-p to the probabilities of what it keeps; min-p is relative to the most probable token.
    """
    greedy_O, largest_O1 = _most_probable(logits_OV)
    drawn = temperature_O > 0
    if not bool(drawn.any()):
        return greedy_O
    # Relative to the largest, so that a tiny temperature overflows to -inf only.
    logits_OV = (logits_OV - largest_O1) / torch.where(drawn, temperature_O, 1.0).unsqueeze(1)
    if bool(((top_k_O > 0) | (top_p_O < 1)).any()):
        logits_OV = keep_top(logits_OV, top_k_O, top_p_O)
    probs_OV = torch.softmax(logits_OV, dim=-1)
    if bool((min_p_O > 0).any()):
        floor_O1 = min_p_O.unsqueeze(1) * probs_OV.amax(dim=-1, keepdim=True)
        probs_OV = torch.where(probs_OV >= floor_O1, probs_OV, 0.0)
    cumulative_OV = probs_OV.double().cumsum(dim=-1)
    target_O1 = uniform_O.unsqueeze(1) * cumulative_OV[:, -1:]
    token_O = torch.searchsorted(cumulative_OV, target_O1, right=True).squeeze(1)
    return torch.where(drawn & (greedy_O >= 0), token_O, greedy_O)


def sample(logits_OV: Tensor, draws: Draws, *, drawn: bool = True, filtered: bool = True) -> Tensor:
    """Return `reference` with the numbers `uniform` of (seed, branch, position). `drawn`: whether any row is not greedy;
    `filtered`: whether any has top-k or top-p."""
    if not drawn:
        return _most_probable(logits_OV)[0]
    uniform_O = uniform(*(values.numpy(force=True) for values in draws[4:]))
    return reference(logits_OV, *draws[:4], torch.from_numpy(uniform_O).to(logits_OV.device))


def _most_probable(logits_OV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's most probable token i64 [O], or -1 for a row without probabilities, and the largest logit [O, 1]."""
    greedy_O = logits_OV.argmax(dim=-1)  # of the first NaN, if there is one
    largest_O1 = logits_OV.gather(1, greedy_O.unsqueeze(1))
    return greedy_O.masked_fill(~largest_O1.squeeze(1).isfinite(), -1), largest_O1


def keep_top(logits_OV: Tensor, top_k_O: Tensor, top_p_O: Tensor) -> Tensor:
    ordered_OV, ids_OV = logits_OV.sort(dim=-1, descending=True, stable=True)
    vocab = logits_OV.shape[1]
    limit_O1 = torch.where(top_k_O > 0, top_k_O, vocab).unsqueeze(1)
    drop_OV = torch.arange(vocab, device=logits_OV.device) >= limit_O1
    probs_OV = torch.softmax(ordered_OV.masked_fill(drop_OV, -torch.inf), dim=-1)
    before_OV = probs_OV.cumsum(dim=-1) - probs_OV
    drop_OV |= (before_OV >= top_p_O.unsqueeze(1)) & (top_p_O.unsqueeze(1) < 1)
    drop_OV[:, 0] = False
    return logits_OV.masked_fill(torch.zeros_like(drop_OV).scatter(1, ids_OV, drop_OV), -torch.inf)


def penalize(
    logits_V: Tensor, prompt: Tensor, output: Tensor, *, repetition: float, presence: float, frequency: float
) -> None:
    """Apply one row's penalties in place.

    `prompt`, `output`: token ids, i64. Repetition divides positive and multiplies negative logits of every token
    seen (Keskar et al., "CTRL", 2019); presence and frequency are subtracted once, and per occurrence, for tokens
    of the output.
    """
    counts_V = _counts(output, logits_V)
    if repetition != 1.0:
        seen_V = (counts_V > 0) | (_counts(prompt, logits_V) > 0)
        logits_V.copy_(
            torch.where(seen_V, torch.where(logits_V > 0, logits_V / repetition, logits_V * repetition), logits_V)
        )
    if presence != 0.0 or frequency != 0.0:
        logits_V -= torch.where(counts_V > 0, presence + frequency * counts_V, 0.0)


def penalize_rows(
    logits_OV: Tensor,
    rows: Tensor,
    slots: Tensor,
    prompt_lens: Tensor,
    num_known: Tensor,
    parameters: Sequence[Tensor],
    token_ids: Tensor,
    max_known: int,
) -> None:
    """Apply `penalize` to some rows.

    Args:
        logits_OV: fp32, written.
        rows: i32, one for each of the following; `slots`: i32, rows of `token_ids`, which begin with the prompt.
        prompt_lens: i32, tokens of the prompt; `num_known`: i32, tokens of prompt and output.
        parameters: repetition, presence and frequency penalties, fp32.
        token_ids: i32 [slots, tokens].
        max_known: no row has more known tokens.
    """
    each = zip(*(values.tolist() for values in (rows, slots, prompt_lens, num_known, *parameters)), strict=True)
    for row, slot, prompt_len, known, repetition, presence, frequency in each:
        tokens = token_ids[slot, :known].long()
        penalties = {"repetition": repetition, "presence": presence, "frequency": frequency}
        penalize(logits_OV[row], tokens[:prompt_len], tokens[prompt_len:], **penalties)


def add_to_logits(logits_OV: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
    """Add values fp32 to the logits of these rows and tokens, i32; -inf bans whatever the logit is. Each (row, token) is named
    once, or always with -inf."""
    index = rows.long(), tokens.long()
    logits_OV[index] = torch.where(values.isneginf(), values, logits_OV[index] + values)


def _counts(tokens: Tensor, logits_V: Tensor) -> Tensor:
    """Return the number of occurrences of each token."""
    return torch.zeros_like(logits_V).index_add_(0, tokens, torch.ones_like(tokens, dtype=logits_V.dtype))


def token_logprobs(logits_OV: Tensor, token_O: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probability fp32 [O] and rank i64 [O] (1: most probable) of the given tokens, of raw logits; then the
    `num_top` most probable tokens' ids i64 and log-probabilities fp32 [O, num_top], descending.
    """
    with threads.as_many_as_worth(logits_OV):
        logprobs_OV = torch.log_softmax(logits_OV, dim=-1)
    return token_scores(logprobs_OV, token_O, num_top)


def token_scores(scores_OV: Tensor, token_O: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same of any scores, fp32 [O, V]."""
    chosen_O1 = scores_OV.gather(1, token_O.unsqueeze(1))
    rank_O = _num_larger(scores_OV, chosen_O1) + 1
    top_scores, top_ids = scores_OV.topk(num_top, dim=-1)
    return chosen_O1.squeeze(1), rank_O, top_ids, top_scores


def _num_larger(scores_OV: Tensor, chosen_O1: Tensor) -> Tensor:
    """Return how many of a row's scores are larger than the given one, i64 [O]."""
    if not scores_OV.is_cpu:
        return (scores_OV > chosen_O1).sum(dim=-1)
    # Of a large vocabulary torch adds up numbers seven times as fast as truth values; sums below 2**24 are exact.
    return torch.gt(scores_OV, chosen_O1, out=torch.empty_like(scores_OV)).sum(dim=-1).long()
