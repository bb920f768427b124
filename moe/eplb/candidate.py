"""A candidate for the placement of all layers' experts, and the steps that make it better; see `algorithm`.

L layers, E logical experts, X physical experts, P ranks, J groups of ranks, n physical experts of a rank, z
replicas of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 4  # of levelling and swapping
_SWEEPS = 3  # over all experts, when shares are levelled
_MAX_SWAPS = 100  # of a layer in a round


class Candidate:
    """A candidate for all layers; loads are rows. `groupings`: for each kind of domain, group numbers [P]."""

    def __init__(
        self,
        load_LE: np.ndarray,
        rank_X: np.ndarray,
        groupings: list[np.ndarray],
        expert_LX: np.ndarray,
        load_LX: np.ndarray,
    ) -> None:
        num_layers, num_experts = load_LE.shape
        self.load_LE, self.rank_X, self.groupings = load_LE, rank_X, groupings
        self.expert_LX, self.load_LX = expert_LX, load_LX
        self.num_ranks = int(rank_X[-1]) + 1
        self.mean_L = load_LE.sum(axis=1) / self.num_ranks
        # Replicas that every expert gets: two, if there are slots for that.
        self.least = 2 if self.num_ranks > 1 and len(rank_X) >= 2 * num_experts else 1
        self.held_LPE = np.zeros((num_layers, self.num_ranks, num_experts), bool)
        np.put_along_axis(self.held_LPE.reshape(num_layers, -1), rank_X * num_experts + expert_LX, True, axis=1)
        self.count_LE = self.held_LPE.sum(axis=1)
        self.rank_load_LP = np.add.reduceat(load_LX, np.searchsorted(rank_X, np.arange(self.num_ranks)), axis=1)

    def with_slots(self, expert_LX: np.ndarray, load_LX: np.ndarray) -> Candidate:
        """Return the same layers with these experts and rows in the slots."""
        return Candidate(self.load_LE, self.rank_X, self.groupings, expert_LX, load_LX)

    def improve(self, goal_L: np.ndarray, changes: int = 0) -> None:
        """Level, swap, and change replicas `changes` times, until the fullest rank is within the goal."""
        for i in range(_ROUNDS + changes):
            active = np.flatnonzero(self.rank_load_LP.max(axis=1) > goal_L)
            if not len(active):
                return
            if i >= _ROUNDS:
                self._change_replica(active)
            self._level(active)
            self._swap(active, goal_L)

    # ---- a fresh plan

    def fresh(self, goal_L: np.ndarray) -> Candidate:
        """Return the fresh candidate, with the fullest rank within the goal if possible."""
        fresh = self._pack(*self._full_pieces())
        fresh.improve(goal_L)
        hard = np.flatnonzero(fresh.rank_load_LP.max(axis=1) > goal_L)
        if len(hard):
            slots = self.expert_LX[hard], self.load_LX[hard]
            other = Candidate(self.load_LE[hard], self.rank_X, self.groupings, *slots)
            other = other._pack(*other._equal_pieces(np.full_like(other.count_LE, self.least)))
            other.improve(goal_L[hard])
            better = other.rank_load_LP.max(axis=1) < fresh.rank_load_LP[hard].max(axis=1)
            fresh.expert_LX[hard[better]], fresh.load_LX[hard[better]] = other.expert_LX[better], other.load_LX[better]
            fresh = fresh.with_slots(fresh.expert_LX, fresh.load_LX)
        return fresh

    def _equal_pieces(self, count_LE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return experts and loads [L, X] of one piece a slot: at least `count_LE` of each expert, with equal loads."""
        count_LE = self._more(count_LE)
        expert_LX = np.stack([np.repeat(np.arange(len(count_E)), count_E) for count_E in count_LE])
        return expert_LX, np.take_along_axis(self.load_LE / count_LE, expert_LX, axis=1)

    def _more(self, count_LE: np.ndarray) -> np.ndarray:
        """Give the remaining slots, one by one, to the expert with the most rows a replica; return the counts."""
        count_LE, rows, num_slots = count_LE.copy(), np.arange(len(count_LE)), len(self.rank_X)
        for _ in range(num_slots - count_LE.sum(axis=1).min()):
            some = rows[count_LE.sum(axis=1) < num_slots]
            each_LE = np.where(count_LE[some] < self.num_ranks, self.load_LE[some] / count_LE[some], -1.0)
            count_LE[some, each_LE.argmax(axis=1)] += 1
        return count_LE

    def _full_pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """As `_equal_pieces`, but an expert that is too much for a rank gets full pieces and a remainder."""
        per_rank = len(self.rank_X) // self.num_ranks
        beside_L = np.sort(self.load_LE, axis=1)[:, : per_rank - 1].sum(axis=1)  # at least, on a rank with a full piece
        low_L, high_L = self.mean_L, self.mean_L + self.load_LE.max(axis=1) + beside_L
        for _ in range(30):
            middle_L = (low_L + high_L) / 2
            fits_L = self._num_pieces(middle_L - beside_L).sum(axis=1) <= len(self.rank_X)
            low_L, high_L = np.where(fits_L, low_L, middle_L), np.where(fits_L, middle_L, high_L)
        full_L1 = (high_L - beside_L)[:, None]
        needed_LE = self._num_pieces(full_L1[:, 0])
        expert_LX, _ = self._equal_pieces(needed_LE)
        count_LE = self._more(needed_LE)
        full_LE = np.where(self.load_LE > full_L1, needed_LE - 1, 0)
        rest_LE = (self.load_LE - full_L1 * full_LE) / (count_LE - full_LE)
        first_LE = np.cumsum(count_LE, axis=1) - count_LE
        number_LX = np.arange(len(self.rank_X)) - np.take_along_axis(first_LE, expert_LX, axis=1)
        full_LX, rest_LX = (np.take_along_axis(values, expert_LX, axis=1) for values in (full_LE, rest_LE))
        return expert_LX, np.where(number_LX < full_LX, full_L1, rest_LX)

    def _num_pieces(self, full_L: np.ndarray) -> np.ndarray:
        num = np.ceil(self.load_LE / np.maximum(full_L, 1e-12)[:, None] - 1e-9)
        return num.clip(self.least, self.num_ranks).astype(np.int64)

    def _pack(self, expert_LX: np.ndarray, load_LX: np.ndarray) -> Candidate:
        """Put every piece, by descending load, on the least loaded rank with a free slot that lacks its expert."""
        order_LX = np.argsort(-load_LX, axis=1, kind="stable")
        expert_LX, load_LX = (np.take_along_axis(x, order_LX, axis=1) for x in (expert_LX, load_LX))
        num_layers, rows = len(expert_LX), np.arange(len(expert_LX))
        rank_load_LP = np.zeros((num_layers, self.num_ranks))
        free_LP = np.tile(np.bincount(self.rank_X), (num_layers, 1))
        held_LPE = np.zeros_like(self.held_LPE)
        piece_LPE = np.zeros(held_LPE.shape)
        beyond_L1 = 1 + self.load_LE.sum(axis=1, keepdims=True)
        for expert_L, load_L in zip(expert_LX.T, load_LX.T, strict=True):
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
        layers, ranks, experts = np.nonzero(held_LPE)  # by rank
        shape = expert_LX.shape
        packed = piece_LPE[layers, ranks, experts].reshape(shape)
        return self.with_slots(experts.reshape(shape), packed)

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
        """Move another rank's expert to `rank` so that the other gets a free slot for `expert`; return the other.

        Called when every rank with a free slot holds the expert, or is in a group that does. If `rank` holds the
        expert and groups do not matter, there is such a rank: one that lacks the expert and holds as many others.
        """
        stuck = bool(held_PE[rank, expert] or not free_P[rank])
        free = int(free_P.argmax()) if stuck else rank
        holders = np.flatnonzero(held_PE[:, expert])
        if not stuck and all(len(set(group_P[holders])) > 1 for group_P in self.groupings):
            return rank
        for groupings in (self.groupings, []):
            barred_P = held_PE[:, expert] | _beside(held_PE[:, expert], groupings)
            others = np.flatnonzero(~barred_P)
            for other in others[np.argsort(load_P[others], kind="stable")]:
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

    def _level(self, layers: np.ndarray) -> None:
        """Level the ranks that hold an expert by the shares of its replicas, one expert after another."""
        order_LX = np.argsort(self.expert_LX[layers], axis=1, kind="stable")
        count_LE = self.count_LE[layers]
        first_LE = np.cumsum(count_LE, axis=1) - count_LE
        shared = [np.flatnonzero(count_E > 1) for count_E in count_LE]
        for _ in range(_SWEEPS):
            for j in range(max(map(len, shared))):
                here = np.array([i for i, experts in enumerate(shared) if j < len(experts)])
                expert = np.array([shared[i][j] for i in here])
                count, first = count_LE[here, expert], first_LE[here, expert]
                number_z = np.arange(count.max())
                there_Lz = number_z < count[:, None]
                slot_Lz = order_LX[here[:, None], np.where(there_Lz, first[:, None] + number_z, 0)]
                self._fill(layers[here], expert, slot_Lz, there_Lz)

    def _fill(self, layers: np.ndarray, experts: np.ndarray, slot_Lz: np.ndarray, there_Lz: np.ndarray) -> None:
        at_Lz, rank_Lz = layers[:, None], self.rank_X[slot_Lz]
        before_Lz = self.load_LX[at_Lz, slot_Lz]
        ground_Lz = np.where(there_Lz, self.rank_load_LP[at_Lz, rank_Lz] - before_Lz, 1e30)
        rows_L1 = self.load_LE[layers, experts][:, None]
        levels_Lz = (rows_L1 + np.sort(ground_Lz, axis=1).cumsum(axis=1)) / (1 + np.arange(slot_Lz.shape[1]))
        after_Lz = (levels_Lz.min(axis=1, keepdims=True) - ground_Lz).clip(min=0)
        row, number = np.nonzero(there_Lz)
        slot, layer = slot_Lz[row, number], layers[row]
        self.load_LX[layer, slot] = after_Lz[row, number]
        self.rank_load_LP[layer, self.rank_X[slot]] += (after_Lz - before_Lz)[row, number]

    # ---- experts

    def _swap(self, layers: np.ndarray, goal_L: np.ndarray) -> None:
        """Swap an expert of each layer's fullest rank for another rank's, the best pair first, until no swap helps.

        A layer whose fullest rank is within the goal is left alone.
        """
        for _ in range(_MAX_SWAPS):
            layers = layers[self.rank_load_LP[layers].max(axis=1) > goal_L[layers]]
            if not len(layers):
                return
            found, slot, other = self._best_swap(layers)
            layers, slot, other = layers[found], slot[found], other[found]
            x, y = self.expert_LX[layers, slot], self.expert_LX[layers, other]
            less = self.load_LX[layers, slot] - self.load_LX[layers, other]
            self._put(layers, slot, x, y, -less)
            self._put(layers, other, y, x, less)

    def _put(self, layers: np.ndarray, slot: np.ndarray, gone: np.ndarray, comes: np.ndarray, more: np.ndarray) -> None:
        rank = self.rank_X[slot]
        self.held_LPE[layers, rank, gone], self.held_LPE[layers, rank, comes] = False, True
        self.expert_LX[layers, slot] = comes
        self.load_LX[layers, slot] += more
        self.rank_load_LP[layers, rank] += more

    def _best_swap(self, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for each layer whether a swap helps, the fullest rank's slot, and the other slot."""
        expert_LX, load_LX, rank_load_LP = self.expert_LX[layers], self.load_LX[layers], self.rank_load_LP[layers]
        held_LPE, at_L1 = self.held_LPE[layers], np.arange(len(layers))[:, None]
        full_L1 = rank_load_LP.argmax(axis=1)[:, None]
        top_L1 = rank_load_LP.max(axis=1)[:, None]
        slot_Ln = _slots_of(full_L1[:, 0], self.rank_X)
        x_Ln = expert_LX[at_L1, slot_Ln]
        less_LnX = load_LX[at_L1, slot_Ln][:, :, None] - load_LX[:, None, :]
        after_LnX = np.maximum(top_L1[:, :, None] - less_LnX, rank_load_LP[:, None, self.rank_X] + less_LnX)
        held_LnP = held_LPE[at_L1, :, x_Ln]
        refused_LnP = held_LnP | (self.rank_X[slot_Ln] != full_L1)[:, :, None]
        refused_LX = held_LPE[at_L1, full_L1, expert_LX]
        for group_P in self.groupings:
            held_LnJ = held_LnP.astype(np.float32) @ (group_P[:, None] == np.arange(group_P.max() + 1))
            refused_LnP |= self._crowded(layers, x_Ln, held_LnJ)[:, :, group_P]
            with_full_L1P = (group_P == group_P[full_L1]).astype(np.float32)[:, None]
            held_LE = (with_full_L1P @ held_LPE)[:, 0]
            every_LE = np.broadcast_to(np.arange(held_LE.shape[1]), held_LE.shape)
            refused_LX |= self._crowded(layers, every_LE, held_LE[:, :, None])[at_L1, expert_LX, 0]
        after_LnX[refused_LnP[:, :, self.rank_X] | refused_LX[:, None]] = np.inf
        after_Lx = after_LnX.reshape(len(layers), -1)
        n_L, other_L = np.divmod(after_Lx.argmin(axis=1), len(self.rank_X))
        return after_Lx.min(axis=1) < top_L1[:, 0] * (1 - 1e-6), slot_Ln[at_L1[:, 0], n_L], other_L

    def _crowded(self, layers: np.ndarray, expert_Lx: np.ndarray, held_LxJ: np.ndarray) -> np.ndarray:
        """Return bool [L, x, J]: whether at most one replica of an expert lies outside a group, so that it must
        stay outside.

        `held_LxJ` is the number of replicas in each group.
        """
        count_Lx1 = self.count_LE[layers[:, None], expert_Lx][:, :, None]
        return (held_LxJ >= count_Lx1 - 1) & (count_Lx1 > 1)

    def _change_replica(self, layers: np.ndarray) -> None:
        """Replace the replica with the least load by one of the heaviest expert of the fullest rank."""
        at_L1 = np.arange(len(layers))[:, None]
        expert_LX, count_LE = self.expert_LX[layers], self.count_LE[layers]
        on_full_LE = self.held_LPE[layers, self.rank_load_LP[layers].argmax(axis=1)]
        may_come_LE = on_full_LE & (count_LE < self.num_ranks)
        come_L = np.where(may_come_LE, self.load_LE[layers] / count_LE, -1.0).argmax(axis=1)
        price_LX = np.where(count_LE[at_L1, expert_LX] > self.least, self.load_LX[layers], np.inf)
        held_LP = self.held_LPE[layers, :, come_L]
        price_LX[held_LP[:, self.rank_X]] = np.inf
        for group_P in self.groupings:
            group_X = group_P[self.rank_X]
            alone_L1 = held_LP.sum(axis=1, keepdims=True) == 1
            in_group_LJE = (group_P == np.arange(group_P.max() + 1)[:, None]).astype(np.float32) @ self.held_LPE[layers]
            links_LE = (in_group_LJE > 0).sum(axis=1) == 2
            last_LX = (in_group_LJE[at_L1, group_X, expert_LX] == 1) & links_LE[at_L1, expert_LX]
            left_LX = count_LE[at_L1, expert_LX] - 1
            price_LX[(last_LX & (left_LX > 1)) | (alone_L1 & _near(held_LP, group_P)[:, self.rank_X])] = np.inf
        slot_L = price_LX.argmin(axis=1)
        ok_L = np.isfinite(price_LX[at_L1[:, 0], slot_L])
        layers, slot, comes = layers[ok_L], slot_L[ok_L], come_L[ok_L]
        gone = self.expert_LX[layers, slot]
        # The rows of the one given up go to its other replicas; `_level` evens them out.
        lost = self.load_LX[layers, slot]
        self._put(layers, slot, gone, comes, -lost)
        self.count_LE[layers, gone] -= 1
        self.count_LE[layers, comes] += 1
        heir = (self.expert_LX[layers] == gone[:, None]).argmax(axis=1)
        self.load_LX[layers, heir] += lost
        self.rank_load_LP[layers, self.rank_X[heir]] += lost


def _near(held_LP: np.ndarray, group_P: np.ndarray) -> np.ndarray:
    """Return bool [L, P], or [P] for one expert: ranks in a group with a rank that holds it."""
    return held_LP.astype(np.float32) @ (group_P[:, None] == group_P) > 0


def _beside(held_P: np.ndarray, groupings: Sequence[np.ndarray]) -> np.ndarray:
    """Return `_near` for any of the groupings."""
    return np.any([_near(held_P, group_P) for group_P in groupings] or [np.zeros_like(held_P)], axis=0)


def _slots_of(rank_L: np.ndarray, rank_X: np.ndarray) -> np.ndarray:
    """Return i64 [L, n], the slots of each layer's rank; the last are another rank's where ranks have fewer."""
    first_L = np.searchsorted(rank_X, rank_L)
    return np.minimum(first_L[:, None] + np.arange(np.bincount(rank_X).max()), len(rank_X) - 1)
