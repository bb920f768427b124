"""Which physical expert lies on which rank, and which logical expert it is.

A router chooses *logical* experts. A *physical* expert is a copy of one on one rank; a logical expert has one or more copies
(replicas). Replicas are equal and rows independent, so the choice among them cannot change a result.

E logical experts, S physical experts, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Placement:
    """An assignment of physical experts to ranks; the same for every layer today.

    Args:
        num_logical: E.
        physical_to_logical: S logical ids, by rank.
        rank_offsets: P + 1; rank p holds the physical experts `rank_offsets[p] : rank_offsets[p + 1]`.
    """

    num_logical: int
    physical_to_logical: tuple[int, ...]
    rank_offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        missing = set(range(self.num_logical)) - set(self.physical_to_logical)
        assert not missing, f"logical experts {sorted(missing)} have no physical one"
        assert self.rank_offsets[0] == 0, self.rank_offsets
        assert self.rank_offsets[-1] == len(self.physical_to_logical), self.rank_offsets

    @property
    def num_ranks(self) -> int:
        return len(self.rank_offsets) - 1

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Logical ids of a rank's physical experts, in order."""
        return self.physical_to_logical[self.rank_offsets[rank] : self.rank_offsets[rank + 1]]

    @cached_property
    def _replicas(self) -> list[list[int]]:
        replicas: list[list[int]] = [[] for _ in range(self.num_logical)]
        for physical, logical in enumerate(self.physical_to_logical):
            replicas[logical].append(physical)
        return replicas

    def physical_for(self, home_rank: int) -> np.ndarray:
        """i64 [E]: the physical expert that tokens of `home_rank` use for each logical one.

        A replica on the home rank if there is one, otherwise the ranks take turns: an even split that moves all of a rank's
        rows of an expert to one place.
        """
        first, last = self.rank_offsets[home_rank], self.rank_offsets[home_rank + 1]
        chosen = []
        for replicas in self._replicas:
            here = [physical for physical in replicas if first <= physical < last]
            chosen.append(here[0] if here else replicas[home_rank % len(replicas)])
        return np.array(chosen, np.int64)


def place(num_experts: int, num_ranks: int, redundant: int = 0) -> Placement:
    """Spread experts over ranks in order, as evenly as possible; ranks beyond the experts, and `redundant`, get replicas.

    Raises:
        ValueError: a rank would hold the same expert twice.
    """
    num_physical = max(num_experts + redundant, num_ranks)
    per_rank = -(-num_physical // num_ranks)
    if per_rank > num_experts:
        raise ValueError(
            f"redundant_experts {redundant} gives {per_rank} experts to a rank, but the model has only {num_experts}; "
            f"allowed: 0 to {num_experts * num_ranks - num_experts}"
        )
    sizes = [num_physical // num_ranks + (rank < num_physical % num_ranks) for rank in range(num_ranks)]
    return Placement(
        num_logical=num_experts,
        physical_to_logical=tuple(physical % num_experts for physical in range(num_physical)),
        rank_offsets=(0, *np.cumsum(sizes).tolist()),
    )
