"""Sampling on a CPU: `kernels.ops.sampling.sample` with compiled loops around torch's softmax, hence with its bits.

With a few rows and a small vocabulary, torch's two dozen operations would cost more than all layers' experts.

O sampled rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels import threads
from expertwire.kernels.cpu._llvm import jit
from expertwire.kernels.ops.sampling import Draws, keep_top

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@jit
def _scale(logits_OV, token_O, temperature_O, scaled_OV):
    """Divide logits, relative to that of the greedy token, by the temperature; those of rows that are greedy by 1."""
    for o in range(len(logits_OV)):
        largest = logits_OV[o, max(token_O[o], 0)]
        divisor = temperature_O[o] if temperature_O[o] > 0 else np.float32(1)
        for v in range(logits_OV.shape[1]):
            scaled_OV[o, v] = (logits_OV[o, v] - largest) / divisor


@jit(inner=True)
def _uniform(seed, branch, position):
    """As `kernels.ops.sampling.uniform`, of one row."""
    key, place = np.uint64(seed), np.uint64(position)
    key0, key1 = key & _LOW, key >> _HALF
    word0, word1, word2, word3 = place & _LOW, place >> _HALF, np.uint64(branch), np.uint64(0)
    for _ in range(10):
        first, second = word0 * np.uint64(0xD2511F53), word2 * np.uint64(0xCD9E8D57)
        word0, word1 = (second >> _HALF) ^ word1 ^ key0, second & _LOW
        word2, word3 = (first >> _HALF) ^ word3 ^ key1, first & _LOW
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & _LOW, (key1 + np.uint64(0xBB67AE85)) & _LOW
    return np.float64((word0 << np.uint64(21)) | (word1 >> np.uint64(11))) * 2.0**-53


@jit
def _draw(probs_OV, temperature_O, min_p_O, seed_O, branch_O, position_O, token_O):
    """Replace the greedy tokens of rows with a temperature by drawn ones."""
    for o in range(len(probs_OV)):
        if temperature_O[o] > 0 and token_O[o] >= 0:
            floor, total, before = min_p_O[o] * probs_OV[o, token_O[o]], 0.0, 0.0
            for v in range(probs_OV.shape[1]):
                if probs_OV[o, v] >= floor:
                    total += probs_OV[o, v]
            target, token = _uniform(seed_O[o], branch_O[o], position_O[o]) * total, 0
            for v in range(probs_OV.shape[1]):
                if probs_OV[o, v] >= floor:
                    before += probs_OV[o, v]
                if before > target:
                    break
                token += 1
            token_O[o] = token


def sample(logits_OV: Tensor, draws: Draws, *, drawn: bool = True, filtered: bool = True) -> Tensor:
    """As `kernels.ops.sampling.Sample`."""
    logits, temperature = logits_OV.numpy(), draws.temperature_O.numpy()
    token = _greedy_tokens(logits)
    if drawn:
        scaled_OV = torch.empty_like(logits_OV)
        _scale(logits, token, temperature, scaled_OV.numpy())
        with threads.as_many_as_worth(scaled_OV):
            if filtered:
                scaled_OV = keep_top(scaled_OV, draws.top_k_O, draws.top_p_O)
            probs_OV = torch.softmax(scaled_OV, dim=-1)
        columns = (column.numpy() for column in (draws.min_p_O, draws.seed_O, draws.branch_O, draws.position_O))
        _draw(probs_OV.numpy(), temperature, *columns, token)
    return torch.from_numpy(token)


def _greedy_tokens(logits_OV: np.ndarray) -> np.ndarray:
    """Return the first of each row's largest logits, or -1 where that is not finite or one is NaN, i64 [O]."""
    token_O = logits_OV.argmax(axis=1)  # a NaN counts as the largest
    token_O[~np.isfinite(logits_OV[np.arange(len(logits_OV)), token_O])] = -1
    return token_O
