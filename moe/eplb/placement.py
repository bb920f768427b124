"""Which physical expert lies on which rank, and which logical expert it is, layer by layer.

A router chooses *logical* experts. A *physical* expert is a copy of one on one rank; a logical expert has one or more copies
(replicas). Replicas are equal and rows independent, so the choice among them cannot change a result.

L layers, E logical experts, S physical experts, P ranks, C turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Tokens of a rank take turns among replicas; a replica's share is a multiple of 1 / (P * TURNS).
TURNS = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """An assignment of physical experts to ranks.

    Args:
        num_logical: E.
        physical_to_logical: integers [L, S]: logical ids, by rank; or [S] or [1, S], the same for every layer.
        rank_offsets: P + 1; rank p holds the physical experts `rank_offsets[p] : rank_offsets[p + 1]` of every layer.
        domains: of each rank, the domain within which tokens travel fast; empty: all ranks are in one.
        shares: numbers like `physical_to_logical`: how the rows of an expert are split among its replicas; or ones, [1]: evenly.
            Rounded to multiples of 1 / (P * TURNS); what is kept is f64 and adds up to 1 for each expert.
    """

    num_logical: int
    physical_to_logical: np.ndarray
    rank_offsets: tuple[int, ...]
    domains: tuple[int, ...] = ()
    shares: np.ndarray = field(default_factory=lambda: np.ones(1))

    def __post_init__(self) -> None:
        logical_LS = np.atleast_2d(np.array(self.physical_to_logical, np.int32))
        shares_LS = self._rounded(logical_LS, np.broadcast_to(self.shares, logical_LS.shape))
        for name, values in (("physical_to_logical", logical_LS), ("shares", shares_LS)):
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        assert self.rank_offsets[0] == 0, self.rank_offsets
        assert self.rank_offsets[-1] == logical_LS.shape[1], self.rank_offsets
        assert len(self.domains) in (0, self.num_ranks), f"{len(self.domains)} domains of {self.num_ranks} ranks"
        for layer, ids in enumerate(logical_LS):
            missing = set(range(self.num_logical)).difference(ids.tolist())
            assert not missing, f"logical experts {sorted(missing)} of layer {layer} have no physical one"

    def _rounded(self, logical_LS: np.ndarray, shares_LS: np.ndarray) -> np.ndarray:
        """Largest remainders."""
        flat, num_turns = logical_LS + np.arange(len(logical_LS))[:, None] * self.num_logical, self.num_ranks * TURNS
        sums = np.bincount(flat.ravel(), shares_LS.ravel())
        weights_LS = np.where(sums[flat] > 0, shares_LS, 1)
        exact_LS = num_turns * weights_LS / np.bincount(flat.ravel(), weights_LS.ravel())[flat]
        turns_LS = np.floor(exact_LS + 1e-9)
        order = np.lexsort((turns_LS.ravel() - exact_LS.ravel(), flat.ravel()))
        counts = np.bincount(flat.ravel())
        number = np.empty(flat.size)
        number[order] = np.arange(flat.size) - np.repeat(np.cumsum(counts) - counts, counts)
        left = num_turns - np.bincount(flat.ravel(), turns_LS.ravel())
        return (turns_LS + (number.reshape(flat.shape) < left[flat])) / num_turns

    @property
    def num_ranks(self) -> int:
        return len(self.rank_offsets) - 1

    @property
    def num_layers(self) -> int:
        return len(self.physical_to_logical)

    @property
    def num_physical(self) -> int:
        return self.rank_offsets[-1]

    @property
    def rank_of_S(self) -> np.ndarray:
        """i64: where each physical expert lies."""
        return np.repeat(np.arange(self.num_ranks), np.diff(self.rank_offsets))

    def layer(self, layer: int) -> np.ndarray:
        """i32 [S]: one layer's logical ids."""
        return self.physical_to_logical[layer if self.num_layers > 1 else 0]

    def experts_of(self, rank: int, layer: int = 0) -> tuple[int, ...]:
        """Logical ids of a rank's physical experts, in order."""
        return tuple(self.layer(layer)[self.rank_offsets[rank] : self.rank_offsets[rank + 1]].tolist())

    def rank_load(self, load_LE: np.ndarray) -> np.ndarray:
        """f64 [L, P]: the rows of each rank, if the logical experts of L layers have these."""
        layers = np.minimum(np.arange(len(load_LE)), self.num_layers - 1)
        load_LS = np.take_along_axis(load_LE, self.physical_to_logical[layers].astype(np.int64), axis=1)
        by_rank = np.add.reduceat(load_LS * self.shares[layers], self.rank_offsets[:-1], axis=1)
        return np.where(np.diff(self.rank_offsets) > 0, by_rank, 0.0)

    def physical_for(self, home_rank: int, layer: int = 0) -> np.ndarray:
        """i64 [C, E]: the physical expert that row t of a step's tokens of `home_rank` uses for each logical one, at [t % C].

        C is `TURNS` if any expert of any layer can have replicas, otherwise 1. Where all ranks have as many tokens, every replica
        gets its share, and as much as that allows goes to a replica on the home rank, or else in its domain.
        """
        logical_S, rank_S = self.layer(layer), self.rank_of_S
        shares_S = self.shares[layer if self.num_layers > 1 else 0]
        if self.num_physical == self.num_logical:
            return np.argsort(logical_S, kind="stable")[None].astype(np.int64)
        table_CE = np.empty((TURNS, self.num_logical), np.int64)
        table_CE[:, logical_S] = np.arange(self.num_physical)
        for logical in np.flatnonzero(np.bincount(logical_S) > 1):
            physical = np.flatnonzero(logical_S == logical)
            turns = np.rint(shares_S[physical] * self.num_ranks * TURNS).astype(np.int64)
            dealt_PC = _deal(rank_S[physical], turns, self.domains or (0,) * self.num_ranks)
            # In an order in which any few tokens are spread much like all.
            table_CE[:, logical] = physical[dealt_PC[home_rank, 7 * (np.arange(TURNS) + home_rank) % TURNS]]
        return table_CE


