"""Which blocks of every rank's caches are in use, free, or free with contents that a later request may begin with.

Shape letters: G caches (groups of layers with one block table), P ranks, B block ids, Q places of a queue. Block 0 of each cache
of each rank is the null block: never handed out, ranks pad with it.

A block in use has one reference or more. A free block waits in its rank's queue: those with a name (see `scheduler.prefix`) at
the end, so that what was used last is given away last, those without at the front. A request that begins with a free named block
takes it out of the queue again; its old place there is then stale, which its ticket shows.
"""

from __future__ import annotations

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler.prefix_index import PrefixIndex

_IN_USE = np.iinfo(np.int64).min
_ONE = np.int32(1)  # of the type of the counts, as else `ufunc.at` is fifty times slower


class BlockPool:
    """Accounts for `num_blocks` blocks in each of `num_groups` caches on each of `num_ranks` ranks."""

    def __init__(self, num_groups: int, num_ranks: int, num_blocks: int) -> None:
        shape = (num_groups, num_ranks, num_blocks)
        self.capacity = num_blocks - 1
        self.num_ranks = num_ranks
        self.num_blocks = num_blocks
        self.refs_GPB = np.zeros(shape, np.int32)
        self.num_free_GP = np.full(shape[:2], self.capacity, np.int64)
        self.named_GPB = np.zeros(shape, bool)
        self._index = PrefixIndex(num_groups * num_ranks, num_blocks)
        # Queue positions count up (at the end) and down (at the front) for ever; a place is a position modulo the queue's length.
        self._queue_GPQ = np.zeros((num_groups, num_ranks, 2 * num_blocks), np.int32)
        self._queue_GPQ[:, :, : self.capacity] = np.arange(1, num_blocks)
        self._front_GP = np.zeros(shape[:2], np.int64)
        self._end_GP = np.full(shape[:2], self.capacity, np.int64)
        self._ticket_GPB = np.full(shape, _IN_USE, np.int64)
        self._ticket_GPB[:, :, 1:] = np.arange(self.capacity)
        # The same memory by a block's number or by a place's: one index is several times faster than three.
        self._refs, self._named, self._ticket = (
            array.reshape(-1) for array in (self.refs_GPB, self.named_GPB, self._ticket_GPB)
        )
        self._queue = self._queue_GPQ.reshape(-1)

    def allocate(self, group: int, rank_B: np.ndarray) -> np.ndarray:
        """Hand out one block, with one reference, for every entry of `rank_B` (ascending): i32 [B]. They lose their names."""
        counts_P = np.bincount(rank_B, minlength=self.num_ranks)
        free_P = self.num_free_GP[group]
        assert (counts_P <= free_P).all(), f"cache {group}: asked for {counts_P} blocks, free are {free_P}"
        front_P, ids_B = self._front_GP[group], np.zeros(len(rank_B), np.int32)
        missing = np.arange(len(rank_B))
        length = self._queue_GPQ.shape[2]
        while len(missing):  # again for those that found a stale place
            rank = rank_B[missing]
            wanted_P = np.bincount(rank, minlength=self.num_ranks)
            position = front_P[rank] + ragged.positions(wanted_P)
            front_P += wanted_P
            found = self._queue.take(self._owner(group, rank) * length + position % length)
            valid = self._ticket.take(self._number(group, rank, found)) == position
            ids_B[missing[valid]] = found[valid]
            missing = missing[~valid]
        free_P -= counts_P
        number_B = self._number(group, rank_B, ids_B)
        self._ticket[number_B] = _IN_USE
        self._refs[number_B] = 1
        self._forget(number_B, rank_B)
        return ids_B

    def share(self, group: int, rank_B: np.ndarray, ids_B: np.ndarray) -> None:
        """Add a reference to every block (`rank_B`, `ids_B`), which is in use or free with a name."""
        number_B = self._number(group, rank_B, ids_B)
        found = np.unique(number_B[self._refs[number_B] == 0])
        self.num_free_GP[group] -= np.bincount(
            found // self.num_blocks - group * self.num_ranks, minlength=self.num_ranks
        )
        self._ticket[found] = _IN_USE
        np.add.at(self._refs, number_B, _ONE)

    def free(self, group: int, rank_B: np.ndarray, ids_B: np.ndarray) -> None:
        """Drop one reference to every block (`rank_B`, `ids_B`); those without any left become free, the last one first."""
        number_B = self._number(group, rank_B, ids_B)
        np.subtract.at(self._refs, number_B, _ONE)
        refs_B = self._refs.take(number_B)
        assert ids_B.all(), f"cache {group}: the null block was freed"
        assert (refs_B >= 0).all(), f"cache {group}: freed too often: {number_B[refs_B < 0]}"
        order = np.flatnonzero(refs_B == 0)[::-1]
        order = order[np.argsort(rank_B[order], kind="stable")]
        number_F, rank_F = number_B[order], rank_B[order]
        nth = np.arange(len(number_F))
        self._ticket[number_F[::-1]] = nth[::-1]
        once = self._ticket.take(number_F) == nth  # of a block that is there twice, the first one
        self._ticket[number_F] = _IN_USE
        named = self._named.take(number_F)
        for chosen, at_end in ((once & named, True), (once & ~named, False)):
            self._enqueue(group, rank_F[chosen], number_F[chosen], at_end=at_end)

    def name(self, group: int, rank_B: np.ndarray, ids_B: np.ndarray, names_B2: np.ndarray) -> None:
        """Say what these blocks, which are in use and have no names, hold."""
        number_B = self._number(group, rank_B, ids_B)
        assert (self._refs.take(number_B) > 0).all(), "a free block was named"
        self._named[number_B] = self._index.insert(number_B, rank_B, names_B2)

    def find(self, group: int, rank_M: np.ndarray, names_M2: np.ndarray) -> np.ndarray:
        """A block of each rank with each name, or -1: i64 [M]."""
        return self._index.find(self._owner(group, rank_M), rank_M, names_M2)

    def guess(self, names_M2: np.ndarray) -> np.ndarray:
        """A rank that probably has a block with each name, or `NOBODY`, or `UNKNOWN`: i32 [M]."""
        return self._index.guess(names_M2)

    def num_used(self, group: int) -> np.ndarray:
        """i64 [P], blocks with references."""
        return self.capacity - self.num_free_GP[group]

    def check_integrity(self) -> None:
        """Every block is either free, with one valid place in its queue and no reference, or referenced; the null block is
        neither; names and holders agree."""
        num_groups, num_ranks, num_blocks = self.refs_GPB.shape
        length = self._queue_GPQ.shape[2]
        for group in range(num_groups):
            for rank in range(num_ranks):
                front, end = self._front_GP[group, rank], self._end_GP[group, rank]
                assert 0 <= end - front <= length, (group, rank, front, end)
                positions = np.arange(front, end)
                ids = self._queue_GPQ[group, rank, positions % length]
                free = ids[self._ticket_GPB[group, rank, ids] == positions]
                assert len(free) == self.num_free_GP[group, rank], (group, rank, free, self.num_free_GP[group, rank])
                used = np.flatnonzero(self.refs_GPB[group, rank])
                found = np.sort(np.concatenate([free, used]))
                assert np.array_equal(found, np.arange(1, num_blocks)), (group, rank, free, used)
                assert (self.refs_GPB[group, rank] >= 0).all(), (group, rank)
        self._index.check_integrity(self.named_GPB.reshape(-1))

    def _enqueue(self, group: int, rank_F: np.ndarray, number_F: np.ndarray, *, at_end: bool) -> None:
        """Put free blocks (sorted by rank) into their ranks' queues, one behind or before the other."""
        counts_P = np.bincount(rank_F, minlength=self.num_ranks)
        front_P, end_P, length = self._front_GP[group], self._end_GP[group], self._queue_GPQ.shape[2]
        for rank in np.flatnonzero(end_P - front_P + counts_P > length):
            self._compact(group, rank)
        if at_end:
            position_F = end_P[rank_F] + ragged.positions(counts_P)
            end_P += counts_P
        else:
            position_F = front_P[rank_F] - 1 - ragged.positions(counts_P)
            front_P -= counts_P
        self._queue[self._owner(group, rank_F) * length + position_F % length] = number_F % self.num_blocks
        self._ticket[number_F] = position_F
        self.num_free_GP[group] += counts_P

    def _compact(self, group: int, rank: int) -> None:
        """Drop the stale places of one queue, which has twice as many places as there are blocks."""
        length = self._queue_GPQ.shape[2]
        positions = np.arange(self._front_GP[group, rank], self._end_GP[group, rank])
        ids = self._queue_GPQ[group, rank, positions % length]
        ids = ids[self._ticket_GPB[group, rank, ids] == positions]
        self._queue_GPQ[group, rank, : len(ids)] = ids
        self._ticket_GPB[group, rank, ids] = np.arange(len(ids))
        self._front_GP[group, rank], self._end_GP[group, rank] = 0, len(ids)

    def _forget(self, number_B: np.ndarray, rank_B: np.ndarray) -> None:
        """Take the names off blocks that get new contents."""
        named_B = self._named.take(number_B)
        if named_B.any():
            number_B, rank_B = number_B[named_B], rank_B[named_B]
            self._index.remove(number_B, rank_B)
            self._named[number_B] = False

    def _owner(self, group: int, rank_B: np.ndarray) -> np.ndarray:
        return group * self.num_ranks + rank_B.astype(np.int64)

    def _number(self, group: int, rank_B: np.ndarray, ids_B: np.ndarray) -> np.ndarray:
        """Blocks numbered through, as the index has them: i64 [B]."""
        return self._owner(group, rank_B) * self.num_blocks + ids_B
