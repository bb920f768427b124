"""Sampling the next token: temperature, top-k, top-p, min-p, and one counter-based uniform number a token.

The number is Philox-4x32-10 of (seed, branch, position) (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): no
generator state, so a draw does not depend on the batch, the rank or what was drawn before. The token is found by inverting
the cumulative distribution in the order of token ids.

S sampled rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Columns of `reference`, in its order: fields of a slot's sampling record and their dtypes. The GPU's
# sampler draws its uniform numbers itself and so takes the arguments of `uniform`, too.
PARAMETERS = {"temperature": np.float32, "top_k": np.int64, "top_p": np.float32, "min_p": np.float32}
DRAW_PARAMETERS = PARAMETERS | {"seed": np.int64, "branch": np.int64}

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def uniform(seed_S: np.ndarray, branch_S: np.ndarray, position_S: np.ndarray) -> np.ndarray:
    """fp64 [S] in [0, 1) with 53 random bits; seed i64, branch and position non-negative integers."""
    key = seed_S.astype(np.int64).view(np.uint64)
    keys = [key & _LOW, key >> _HALF]
    position = position_S.astype(np.uint64)
    counter = [position & _LOW, position >> _HALF, branch_S.astype(np.uint64), np.zeros_like(position)]
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
    logits_SV: Tensor, temperature_S: Tensor, top_k_S: Tensor, top_p_S: Tensor, min_p_S: Tensor, uniform_S: Tensor
) -> Tensor:
    """Token ids i64 [S].

    logits fp32; temperature fp32, 0 is greedy; top_k i64, -1 keeps all; top_p, min_p fp32; uniform fp64.
    Top-k comes before top-p, whose probabilities are those of what top-k kept; min-p is relative to the most probable token.
    A row without probabilities (every token banned, or a logit that has overflowed) is greedy.
    """
    greedy_S = logits_SV.argmax(dim=-1)
    drawn = temperature_S > 0
    if not bool(drawn.any()):
        return greedy_S
    # Relative to the largest, so that a tiny temperature overflows to -inf only.
    largest_S1 = logits_SV.gather(1, greedy_S.unsqueeze(1))
    logits_SV = (logits_SV - largest_S1) / torch.where(drawn, temperature_S, 1.0).unsqueeze(1)
    if bool(((top_k_S > 0) | (top_p_S < 1)).any()):
        logits_SV = _keep_top(logits_SV, top_k_S, top_p_S)
    probs_SV = torch.softmax(logits_SV, dim=-1)
    if bool((min_p_S > 0).any()):
        floor_S1 = min_p_S.unsqueeze(1) * probs_SV.amax(dim=-1, keepdim=True)
        probs_SV = torch.where(probs_SV >= floor_S1, probs_SV, 0.0)
    cumulative_SV = probs_SV.double().cumsum(dim=-1)
    target_S1 = uniform_S.unsqueeze(1) * cumulative_SV[:, -1:]
    token_S = torch.searchsorted(cumulative_SV, target_S1, right=True).squeeze(1)
    return torch.where(drawn & (cumulative_SV[:, -1] > 0), token_S, greedy_S)


def _keep_top(logits_SV: Tensor, top_k_S: Tensor, top_p_S: Tensor) -> Tensor:
    ordered_SV, ids_SV = logits_SV.sort(dim=-1, descending=True, stable=True)
    vocab = logits_SV.shape[1]
    limit_S1 = torch.where(top_k_S > 0, top_k_S, vocab).unsqueeze(1)
    drop_SV = torch.arange(vocab, device=logits_SV.device) >= limit_S1
    probs_SV = torch.softmax(ordered_SV.masked_fill(drop_SV, -torch.inf), dim=-1)
    before_SV = probs_SV.cumsum(dim=-1) - probs_SV
    drop_SV |= (before_SV >= top_p_S.unsqueeze(1)) & (top_p_S.unsqueeze(1) < 1)
    drop_SV[:, 0] = False
    return logits_SV.masked_fill(torch.zeros_like(drop_SV).scatter(1, ids_SV, drop_SV), -torch.inf)


def penalize(
    logits_V: Tensor, prompt: Tensor, output: Tensor, *, repetition: float, presence: float, frequency: float
) -> None:
    """Apply one row's penalties in place.

    `prompt`, `output`: token ids, i64. Repetition divides positive and multiplies negative logits of every token seen (Keskar et
    al., "CTRL", 2019); presence and frequency are subtracted once, and per occurrence, for tokens of the output.
    """
    counts_V = _counts(output, logits_V)
    if repetition != 1.0:
        seen_V = (counts_V > 0) | (_counts(prompt, logits_V) > 0)
        logits_V.copy_(
            torch.where(seen_V, torch.where(logits_V > 0, logits_V / repetition, logits_V * repetition), logits_V)
        )
    if presence != 0.0 or frequency != 0.0:
        logits_V -= torch.where(counts_V > 0, presence + frequency * counts_V, 0.0)


def _counts(tokens: Tensor, logits_V: Tensor) -> Tensor:
    """How often each token occurs."""
    return torch.zeros_like(logits_V).index_add_(0, tokens, torch.ones_like(tokens, dtype=logits_V.dtype))


def token_logprobs(logits_XV: Tensor, token_X: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of raw logits: log-probability fp32 [X] and rank i64 [X] (1 is the most probable) of the given tokens, and the
    `num_top` most probable tokens' ids i64 and log-probabilities fp32 [X, num_top], descending."""
    logprobs_XV = torch.log_softmax(logits_XV, dim=-1)
    chosen_X1 = logprobs_XV.gather(1, token_X.unsqueeze(1))
    rank_X = (logprobs_XV > chosen_X1).sum(dim=-1) + 1
    top_logprobs, top_ids = logprobs_XV.topk(num_top, dim=-1)
    return chosen_X1.squeeze(1), rank_X, top_ids, top_logprobs
