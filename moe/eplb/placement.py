"""Placement of physical experts on ranks, layer by layer.

A router chooses *logical* experts. A *physical* expert is a copy of one on one rank; copies of one logical expert
are its *replicas*, physical experts beyond the logical ones are *redundant*. Replicas are equal and rows
independent, so the choice of a replica cannot change a result.

L layers, E logical experts, X physical experts, P ranks, Q the period with which tokens rotate
through replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Tokens of a rank rotate through replicas with this period; a replica's share is a multiple of 1 / (P * TURNS).
TURNS = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """An assignment of physical experts to ranks.

    Args:
        num_logical: E.
        phy2log: integers [L, X]: the logical expert of each physical one; or [X] or [1, X], the same for every layer.
        rank_offsets: P + 1; rank p holds the physical experts `rank_offsets[p] : rank_offsets[p + 1]` of every layer.
        domains: the NVLink domain of each rank; empty: all ranks are in one.
        shares: numbers shaped like `phy2log`: each replica's share of its logical expert's rows; or ones, [1]: equal.
            Kept as f64, rounded to multiples of 1 / (P * TURNS) that add up to 1 for each logical expert.
    """

    num_logical: int
    phy2log: np.ndarray
    rank_offsets: tuple[int, ...]
    domains: tuple[int, ...] = ()
    shares: np.ndarray = field(default_factory=lambda: np.ones(1))

    def __post_init__(self) -> None:
        logical_LX = np.atleast_2d(np.array(self.phy2log, np.int32))
        shares_LX = self._rounded(logical_LX, np.broadcast_to(self.shares, logical_LX.shape))
        for name, values in (("phy2log", logical_LX), ("shares", shares_LX)):
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        assert self.rank_offsets[0] == 0, self.rank_offsets
        assert self.rank_offsets[-1] == logical_LX.shape[1], self.rank_offsets
        assert len(self.domains) in (0, self.num_ranks), f"{len(self.domains)} domains of {self.num_ranks} ranks"
        for layer, ids in enumerate(logical_LX):
            missing = set(range(self.num_logical)).difference(ids.tolist())
            assert not missing, f"logical experts {sorted(missing)} of layer {layer} have no physical one"

    def _rounded(self, logical_LX: np.ndarray, shares_LX: np.ndarray) -> np.ndarray:
        """Return shares rounded by largest remainders."""
        flat, num_turns = logical_LX + np.arange(len(logical_LX))[:, None] * self.num_logical, self.num_ranks * TURNS
        sums = np.bincount(flat.ravel(), shares_LX.ravel())
        weights_LX = np.where(sums[flat] > 0, shares_LX, 1)
        exact_LX = num_turns * weights_LX / np.bincount(flat.ravel(), weights_LX.ravel())[flat]
        turns_LX = np.floor(exact_LX + 1e-9)
        order = np.lexsort((turns_LX.ravel() - exact_LX.ravel(), flat.ravel()))
        counts = np.bincount(flat.ravel())
        number = np.empty(flat.size)
        number[order] = np.arange(flat.size) - np.repeat(np.cumsum(counts) - counts, counts)
        left = num_turns - np.bincount(flat.ravel(), turns_LX.ravel())
        return (turns_LX + (number.reshape(flat.shape) < left[flat])) / num_turns

    @property
    def num_ranks(self) -> int:
        return len(self.rank_offsets) - 1

    @property
    def num_layers(self) -> int:
        return len(self.phy2log)

    @property
    def num_physical(self) -> int:
        return self.rank_offsets[-1]

    @property
    def rank_of_X(self) -> np.ndarray:
        """Return i64 [X], the rank of each physical expert."""
        return np.repeat(np.arange(self.num_ranks), np.diff(self.rank_offsets))

    def layer(self, layer: int) -> np.ndarray:
        """Return i32 [X], the logical ids of one layer."""
        return self.phy2log[layer if self.num_layers > 1 else 0]

    def experts_of(self, rank: int, layer: int = 0) -> tuple[int, ...]:
        """Return the logical ids of a rank's physical experts, in order."""
        return tuple(self.layer(layer)[self.rank_offsets[rank] : self.rank_offsets[rank + 1]].tolist())

    def rank_load(self, load_LE: np.ndarray) -> np.ndarray:
        """Return f64 [L, P], the rows of each rank for these rows of logical experts of L layers."""
        layers = np.minimum(np.arange(len(load_LE)), self.num_layers - 1)
        load_LX = np.take_along_axis(load_LE, self.phy2log[layers].astype(np.int64), axis=1)
        by_rank = np.add.reduceat(load_LX * self.shares[layers], self.rank_offsets[:-1], axis=1)
        return np.where(np.diff(self.rank_offsets) > 0, by_rank, 0.0)

    def log2phy(self, home_rank: int, layer: int = 0) -> np.ndarray:
        """Return i64 [Q, E]: at [t % Q], the physical experts that token t of `home_rank` uses for logical ones.

        Q is `TURNS` if there are redundant experts, otherwise 1. If all ranks have equally many tokens, every
        replica gets its share; within that, replicas on the token's own rank are preferred, then those in its
        domain.
        """
        logical_X, rank_X = self.layer(layer), self.rank_of_X
        shares_X = self.shares[layer if self.num_layers > 1 else 0]
        if self.num_physical == self.num_logical:
            return np.argsort(logical_X, kind="stable")[None].astype(np.int64)
        table_QE = np.empty((TURNS, self.num_logical), np.int64)
        table_QE[:, logical_X] = np.arange(self.num_physical)
        for logical in np.flatnonzero(np.bincount(logical_X) > 1):
            physical = np.flatnonzero(logical_X == logical)
            turns = np.rint(shares_X[physical] * self.num_ranks * TURNS).astype(np.int64)
            dealt_PQ = _deal(rank_X[physical], turns, self.domains or (0,) * self.num_ranks)
            # Permuted so that any few consecutive tokens are spread like all.
            table_QE[:, logical] = physical[dealt_PQ[home_rank, 7 * (np.arange(TURNS) + home_rank) % TURNS]]
        return table_QE


