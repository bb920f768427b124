"""Where experts should lie, and which share of an expert's rows each replica should get: `rebalance`. Numpy, all layers at once.

Two plans are made for a layer. A fresh one cuts what is too much for a rank into pieces of just what a rank can take and one
rest, packs all by falling load onto the least loaded rank with a free slot, and then takes turns: replicas' shares flow from
full to empty ranks like water, and the fullest rank swaps an expert for another's for as long as that helps. Where that leaves a
rank too full, the same is tried with equal pieces, as deepseek-ai/EPLB cuts them: the next replica goes to the expert with the
most rows a replica. (They are often of a little more than half of what a rank can take, so that no two fit together.)

The other plan starts from what is where: first shares flow, which moves nothing, then experts are swapped, then replicas that
carry little are given up for those of experts on the fullest rank, all only until it is as good as the fresh plan. If it gets
there, it is taken.

L layers, E logical experts, S slots (physical experts), P ranks, G groups of ranks, n slots of a rank, R replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from expertwire.moe.eplb.placement import Placement

_EVEN = 5e-4  # above the mean: even enough
_ROUNDS = 4  # of flowing and swapping
_SWEEPS = 3  # over all experts, when shares flow
_MAX_SWAPS = 100  # of a layer in a round
_MAX_CHANGES = 8  # of replicas in a layer, before it is placed anew


def rebalance(
    load_LE: np.ndarray, placement: Placement, *, failure_domains: Sequence[int] = (), slack: float = 0.002
) -> Placement:
    """A placement under which the fullest rank of each layer has few rows, and few experts have moved.

    An expert is never twice on a rank. Of its replicas, the first two lie in different failure domains and different domains
    wherever slots can be found for that. Where there are two slots for every expert, each has two homes. Layers without load
    stay as they are.

    Args:
        load_LE: rows of each logical expert of each layer, in a window.
        placement: the current one, of L layers; also says how many slots a rank has and which domain it is in.
        failure_domains: of each rank, what fails together with it; empty: every rank is one.
        slack: by how much the fullest rank may be fuller than need be, if that saves moves; a share.
    """
    assert load_LE.shape == (placement.num_layers, placement.num_logical), f"{load_LE.shape} is not that of {placement}"
    domains, fails = placement.domains or (0,), tuple(failure_domains) or tuple(range(placement.num_ranks))
    idle_L = ~load_LE.any(axis=1)
    # Groups of one rank need no care: no expert is twice on it.
    some = [names for names in (fails, domains) if 1 < len(set(names)) < placement.num_ranks]
    groupings = [np.unique(names, return_inverse=True)[1] for names in some]
    load_LE, expert_LS = np.maximum(load_LE, 1e-9), placement.physical_to_logical.astype(np.int64)
    load_LS = np.take_along_axis(load_LE, expert_LS, axis=1) * placement.shares
    now = _Plan(load_LE, placement.rank_of_S, groupings, expert_LS, load_LS)
    even_L = now.mean_L * (1 + _EVEN)
    fresh = now.anew(even_L)
    goal_L = np.maximum(fresh.rank_load_LP.max(axis=1), even_L) * (1 + slack)
    goal_L[idle_L] = np.inf
    kept = now.with_slots(expert_LS.copy(), load_LS.copy())
    kept.improve(goal_L, changes=_MAX_CHANGES)
    as_good_L = kept.rank_load_LP.max(axis=1) <= goal_L
    as_good_L &= (kept.count_LE >= now.least).all(axis=1) | idle_L
    _match_ranks(fresh, now, domains, fails)
    chosen = [np.where(as_good_L[:, None], getattr(kept, x), getattr(fresh, x)) for x in ("expert_LS", "load_LS")]
    expert_LS, load_LS = _keep_slots(expert_LS, *chosen, placement.rank_offsets)
    return Placement(
        num_logical=placement.num_logical,
        physical_to_logical=expert_LS,
        rank_offsets=placement.rank_offsets,
        domains=placement.domains,
        shares=load_LS,
    )


class _Plan:
    """Layers while experts move; loads are rows. `groupings`: every rank's group, for each way in which ranks lie together."""

    def __init__(
        self,
        load_LE: np.ndarray,
        rank_S: np.ndarray,
        groupings: list[np.ndarray],
        expert_LS: np.ndarray,
        load_LS: np.ndarray,
    ) -> None:
        num_layers, num_experts = load_LE.shape
        self.load_LE, self.rank_S, self.groupings = load_LE, rank_S, groupings
        self.expert_LS, self.load_LS = expert_LS, load_LS
        self.num_ranks = int(rank_S[-1]) + 1
        self.mean_L = load_LE.sum(axis=1) / self.num_ranks
        # Replicas that every expert gets: two, if there are slots for that.
        self.least = 2 if self.num_ranks > 1 and len(rank_S) >= 2 * num_experts else 1
        self.held_LPE = np.zeros((num_layers, self.num_ranks, num_experts), bool)
        np.put_along_axis(self.held_LPE.reshape(num_layers, -1), rank_S * num_experts + expert_LS, True, axis=1)
        self.count_LE = self.held_LPE.sum(axis=1)
        self.rank_load_LP = np.add.reduceat(load_LS, np.searchsorted(rank_S, np.arange(self.num_ranks)), axis=1)

    def with_slots(self, expert_LS: np.ndarray, load_LS: np.ndarray) -> _Plan:
        """The same layers, with these experts and their rows in the slots."""
        return _Plan(self.load_LE, self.rank_S, self.groupings, expert_LS, load_LS)

    def improve(self, goal_L: np.ndarray, changes: int = 0) -> None:
        """Flow, swap and, `changes` times, change replicas, until the fullest rank is within the goal or nothing helps."""
        for i in range(_ROUNDS + changes):
            active = np.flatnonzero(self.rank_load_LP.max(axis=1) > goal_L)
            if not len(active):
                return
            if i >= _ROUNDS:
                self._change_replica(active)
            self._flow(active)
            self._swap(active, goal_L)

    # ---- a fresh plan

    def anew(self, goal_L: np.ndarray) -> _Plan:
        """The same layers, placed anew, with the fullest rank within the goal if that can be had."""
        fresh = self._pack(*self._full_pieces())
        fresh.improve(goal_L)
        hard = np.flatnonzero(fresh.rank_load_LP.max(axis=1) > goal_L)
        if len(hard):
            slots = self.expert_LS[hard], self.load_LS[hard]
            other = _Plan(self.load_LE[hard], self.rank_S, self.groupings, *slots)
            other = other._pack(*other._equal_pieces(np.full_like(other.count_LE, self.least)))
            other.improve(goal_L[hard])
            better = other.rank_load_LP.max(axis=1) < fresh.rank_load_LP[hard].max(axis=1)
            fresh.expert_LS[hard[better]], fresh.load_LS[hard[better]] = other.expert_LS[better], other.load_LS[better]
            fresh = fresh.with_slots(fresh.expert_LS, fresh.load_LS)
        return fresh

    def _equal_pieces(self, count_LE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Experts and loads [L, S] of as many pieces as there are slots: at least so many of each expert, and of equal loads."""
        count_LE = self._more(count_LE)
        expert_LS = np.stack([np.repeat(np.arange(len(count_E)), count_E) for count_E in count_LE])
        return expert_LS, np.take_along_axis(self.load_LE / count_LE, expert_LS, axis=1)

    def _more(self, count_LE: np.ndarray) -> np.ndarray:
        """The replicas that are left to the experts with the most rows a replica, one after another."""
        count_LE, rows, num_slots = count_LE.copy(), np.arange(len(count_LE)), len(self.rank_S)
        for _ in range(num_slots - count_LE.sum(axis=1).min()):
            some = rows[count_LE.sum(axis=1) < num_slots]
            each_LE = np.where(count_LE[some] < self.num_ranks, self.load_LE[some] / count_LE[some], -1.0)
            count_LE[some, each_LE.argmax(axis=1)] += 1
        return count_LE

    def _full_pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """As `_equal_pieces`, but an expert that is too much for a rank has full pieces, and the others share the rest."""
        per_rank = len(self.rank_S) // self.num_ranks
        beside_L = np.sort(self.load_LE, axis=1)[:, : per_rank - 1].sum(axis=1)  # at least, on a rank with a full piece
        low_L, high_L = self.mean_L, self.mean_L + self.load_LE.max(axis=1) + beside_L
        for _ in range(30):
            middle_L = (low_L + high_L) / 2
            fits_L = self._num_pieces(middle_L - beside_L).sum(axis=1) <= len(self.rank_S)
            low_L, high_L = np.where(fits_L, low_L, middle_L), np.where(fits_L, middle_L, high_L)
        full_L1 = (high_L - beside_L)[:, None]
        needed_LE = self._num_pieces(full_L1[:, 0])
        expert_LS, _ = self._equal_pieces(needed_LE)
        count_LE = self._more(needed_LE)
        full_LE = np.where(self.load_LE > full_L1, needed_LE - 1, 0)
        rest_LE = (self.load_LE - full_L1 * full_LE) / (count_LE - full_LE)
        first_LE = np.cumsum(count_LE, axis=1) - count_LE
        number_LS = np.arange(len(self.rank_S)) - np.take_along_axis(first_LE, expert_LS, axis=1)
        full_LS, rest_LS = (np.take_along_axis(values, expert_LS, axis=1) for values in (full_LE, rest_LE))
        return expert_LS, np.where(number_LS < full_LS, full_L1, rest_LS)

    def _num_pieces(self, full_L: np.ndarray) -> np.ndarray:
        num = np.ceil(self.load_LE / np.maximum(full_L, 1e-12)[:, None] - 1e-9)
        return num.clip(self.least, self.num_ranks).astype(np.int64)

    def _pack(self, expert_LS: np.ndarray, load_LS: np.ndarray) -> _Plan:
        """Every piece, by falling load, on the least loaded rank with a free slot that does not hold its expert."""
        order_LS = np.argsort(-load_LS, axis=1, kind="stable")
        expert_LS, load_LS = (np.take_along_axis(x, order_LS, axis=1) for x in (expert_LS, load_LS))
        num_layers, rows = len(expert_LS), np.arange(len(expert_LS))
        rank_load_LP = np.zeros((num_layers, self.num_ranks))
        free_LP = np.tile(np.bincount(self.rank_S), (num_layers, 1))
        held_LPE = np.zeros_like(self.held_LPE)
        piece_LPE = np.zeros(held_LPE.shape)
        beyond_L1 = 1 + self.load_LE.sum(axis=1, keepdims=True)
        for expert_L, load_L in zip(expert_LS.T, load_LS.T, strict=True):
            held_LP = held_LPE[rows, :, expert_L]
            cost_LP = rank_load_LP + sum(_near(held_LP, group_P) for group_P in self.groupings) * beyond_L1
            cost_LP[held_LP] = np.inf
            cost_LP[free_LP == 0] = np.inf
            rank_L = cost_LP.argmin(axis=1)
            for layer in np.flatnonzero(cost_LP[rows, rank_L] >= beyond_L1[:, 0]):
                there = (x[layer] for x in (held_LPE, piece_LPE, rank_load_LP, free_LP))
                rank_L[layer] = self._make_room(*there, expert=expert_L[layer], rank=rank_L[layer])
            held_LPE[rows, rank_L, expert_L] = True
            piece_LPE[rows, rank_L, expert_L] = load_L
            rank_load_LP[rows, rank_L] += load_L
            free_LP[rows, rank_L] -= 1
        layer, rank, expert = np.nonzero(held_LPE)  # by rank
        shape = expert_LS.shape
        packed = piece_LPE[layer, rank, expert].reshape(shape)
        return self.with_slots(expert.reshape(shape), packed)

    def _make_room(
        self,
        held_PE: np.ndarray,
        piece_PE: np.ndarray,
        load_P: np.ndarray,
        free_P: np.ndarray,
        *,
        expert: int,
        rank: int,
    ) -> int:
        """Every rank with a free slot, as this one, holds the expert, or is in a group that does. So another rank gives an expert
        of its own to this one, if that may go there, and is returned.

        If this one holds the expert, there is such a rank, at least if groups do not matter: some rank does not hold the expert,
        and has at least as many others as this one.
        """
        stuck = bool(held_PE[rank, expert] or not free_P[rank])
        free = int(free_P.argmax()) if stuck else rank
        holders = np.flatnonzero(held_PE[:, expert])
        if not stuck and all(len(set(group_P[holders])) > 1 for group_P in self.groupings):
            return rank
        for groupings in (self.groupings, []):
            barred_P = held_PE[:, expert] | _beside(held_PE[:, expert], groupings)
            for other in sorted(np.flatnonzero(~barred_P), key=load_P.__getitem__):
                for moved in np.flatnonzero(held_PE[other] & ~held_PE[free]):
                    rest_P = held_PE[:, moved].copy()
                    rest_P[other] = False
                    if not _beside(rest_P, groupings)[free]:
                        piece = piece_PE[other, moved]
                        held_PE[[other, free], moved] = False, True
                        piece_PE[[other, free], moved] = 0.0, piece
                        load_P[[other, free]] += -piece, piece
                        free_P[[other, free]] += 1, -1
                        return int(other)
            if not stuck:
                return rank
        raise AssertionError(f"expert {expert} fits nowhere: {free_P} slots are free, {holders} hold it")

    # ---- shares

    def _flow(self, layers: np.ndarray) -> None:
        """Give each expert's replicas in turn such shares of its rows that the ranks they lie on become as even as can be."""
        order_LS = np.argsort(self.expert_LS[layers], axis=1, kind="stable")
        count_LE = self.count_LE[layers]
        first_LE = np.cumsum(count_LE, axis=1) - count_LE
        shared = [np.flatnonzero(count_E > 1) for count_E in count_LE]
        for _ in range(_SWEEPS):
            for j in range(max(map(len, shared))):
                here = np.array([i for i, experts in enumerate(shared) if j < len(experts)])
                expert = np.array([shared[i][j] for i in here])
                count, first = count_LE[here, expert], first_LE[here, expert]
                number_R = np.arange(count.max())
                there_LR = number_R < count[:, None]
                slot_LR = order_LS[here[:, None], np.where(there_LR, first[:, None] + number_R, 0)]
                self._pour(layers[here], expert, slot_LR, there_LR)

    def _pour(self, layers: np.ndarray, experts: np.ndarray, slot_LR: np.ndarray, there_LR: np.ndarray) -> None:
        at_LR, rank_LR = layers[:, None], self.rank_S[slot_LR]
        before_LR = self.load_LS[at_LR, slot_LR]
        ground_LR = np.where(there_LR, self.rank_load_LP[at_LR, rank_LR] - before_LR, 1e30)
        rows_L1 = self.load_LE[layers, experts][:, None]
        levels_LR = (rows_L1 + np.sort(ground_LR, axis=1).cumsum(axis=1)) / (1 + np.arange(slot_LR.shape[1]))
        after_LR = (levels_LR.min(axis=1, keepdims=True) - ground_LR).clip(min=0)
        row, number = np.nonzero(there_LR)
        slot, layer = slot_LR[row, number], layers[row]
        self.load_LS[layer, slot] = after_LR[row, number]
        self.rank_load_LP[layer, self.rank_S[slot]] += (after_LR - before_LR)[row, number]

    # ---- experts

    def _swap(self, layers: np.ndarray, goal_L: np.ndarray) -> None:
        """Let each layer's fullest rank swap one expert for one of another rank, the pair that helps most, again and again, until
        it is within the goal or no swap helps."""
        for _ in range(_MAX_SWAPS):
            layers = layers[self.rank_load_LP[layers].max(axis=1) > goal_L[layers]]
            if not len(layers):
                return
            found, slot, other = self._best_swap(layers)
            layers, slot, other = layers[found], slot[found], other[found]
            x, y = self.expert_LS[layers, slot], self.expert_LS[layers, other]
            less = self.load_LS[layers, slot] - self.load_LS[layers, other]
            self._put(layers, slot, x, y, -less)
            self._put(layers, other, y, x, less)

    def _put(self, layers: np.ndarray, slot: np.ndarray, gone: np.ndarray, comes: np.ndarray, more: np.ndarray) -> None:
        rank = self.rank_S[slot]
        self.held_LPE[layers, rank, gone], self.held_LPE[layers, rank, comes] = False, True
        self.expert_LS[layers, slot] = comes
        self.load_LS[layers, slot] += more
        self.rank_load_LP[layers, rank] += more

    def _best_swap(self, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each of the layers: whether there is a swap that helps, the fullest rank's slot, and the other."""
        expert_LS, load_LS, rank_load_LP = self.expert_LS[layers], self.load_LS[layers], self.rank_load_LP[layers]
        held_LPE, at_L1 = self.held_LPE[layers], np.arange(len(layers))[:, None]
        full_L1 = rank_load_LP.argmax(axis=1)[:, None]
        top_L1 = rank_load_LP.max(axis=1)[:, None]
        slot_Ln = _slots_of(full_L1[:, 0], self.rank_S)
        x_Ln = expert_LS[at_L1, slot_Ln]
        less_LnS = load_LS[at_L1, slot_Ln][:, :, None] - load_LS[:, None, :]
        after_LnS = np.maximum(top_L1[:, :, None] - less_LnS, rank_load_LP[:, None, self.rank_S] + less_LnS)
        held_LnP = held_LPE[at_L1, :, x_Ln]
        refused_LnP = held_LnP | (self.rank_S[slot_Ln] != full_L1)[:, :, None]
        refused_LS = held_LPE[at_L1, full_L1, expert_LS]
        for group_P in self.groupings:
            held_LnG = held_LnP.astype(np.float32) @ (group_P[:, None] == np.arange(group_P.max() + 1))
            refused_LnP |= self._crowded(layers, x_Ln, held_LnG)[:, :, group_P]
            with_full_L1P = (group_P == group_P[full_L1]).astype(np.float32)[:, None]
            held_LE = (with_full_L1P @ held_LPE)[:, 0]
            every_LE = np.broadcast_to(np.arange(held_LE.shape[1]), held_LE.shape)
            refused_LS |= self._crowded(layers, every_LE, held_LE[:, :, None])[at_L1, expert_LS, 0]
        after_LnS[refused_LnP[:, :, self.rank_S] | refused_LS[:, None]] = np.inf
        after_Lx = after_LnS.reshape(len(layers), -1)
        n_L, other_L = np.divmod(after_Lx.argmin(axis=1), len(self.rank_S))
        return after_Lx.min(axis=1) < top_L1[:, 0] * (1 - 1e-6), slot_Ln[at_L1[:, 0], n_L], other_L

    def _crowded(self, layers: np.ndarray, expert_Lx: np.ndarray, held_LxG: np.ndarray) -> np.ndarray:
        """Bool [L, x, G], of experts of which a group holds so many replicas: whether there is one at most besides these, so that
        it may not join them."""
        count_Lx1 = self.count_LE[layers[:, None], expert_Lx][:, :, None]
        return (held_LxG >= count_Lx1 - 1) & (count_Lx1 > 1)

    def _change_replica(self, layers: np.ndarray) -> None:
        """In the slot of the replica that carries least, put the heaviest expert of the fullest rank."""
        at_L1 = np.arange(len(layers))[:, None]
        expert_LS, count_LE = self.expert_LS[layers], self.count_LE[layers]
        on_full_LE = self.held_LPE[layers, self.rank_load_LP[layers].argmax(axis=1)]
        may_come_LE = on_full_LE & (count_LE < self.num_ranks)
        come_L = np.where(may_come_LE, self.load_LE[layers] / count_LE, -1.0).argmax(axis=1)
        price_LS = np.where(count_LE[at_L1, expert_LS] > self.least, self.load_LS[layers], np.inf)
        held_LP = self.held_LPE[layers, :, come_L]
        price_LS[held_LP[:, self.rank_S]] = np.inf
        for group_P in self.groupings:
            group_S = group_P[self.rank_S]
            alone_L1 = held_LP.sum(axis=1, keepdims=True) == 1
            in_group_LGE = (group_P == np.arange(group_P.max() + 1)[:, None]).astype(np.float32) @ self.held_LPE[layers]
            links_LE = (in_group_LGE > 0).sum(axis=1) == 2
            last_LS = (in_group_LGE[at_L1, group_S, expert_LS] == 1) & links_LE[at_L1, expert_LS]
            left_LS = count_LE[at_L1, expert_LS] - 1
            price_LS[(last_LS & (left_LS > 1)) | (alone_L1 & _near(held_LP, group_P)[:, self.rank_S])] = np.inf
        slot_L = price_LS.argmin(axis=1)
        ok_L = np.isfinite(price_LS[at_L1[:, 0], slot_L])
        layers, slot, comes = layers[ok_L], slot_L[ok_L], come_L[ok_L]
        gone = self.expert_LS[layers, slot]
        # The rows of the one given up go to its other replicas; `_flow` evens them out.
        lost = self.load_LS[layers, slot]
        self._put(layers, slot, gone, comes, -lost)
        self.count_LE[layers, gone] -= 1
        self.count_LE[layers, comes] += 1
        heir = (self.expert_LS[layers] == gone[:, None]).argmax(axis=1)
        self.load_LS[layers, heir] += lost
        self.rank_load_LP[layers, self.rank_S[heir]] += lost


def _near(held_LP: np.ndarray, group_P: np.ndarray) -> np.ndarray:
    """Bool [L, P], or [P] of one expert: ranks in a group with one that holds it."""
    return held_LP.astype(np.float32) @ (group_P[:, None] == group_P) > 0


def _beside(held_P: np.ndarray, groupings: Sequence[np.ndarray]) -> np.ndarray:
    """The same in any of the groupings."""
    return np.any([_near(held_P, group_P) for group_P in groupings] or [np.zeros_like(held_P)], axis=0)


def _slots_of(rank_L: np.ndarray, rank_S: np.ndarray) -> np.ndarray:
    """i64 [L, n]: the slots of each layer's rank; the last ones are another's where ranks have different numbers."""
    first_L = np.searchsorted(rank_S, rank_L)
    return np.minimum(first_L[:, None] + np.arange(np.bincount(rank_S).max()), len(rank_S) - 1)


def _match_ranks(fresh: _Plan, now: _Plan, domains: Sequence[int], fails: Sequence[int]) -> None:
    """Let ranks of the fresh plan change places, so that much lies where it lies now.

    They may if they have as many slots, are in one domain, and fail either together or each alone.
    """
    num_ranks, sizes = now.num_ranks, np.bincount(now.rank_S)
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
    slot_LS = first_P[source_LP][:, now.rank_S] + np.arange(len(now.rank_S)) - first_P[now.rank_S]
    fresh.expert_LS, fresh.load_LS = (np.take_along_axis(x, slot_LS, axis=1) for x in (fresh.expert_LS, fresh.load_LS))


def _keep_slots(
    before_LS: np.ndarray, after_LS: np.ndarray, load_LS: np.ndarray, rank_offsets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The same experts with the same loads on every rank, those that stay in their slots."""
    order_LS = np.empty(after_LS.shape, np.int64)
    for first, last in pairwise(rank_offsets):
        same = before_LS[:, first:last, None] == after_LS[:, None, first:last]
        order = np.where(same.any(axis=2), same.argmax(axis=2), -1)
        order[order < 0] = np.nonzero(~same.any(axis=1))[1]
        order_LS[:, first:last] = first + order
    return np.take_along_axis(after_LS, order_LS, axis=1), np.take_along_axis(load_LS, order_LS, axis=1)
