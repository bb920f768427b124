"""Routing on a CPU: `kernels.ops.routing` token by token.

torch computes sigmoids eight at a time and the remainder one by one, with other bits; here a token's bits do not depend
on the batch.

T tokens, E logical experts, K experts a token, J groups of experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.cpu._llvm import LANES, add_row, allocating_jit, as_array, copy_row, exp, jit, softmax
from expertwire.kernels.ops.routing import TINY
from expertwire.kernels.ops.variants import Routing, Score

_KINDS: dict[Score, int] = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}


@jit
def _score(kind: int, scores: np.ndarray, padded: np.ndarray) -> None:
    """Turn a row of logits into scores, in place; `padded` is the same row with whole vectors."""
    if kind == 0:
        softmax(padded, 0, 0, len(scores), np.float32(1), np.float32(-np.inf), np.float32(1), padded, 0, len(padded))
    elif kind == 1:
        for e in range(len(scores)):
            scores[e] = np.float32(1) / (np.float32(1) + exp(min(-scores[e], np.float32(88))))
    else:
        for e in range(len(scores)):
            # Beyond 20 log(1 + e^x) equals x in fp32.
            if scores[e] <= np.float32(20):
                scores[e] = np.float32(np.log1p(exp(scores[e])))
            scores[e] = np.sqrt(scores[e])


@jit
def _best(values: np.ndarray) -> int:
    """Return the index of the largest value, of equal ones the first."""
    best = 0
    for i in range(len(values)):
        if values[i] > values[best]:
            best = i
    return best


@jit
def _keep(choice: np.ndarray, values_J: np.ndarray, dropped_J: np.ndarray, kept: int, by_two: bool) -> None:
    """Set experts outside the best groups to -inf; groups are ranked by their best or two best experts."""
    num, size = len(values_J), len(choice) // len(values_J)
    for g in range(num):
        group = choice[g * size : (g + 1) * size]
        first = _best(group)
        values_J[g] = group[first]
        if by_two:
            second = np.float32(-np.inf)
            for e in range(size):
                if e != first:
                    second = max(second, group[e])
            values_J[g] += second
    dropped_J[:] = True
    for _ in range(kept):
        g = _best(values_J)
        dropped_J[g], values_J[g] = False, np.float32(-np.inf)
    for g in range(num):
        if dropped_J[g]:
            choice[g * size : (g + 1) * size] = np.float32(-np.inf)


# Options of `route_rows`: kind of score, bias, whether logits are compared, groups (number, how many are kept,
# whether they are ranked by two experts), whether weights are renormalised, and their factor.
Rule = tuple[int, np.ndarray, bool, tuple[int, int, bool], bool, np.float32]


def rule(num_experts: int, routing: Routing, bias_E: Tensor | None = None) -> Rule:
    """Return the rule of these options of `kernels.ops.routing.Route`."""
    groups = routing.groups
    bias = np.zeros(num_experts, np.float32) if bias_E is None else bias_E.numpy()
    limits = (1, 1, False) if groups is None else (groups.number, groups.kept, groups.by == "two_best")
    by_logits = bias_E is None and not limits[2]
    return _KINDS[routing.score], bias, by_logits, limits, routing.renormalize, np.float32(routing.scale)


@jit
def _route(logits_TE, rule, scores, padded, choice, values_J, dropped_J, ids_TK, weights_TK):
    kind, bias_E, by_logits, (num_groups, kept, by_two), renormalize, factor = rule
    for t in range(len(logits_TE)):
        copy_row(logits_TE[t], scores)
        copy_row(scores, choice)
        _score(kind, scores, padded)
        if not by_logits:
            add_row(scores, bias_E, choice)
        if kept < num_groups:
            _keep(choice, values_J, dropped_J, kept, by_two)
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
    padded, choice = np.empty(-(-num_experts // LANES) * LANES, np.float32), np.empty(num_experts, np.float32)
    values_J, dropped_J = np.empty(num_groups, np.float32), np.empty(num_groups, np.bool_)
    _route(logits_TE, rule, padded[:num_experts], padded, choice, values_J, dropped_J, ids_TK, weights_TK)


def route(logits_TE: Tensor, routing: Routing, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `kernels.ops.routing.Route`."""
    (num_tokens, num_experts), top_k = logits_TE.shape, routing.top_k
    ids_TK, weights_TK = torch.empty(num_tokens, top_k, dtype=torch.int64), torch.empty(num_tokens, top_k)
    route_rows(as_array(logits_TE), rule(num_experts, routing, bias_E), ids_TK.numpy(), weights_TK.numpy())
    return ids_TK, weights_TK