def _deal(holders: np.ndarray, turns: np.ndarray, domains: tuple[int, ...]) -> np.ndarray:
    """Return i64 [P, Q], the replica that each rank uses in each turn; near replicas are preferred."""
    domain_P, left = np.array(domains), turns.copy()
    dealt_PQ = np.full((len(domains), TURNS), -1)
    for replica, holder in enumerate(holders):
        at_home = np.flatnonzero(dealt_PQ[holder] < 0)[: left[replica]]
        dealt_PQ[holder, at_home] = replica
        left[replica] -= len(at_home)
    for domain in np.unique(domain_P):
        near = np.flatnonzero(domain_P[holders] == domain)
        _hand_out(near, left, np.flatnonzero((domain_P[:, None] == domain) & (dealt_PQ < 0)), dealt_PQ)
    _hand_out(np.arange(len(holders)), left, np.flatnonzero(dealt_PQ < 0), dealt_PQ)
    assert not left.any(), f"of {turns} turns {left} are left over"
    return dealt_PQ


def _hand_out(replicas: np.ndarray, left: np.ndarray, wanting: np.ndarray, dealt_PQ: np.ndarray) -> None:
    """Assign the turns `wanting` (flat indices) to `replicas`, interleaved, as long as these have turns left."""
    when = np.concatenate([(np.arange(count) + 0.5) / count for count in left[replicas]] or [np.empty(0)])
    supply = np.repeat(replicas, left[replicas])[np.argsort(when, kind="stable")][: len(wanting)]
    dealt_PQ.flat[wanting[: len(supply)]] = supply
    left -= np.bincount(supply, minlength=len(left))


def place(
    num_experts: int, num_ranks: int, redundant: int = 0, num_layers: int = 1, domains: Sequence[int] = ()
) -> Placement:
    """Return the initial placement: experts in order, spread evenly; `redundant` ones, and more ranks than experts,
    add replicas.

    `domains` as in `Placement`.

    Raises:
        ValueError: a rank would hold the same expert twice.
    """
    num_physical = max(num_experts + redundant, num_ranks)
    per_rank = -(-num_physical // num_ranks)
    if per_rank > num_experts:
        raise ValueError(
            f"num_redundant_experts {redundant} gives {per_rank} experts to a rank, but the model has only {num_experts}; "
            f"allowed: 0 to {num_experts * num_ranks - num_experts}"
        )
    sizes = [num_physical // num_ranks + (rank < num_physical % num_ranks) for rank in range(num_ranks)]
    return Placement(
        num_logical=num_experts,
        phy2log=np.tile(np.arange(num_physical) % num_experts, (num_layers, 1)),
        rank_offsets=(0, *np.cumsum(sizes).tolist()),
        domains=tuple(domains),
    )
