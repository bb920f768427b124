"""EPLB's algorithm, `rebalance`: choose a placement and the share of an expert's rows of each replica. Numpy, all
layers at once.

Two candidates are computed for a layer. The *fresh* one cuts an expert that is too much for a rank into pieces of a
rank's capacity and a remainder, packs all pieces by descending load onto the least loaded rank with a free slot, and
then alternates two steps: replicas' shares are levelled (water filling), and the fullest rank swaps an expert with
another rank as long as that helps. Where a rank stays too full, the same is tried with equal pieces, as
deepseek-ai/EPLB cuts them: the next replica goes to the expert with the most rows a replica. (Such pieces are often
slightly more than half of a rank's capacity, so that no two fit together.)

The *kept* one starts from the current placement: level shares, which moves nothing; then swap experts; then give up
replicas with little load for replicas of experts on the fullest rank. It stops as soon as it is as good as the fresh
one, and is then preferred.

L layers, E logical experts, X physical experts, P ranks, J groups of ranks, n physical experts of a rank, z
replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from expertwire.moe.eplb.candidate import Candidate
from expertwire.moe.eplb.placement import Placement

_EVEN = 5e-4  # accepted relative excess over the mean
_MAX_CHANGES = 8  # of replicas in a layer


def rebalance(
    load_LE: np.ndarray, placement: Placement, *, failure_domains: Sequence[int] = (), slack: float = 0.002
) -> Placement:
    """Return a placement that minimises the rows of each layer's fullest rank, and moves few experts.

    A rank never holds an expert twice. Two replicas of an expert lie in different failure domains and NVLink domains
    wherever slots allow it. With two slots for every expert, each expert gets at least two replicas. Layers without
    load stay as they are.

    Args:
        load_LE: rows of each logical expert of each layer, in a window.
        placement: the current one, of L layers; it also gives the slots and the NVLink domain of each rank.
        failure_domains: of each rank, the unit that fails as a whole; empty: every rank is one.
        slack: relative excess of the fullest rank that is accepted to save moves.
    """
    assert load_LE.shape == (placement.num_layers, placement.num_logical), f"{load_LE.shape} is not that of {placement}"
    domains, fails = placement.domains or (0,), tuple(failure_domains) or tuple(range(placement.num_ranks))
    idle_L = ~load_LE.any(axis=1)
    # Groups of one rank need no care: no expert is twice on it.
    some = [names for names in (fails, domains) if 1 < len(set(names)) < placement.num_ranks]
    groupings = [np.unique(names, return_inverse=True)[1] for names in some]
    load_LE, expert_LX = np.maximum(load_LE, 1e-9), placement.phy2log.astype(np.int64)
    load_LX = np.take_along_axis(load_LE, expert_LX, axis=1) * placement.shares
    now = Candidate(load_LE, placement.rank_of_X, groupings, expert_LX, load_LX)
    even_L = now.mean_L * (1 + _EVEN)
    fresh = now.fresh(even_L)
    goal_L = np.maximum(fresh.rank_load_LP.max(axis=1), even_L) * (1 + slack)
    goal_L[idle_L] = np.inf
    kept = now.with_slots(expert_LX.copy(), load_LX.copy())
    kept.improve(goal_L, changes=_MAX_CHANGES)
    as_good_L = kept.rank_load_LP.max(axis=1) <= goal_L
    as_good_L &= (kept.count_LE >= now.least).all(axis=1) | idle_L
    _match_ranks(fresh, now, domains, fails)
    chosen_LX = np.where(as_good_L[:, None], kept.expert_LX, fresh.expert_LX)
    load_LX = np.where(as_good_L[:, None], kept.load_LX, fresh.load_LX)
    expert_LX, load_LX = _keep_slots(expert_LX, chosen_LX, load_LX, placement.rank_offsets)
    return Placement(
        num_logical=placement.num_logical,
        phy2log=expert_LX,
        rank_offsets=placement.rank_offsets,
        domains=placement.domains,
        shares=load_LX,
    )


def _match_ranks(fresh: Candidate, now: Candidate, domains: Sequence[int], fails: Sequence[int]) -> None:
    """Permute ranks of the fresh candidate so that many experts stay where they are.

    Ranks may be exchanged if they have equally many slots, share an NVLink domain, and fail together or each alone.
    """
    num_ranks, sizes = now.num_ranks, np.bincount(now.rank_X)
    fails_P = np.array(fails if len(set(fails)) < num_ranks else [0] * num_ranks)
    kind = np.stack([sizes, np.broadcast_to(domains, num_ranks), fails_P])
    kind_P = np.unique(kind, axis=1, return_inverse=True)[1].reshape(-1)
    common_LPP = fresh.held_LPE.astype(np.float32) @ now.held_LPE.astype(np.float32).transpose(0, 2, 1)
    common_LPP[:, kind_P[:, None] != kind_P] = -1
    source_LP, layers = np.empty((len(common_LPP), num_ranks), np.int64), np.arange(len(common_LPP))
    for _ in range(num_ranks):
        source, target = np.divmod(common_LPP.reshape(len(layers), -1).argmax(axis=1), num_ranks)
        source_LP[layers, target] = source
        common_LPP[layers, source] = common_LPP[layers, :, target] = -2
    first_P = np.cumsum(sizes) - sizes
    slot_LX = first_P[source_LP][:, now.rank_X] + np.arange(len(now.rank_X)) - first_P[now.rank_X]
    fresh.expert_LX, fresh.load_LX = (np.take_along_axis(x, slot_LX, axis=1) for x in (fresh.expert_LX, fresh.load_LX))


def _keep_slots(
    before_LX: np.ndarray, after_LX: np.ndarray, load_LX: np.ndarray, rank_offsets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Reorder each rank's experts and loads so that those that stay keep their slots."""
    order_LX = np.empty(after_LX.shape, np.int64)
    for first, last in pairwise(rank_offsets):
        same = before_LX[:, first:last, None] == after_LX[:, None, first:last]
        order = np.where(same.any(axis=2), same.argmax(axis=2), -1)
        order[order < 0] = np.nonzero(~same.any(axis=1))[1]
        order_LX[:, first:last] = first + order
    return np.take_along_axis(after_LX, order_LX, axis=1), np.take_along_axis(load_LX, order_LX, axis=1)
