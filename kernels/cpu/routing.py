"""The choice of experts on a CPU: `kernels.ops.routing.reference` token by token.

torch computes sigmoids eight at a time and what is left one by one, in other bits; here a token's bits are its own.

T tokens, E experts, K chosen, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu.numbers import allocating_jit, as_array, exp, jit
from expertwire.kernels.cpu.rows import add_row, put_row
from expertwire.kernels.cpu.softmax import softmax
from expertwire.kernels.cpu.vectors import LANES
from expertwire.kernels.ops.routing import TINY
from expertwire.kernels.ops.variants import Groups, Score

_KINDS: dict[Score, int] = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}


@jit
def _score(kind: int, scores: np.ndarray, room: np.ndarray) -> None:
    """In place, of one row of logits, with which `room`, of whole vectors, begins."""
    if kind == 0:
        softmax(room, 0, 0, len(scores), np.float32(1), np.float32(-np.inf), np.float32(1), room, 0, len(room))
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
def _keep(choice: np.ndarray, values_G: np.ndarray, dropped_G: np.ndarray, kept: int, by_two: bool) -> None:
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
    dropped_G[:] = True
    for _ in range(kept):
        g = _best(values_G)
        dropped_G[g], values_G[g] = False, np.float32(-np.inf)
    for g in range(num):
        if dropped_G[g]:
            choice[g * size : (g + 1) * size] = np.float32(-np.inf)


# Of `route_rows`: the kind of score, a bias on it, whether logits are compared, how groups limit the choice (their number, how
# many are kept, whether two experts make one good), whether weights sum to one, and what they are multiplied by.
Rule = tuple[int, np.ndarray, bool, tuple[int, int, bool], bool, np.float32]


def rule(
    num_experts: int,
    *,
    renormalize: bool,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    groups: Groups | None = None,
    scale: float = 1.0,
) -> Rule:
    """From the options of `kernels.ops.routing.reference`."""
    bias = np.zeros(num_experts, np.float32) if bias_E is None else bias_E.numpy()
    limits = (1, 1, False) if groups is None else (groups.number, groups.kept, groups.by == "two_best")
    by_logits = bias_E is None and not limits[2]
    return _KINDS[score], bias, by_logits, limits, renormalize, np.float32(scale)


@jit
def _route(logits_TE, rule, scores, room, choice, values_G, dropped_G, ids_TK, weights_TK):
    kind, bias_E, by_logits, (num_groups, kept, by_two), renormalize, factor = rule
    for t in range(len(logits_TE)):
        put_row(logits_TE[t], scores)
        put_row(scores, choice)
        _score(kind, scores, room)
        if not by_logits:
            add_row(scores, bias_E, choice)
        if kept < num_groups:
            _keep(choice, values_G, dropped_G, kept, by_two)
        total = np.float32(0)
        for k in range(ids_TK.shape[1]):
            best = _best(choice)
            ids_TK[t, k], weights_TK[t, k] = best, scores[best]
            total += scores[best]
            choice[best] = np.float32(-np.inf)
        for k in range(ids_TK.shape[1]):
            if renormalize:
                weights_TK[t, k] /= total + np.float32(TINY)
            weights_TK[t, k] *= factor


@allocating_jit
def route_rows(logits_TE: np.ndarray, rule: Rule, ids_TK: np.ndarray, weights_TK: np.ndarray) -> None:
    num_experts, num_groups = logits_TE.shape[1], rule[3][0]
    room, choice = np.empty(-(-num_experts // LANES) * LANES, np.float32), np.empty(num_experts, np.float32)
    values_G, dropped_G = np.empty(num_groups, np.float32), np.empty(num_groups, np.bool_)
    _route(logits_TE, rule, room[:num_experts], room, choice, values_G, dropped_G, ids_TK, weights_TK)


def route(logits_TE: Tensor, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """`kernels.ops.routing.reference`."""
    num_tokens, num_experts = logits_TE.shape
    ids_TK, weights_TK = torch.empty(num_tokens, top_k, dtype=torch.int64), torch.empty(num_tokens, top_k)
    route_rows(as_array(logits_TE), rule(num_experts, **options), ids_TK.numpy(), weights_TK.numpy())
    return ids_TK, weights_TK
