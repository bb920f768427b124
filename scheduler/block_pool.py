"""Which blocks of every rank's caches are free, in use (reference counts) and promised (reservations).

Shape letters: G caches (groups of layers with one block table), P ranks, A requests, B block ids. Block 0 of each cache of
each rank is the null block: never handed out, ranks pad with it.

A request is admitted only if its worst case can be reserved, and takes blocks one by one as its tokens are computed. So
`allocate` cannot fail, and no request ever waits for another one's blocks. Prefix caching will keep freed blocks by their hash
in the free list; preemption will admit with less than the worst case.
"""

from __future__ import annotations

import numpy as np

from expertwire.scheduler import ragged


class BlockPool:
    """Accounts for `num_blocks` blocks in each of `num_groups` caches on each of `num_ranks` ranks."""

    def __init__(self, num_groups: int, num_ranks: int, num_blocks: int) -> None:
        shape = (num_groups, num_ranks, num_blocks)
        self.capacity = num_blocks - 1
        self.refs_GPB = np.zeros(shape, np.int32)
        # The free list is a stack: entries [0, num_free) are free, the last one is handed out next.
        self._free_GPB = np.empty(shape, np.int32)
        self._free_GPB[:] = np.arange(num_blocks, 0, -1) - 1
        self.num_free_GP = np.full(shape[:2], self.capacity, np.int64)
        self.reserved_GP = np.zeros(shape[:2], np.int64)

    def unreserved_P(self) -> np.ndarray:
        """i64 [P], blocks that the rank can still promise in every one of its caches."""
        return self.capacity - self.reserved_GP.max(axis=0)

    def reserve(self, rank_A: np.ndarray, counts_A: np.ndarray) -> None:
        """Promise each of A requests its count of blocks of every cache."""
        self.reserved_GP += np.bincount(rank_A, counts_A, self.reserved_GP.shape[1]).astype(np.int64)
        assert (self.reserved_GP <= self.capacity).all(), f"promised {self.reserved_GP} of {self.capacity} blocks"

    def unreserve(self, rank_A: np.ndarray, counts_A: np.ndarray) -> None:
        """Take promises back, when the requests have ended and their blocks are freed."""
        self.reserved_GP -= np.bincount(rank_A, counts_A, self.reserved_GP.shape[1]).astype(np.int64)
        assert (self.reserved_GP >= 0).all(), f"took back more than was promised: {self.reserved_GP}"

    def allocate(self, group: int, rank_B: np.ndarray) -> np.ndarray:
        """Hand out one block, with one reference, for every entry of `rank_B` (ascending): i32 [B]."""
        counts_P = np.bincount(rank_B, minlength=self.num_free_GP.shape[1])
        free_P = self.num_free_GP[group]
        assert (counts_P <= free_P).all(), f"cache {group}: asked for {counts_P} blocks, free are {free_P}"
        ids_B = self._free_GPB[group, rank_B, free_P[rank_B] - 1 - ragged.positions(counts_P)]
        free_P -= counts_P
        self.refs_GPB[group, rank_B, ids_B] = 1
        return ids_B

    def free(self, group: int, rank_B: np.ndarray, ids_B: np.ndarray) -> None:
        """Drop one reference to every block (`rank_B`, `ids_B`); those without any left become free."""
        _, num_ranks, num_blocks = self.refs_GPB.shape
        refs = self.refs_GPB[group].reshape(-1)
        flat_B = rank_B.astype(np.int64) * num_blocks + ids_B
        np.subtract.at(refs, flat_B, 1)
        flat = np.unique(flat_B)
        assert (flat % num_blocks != 0).all(), f"cache {group}: the null block was freed"
        assert (refs[flat] >= 0).all(), f"cache {group}: freed too often: {flat[refs[flat] < 0]}"
        flat = flat[refs[flat] == 0]
        rank_F = flat // num_blocks
        counts_P = np.bincount(rank_F, minlength=num_ranks)
        free_P = self.num_free_GP[group]
        self._free_GPB[group, rank_F, free_P[rank_F] + ragged.positions(counts_P)] = flat % num_blocks
        free_P += counts_P

    def num_used(self, group: int) -> np.ndarray:
        """i64 [P], blocks with references."""
        return self.capacity - self.num_free_GP[group]

    def check_integrity(self) -> None:
        """Every block is either free, once and without references, or referenced; the null block is neither."""
        num_groups, num_ranks, num_blocks = self.refs_GPB.shape
        for group in range(num_groups):
            for rank in range(num_ranks):
                free = self._free_GPB[group, rank, : self.num_free_GP[group, rank]]
                used = np.flatnonzero(self.refs_GPB[group, rank])
                found = np.sort(np.concatenate([free, used]))
                assert np.array_equal(found, np.arange(1, num_blocks)), (group, rank, free, used)
                assert (self.refs_GPB[group, rank] >= 0).all(), (group, rank)
                reserved = self.reserved_GP[group, rank]
                assert len(used) <= reserved <= self.capacity, (group, rank, len(used), reserved)
