"""Routing: score every expert, choose the K best, derive their weights from their scores.

Scores: softmax over all experts, sigmoid, or sqrt(softplus). Weights may be divided by their sum, and are multiplied by
`scale`. Softmax with division is the same as a softmax over the chosen logits (gpt-oss, Granite); sigmoid without it is
Llama 4's rule.

A selection bias is added to scores for the choice only (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Group-limited
choice first keeps the best groups of neighbouring experts: by their best expert (DeepSeek-V2, arXiv 2405.04434) or by
the sum of their two best (DeepSeek-V3). Scores grow with logits, so where neither bias nor sum enters, logits are
compared: distinct ones stay distinct. Of equals the lowest id wins, everywhere.

Gating is in fp32 whatever the dtype of activations.

T tokens, E experts, K experts a token; J groups of experts, Q is the period with which tokens rotate
through replicas.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.variants import ExpertGroups, Routing, Score

# Keeps the division by a sum of scores finite where all are zero; it changes no other sum.
TINY = 1e-20


class Route(Protocol):
    """See `reference`."""

    def __call__(
        self,
        logits_TE: Tensor,
        routing: Routing,
        bias_E: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return expert ids i64 [T, K] and weights fp32 [T, K]."""
        ...


def reference(
    logits_TE: Tensor,
    routing: Routing,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return expert ids i64 [T, K] and weights fp32 [T, K], by descending choice score; logits any float, bias fp32."""
    logits_TE, groups = logits_TE.float(), routing.groups
    scores_TE = _scores(logits_TE, routing.score)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if bias_E is None and (groups is None or groups.by == "best"):
        choice_TE = logits_TE
    if groups is not None:
        choice_TE = _limited(choice_TE, groups)
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if routing.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
    return ids_TK, weights_TK if routing.scale == 1.0 else weights_TK * routing.scale


class Routed(NamedTuple):
    """Logical experts i64 [T, K], their weights fp32 [T, K], and physical experts i64 [T, K]."""

    ids_TK: Tensor
    weights_TK: Tensor
    physical_TK: Tensor


def to_physical(ids_TK: Tensor, log2phy_QE: Tensor | None) -> Tensor:
    """Return physical experts; token t takes row t mod Q of the table; None: physical ids are logical ones."""
    if log2phy_QE is None:
        return ids_TK
    num_replicas, num_experts = log2phy_QE.shape
    if num_replicas == 1:
        return log2phy_QE.take(ids_TK)
    replica_T = torch.arange(len(ids_TK), device=ids_TK.device).remainder_(num_replicas)
    return log2phy_QE.take(ids_TK + replica_T.mul_(num_experts).unsqueeze(1))


class RouteAndCount(Protocol):
    """`Route`, physical ids and the load in one call; see `route_and_count`."""

    def __call__(
        self,
        logits_TE: Tensor,
        routing: Routing,
        bias_E: Tensor | None = None,
        *,
        load_E: Tensor,
        log2phy_QE: Tensor | None = None,
        num_valid: Tensor | None = None,
    ) -> Routed:
        """Return ids and weights; add to `load_E`."""
        ...


def route_and_count(
    logits_TE: Tensor,
    routing: Routing,
    bias_E: Tensor | None = None,
    *,
    load_E: Tensor,
    log2phy_QE: Tensor | None = None,
    num_valid: Tensor | None = None,
    route: Route = reference,
) -> Routed:
    """Choose experts by `route`, find their physical ids, and count the load.

    Args:
        load_E: i64 [E], to which the rows of each logical expert are added.
        log2phy_QE: i64 [Q, E], `moe.eplb.placement.Placement.log2phy` a rank; None: physical ids are logical ones.
        num_valid: i32 [1]; only the first so many tokens are counted.
    """
    ids_TK, weights_TK = route(logits_TE, routing, bias_E)
    counted_TK = ids_TK if num_valid is None else ids_TK[: int(num_valid)]
    load_E += torch.bincount(counted_TK.flatten(), minlength=len(load_E))
    return Routed(ids_TK, weights_TK, to_physical(ids_TK, log2phy_QE))


def _scores(logits_TE: Tensor, score: Score) -> Tensor:
    match score:
        case "softmax":
            return torch.softmax(logits_TE, dim=-1)
        case "sigmoid":
            return torch.sigmoid(logits_TE)
        case "sqrt_softplus":
            return F.softplus(logits_TE).sqrt()


def _limited(choice_TE: Tensor, groups: ExpertGroups) -> Tensor:
    """Return `choice_TE` with -inf for the experts of dropped groups."""
    choice_TJe = choice_TE.unflatten(1, (groups.number, -1))
    group_TJ = choice_TJe.topk(1 if groups.by == "best" else 2, dim=-1).values.sum(dim=-1)
    dropped_TJ = group_TJ.sort(dim=-1, descending=True, stable=True).indices[:, groups.kept :]
    mask_TJ = torch.zeros_like(group_TJ, dtype=torch.bool).scatter(1, dropped_TJ, True)
    return choice_TJe.masked_fill(mask_TJ.unsqueeze(2), -torch.inf).flatten(1)