def _deal(holders: np.ndarray, turns: np.ndarray, domains: tuple[int, ...]) -> np.ndarray:
    """i64 [P, C]: which of the replicas, on the ranks `holders`, every rank uses; each gets its turns, near ones first."""
    domain_P, left = np.array(domains), turns.copy()
    dealt_PC = np.full((len(domains), TURNS), -1)
    for replica, holder in enumerate(holders):
        at_home = np.flatnonzero(dealt_PC[holder] < 0)[: left[replica]]
        dealt_PC[holder, at_home] = replica
        left[replica] -= len(at_home)
    for domain in np.unique(domain_P):
        near = np.flatnonzero(domain_P[holders] == domain)
        _hand_out(near, left, np.flatnonzero((domain_P[:, None] == domain) & (dealt_PC < 0)), dealt_PC)
    _hand_out(np.arange(len(holders)), left, np.flatnonzero(dealt_PC < 0), dealt_PC)
    assert not left.any(), f"of {turns} turns {left} are left over"
    return dealt_PC


def _hand_out(replicas: np.ndarray, left: np.ndarray, wanting: np.ndarray, dealt_PC: np.ndarray) -> None:
    """Give the turns `wanting` (flat) to `replicas`, mixed, as long as they have some left."""
    when = np.concatenate([(np.arange(count) + 0.5) / count for count in left[replicas]] or [np.empty(0)])
    supply = np.repeat(replicas, left[replicas])[np.argsort(when, kind="stable")][: len(wanting)]
    dealt_PC.flat[wanting[: len(supply)]] = supply
    left -= np.bincount(supply, minlength=len(left))


def place(
    num_experts: int, num_ranks: int, redundant: int = 0, num_layers: int = 1, domains: Sequence[int] = ()
) -> Placement:
    """Spread experts over ranks in order, as evenly as possible; ranks beyond the experts, and `redundant`, get replicas.

    `domains` are those of `Placement`.

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
        physical_to_logical=np.tile(np.arange(num_physical) % num_experts, (num_layers, 1)),
        rank_offsets=(0, *np.cumsum(sizes).tolist()),
        domains=tuple(domains),
    )
