"""The rules of routing that few models have, on a CPU: `kernels.routing.reference` token by token.

torch computes sigmoids eight at a time and what is left one by one, in other bits; here a token's bits are its own.

T tokens, E experts, K chosen, G groups.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu.numbers import as_array, exp, jit, load, softmax
from expertwire.kernels.routing import TINY
from expertwire.kernels.variants import Groups, Score

_KINDS: dict[Score, int] = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}


@jit
def _score(kind: int, scores: np.ndarray) -> None:
    """In place, of one row of logits."""
    if kind == 0:
        softmax(scores)
    elif kind == 1:
        for e in range(len(scores)):
            scores[e] = np.float32(1) / (np.float32(1) + exp(min(-scores[e], np.float32(88))))
    else:
        for e in range(len(scores)):
            # Beyond 20 the logarithm is x to the last bit.
            if scores[e] <= np.float32(20):
                scores[e] = np.float32(np.log1p(exp(scores[e])))
            scores[e] = np.sqrt(scores[e])


@jit
def _best(values: np.ndarray) -> int:
    """Of equals, the first."""
    best = 0
    for i in range(len(values)):
        if values[i] > values[best]:
            best = i
    return best


@jit
def _keep(choice: np.ndarray, values_G: np.ndarray, kept: int, by_two: bool) -> None:
    """-inf for the experts of groups that are not among the best; a group is as good as its best, or its two best, are."""
    num, size = len(values_G), len(choice) // len(values_G)
    for g in range(num):
        group = choice[g * size : (g + 1) * size]
        first = _best(group)
        values_G[g] = group[first]
        if by_two:
            second = np.float32(-np.inf)
            for e in range(size):
                if e != first:
                    second = max(second, group[e])
            values_G[g] += second
    dropped = np.ones(num, np.bool_)
    for _ in range(kept):
        g = _best(values_G)
        dropped[g], values_G[g] = False, np.float32(-np.inf)
    for g in range(num):
        if dropped[g]:
            choice[g * size : (g + 1) * size] = np.float32(-np.inf)


@jit
def _route(logits_TE, kind, bias_E, by_logits, groups, renormalize, scale, ids_TK, weights_TK):
    num_groups, kept, by_two = groups
    scores, choice = np.empty(logits_TE.shape[1], np.float32), np.empty(logits_TE.shape[1], np.float32)
    values_G = np.empty(num_groups, np.float32)
    for t in range(logits_TE.shape[0]):
        for e in range(len(scores)):
            scores[e] = load(logits_TE[t, e])
            choice[e] = scores[e]
        _score(kind, scores)
        if not by_logits:
            for e in range(len(scores)):
                choice[e] = scores[e] + bias_E[e]
        _keep(choice, values_G, kept, by_two)
        total = np.float32(0)
        for k in range(ids_TK.shape[1]):
            best = _best(choice)
            ids_TK[t, k], weights_TK[t, k] = best, scores[best]
            total += scores[best]
            choice[best] = np.float32(-np.inf)
        for k in range(ids_TK.shape[1]):
            if renormalize:
                weights_TK[t, k] /= total + np.float32(TINY)
            weights_TK[t, k] *= scale


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    renormalize: bool,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    groups: Groups | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`kernels.routing.reference`."""
    num_tokens, num_experts = logits_TE.shape
    ids_TK, weights_TK = torch.empty(num_tokens, top_k, dtype=torch.int64), torch.empty(num_tokens, top_k)
    by_logits = bias_E is None and (groups is None or groups.by == "best")
    bias = np.zeros(num_experts, np.float32) if bias_E is None else bias_E.numpy()
    limits = (1, 1, False) if groups is None else (groups.number, groups.kept, groups.by == "two_best")
    arrays = ids_TK.numpy(), weights_TK.numpy()
    _route(as_array(logits_TE), _KINDS[score], bias, by_logits, limits, renormalize, np.float32(scale), *arrays)
    return ids_TK, weights_TK
