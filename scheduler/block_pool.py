"""Which blocks of every rank's caches are in use, free, or free with contents that a later request may begin with.

A block in use has one reference or more. Free blocks wait in a queue; the null block, block 0 of each cache of each rank, is
never handed out (ranks pad with it). A block with a name (see `scheduler.prefix_cache`) becomes free at the end of
the queue, so that
what was used last is given away last; one without, at its head. A request that begins with a free named block takes it out
again.

`block_loops` shares blocks, and gives and finds names, through buckets of blocks, each a chain. The same name may be there
several times, for blocks of equal content.
There is also a guess who holds a prefix at all: the rank that has named or used it last, in a table where others may have
overwritten it, and where it stays when the block is gone.

Shape letters: G caches (groups of layers with one block table), P ranks, O = G * P owners of blocks, Q places of a queue, B
blocks. Block numbers count through all owners. A name is two u64.
"""

from __future__ import annotations

import numpy as np

from expertwire.scheduler._compiled import blocks as block_loops
from expertwire.scheduler._compiled.blocks import END, NOWHERE, UNNAMED

_LINE = 64  # bytes, of the processor's cache


def aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Zeros that begin with a line of the processor's cache, so that small items lie in as few lines as can be: [count]."""
    size = count * dtype.itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype)


def aligned_rows(num_rows: int, width: int, kind: type) -> np.ndarray:
    """Likewise, rows of at least `width` items, which are lines in odd number: [num_rows, more than width]. If it was a power of
    two, the same columns of all rows would have to share a few places of the cache."""
    dtype = np.dtype(kind)
    num_lines = -(-width * dtype.itemsize // _LINE) | 1
    return aligned(num_rows * num_lines * _LINE // dtype.itemsize, dtype).reshape(num_rows, -1)


class BlockPool:
    """Accounts for the blocks of each cache on each of `num_ranks` ranks: `capacities_G` of them, and the null block."""

    def __init__(self, capacities_G: list[int], num_ranks: int) -> None:
        num_groups, num_blocks = len(capacities_G), max(capacities_G) + 1
        num_owners = num_groups * num_ranks
        total = num_owners * num_blocks
        assert total < 2**31, f"{total} blocks are more than can be numbered"
        num_places = 2 << max(total - 1, 1).bit_length()
        self.capacity_G = np.array(capacities_G, np.int64)
        self.num_ranks = num_ranks
        self.num_blocks = num_blocks
        block_B = aligned(total, block_loops.BLOCK)
        block_B["place"], block_B["chain"] = NOWHERE, UNNAMED
        queue_OQ = np.zeros((num_owners, 1 << (2 * num_blocks - 1).bit_length()), np.int32)
        for owner, capacity in enumerate(np.repeat(self.capacity_G, num_ranks).tolist()):
            number_B = owner * num_blocks + np.arange(1, capacity + 1)
            queue_OQ[owner, :capacity], block_B["place"][number_B] = number_B, np.arange(capacity)
        self.blocks = block_loops.Blocks(
            num_blocks=num_blocks,
            num_ranks=num_ranks,
            block_B=block_B,
            num_free_O=np.repeat(self.capacity_G, num_ranks),
            queue_OQ=queue_OQ,
            head_O=np.zeros(num_owners, np.int64),
            tail_O=np.repeat(self.capacity_G, num_ranks),
            first_U=np.full(num_places, END, np.int32),
            guess=np.zeros(num_places, np.uint64),
        )
        # The same memory, by cache, rank and block.
        self.num_free_GP = self.blocks.num_free_O.reshape(num_groups, num_ranks)
        self.refs_GPB = block_B["refs"].reshape(num_groups, num_ranks, num_blocks)

    def allocate(self, group: int, rank_B: np.ndarray) -> np.ndarray:
        """Hand out one block, with one reference, for every entry of `rank_B`: i32 [B]. They lose their names."""
        counts_P, free_P = np.bincount(rank_B, minlength=self.num_ranks), self.num_free_GP[group]
        assert (counts_P <= free_P).all(), f"cache {group}: asked for {counts_P} blocks, free are {free_P}"
        ids_B = np.zeros(len(rank_B), np.int32)
        block_loops.take(self.blocks, self._owner(group, rank_B), ids_B)
        return ids_B

    def free(self, group: int, rank_B: np.ndarray, ids_B: np.ndarray) -> None:
        """Drop one reference to every block (`rank_B`, `ids_B`); those without any left become free, the last one first."""
        assert np.all(ids_B), f"cache {group}: the null block was freed"
        block_loops.drop(self.blocks, self._owner(group, rank_B) * self.num_blocks + ids_B)

    def num_used(self, group: int) -> np.ndarray:
        """i64 [P], blocks with references."""
        return self.capacity_G[group] - self.num_free_GP[group]

    def check_integrity(self) -> None:
        """Every block is either free, once in its queue and without a reference, or referenced; the null block is neither;
        every named block is in its name's bucket."""
        number_B = np.zeros(self.num_blocks, np.int32)
        for group, rank in np.ndindex(self.num_free_GP.shape):
            owner, refs_B = group * self.num_ranks + rank, self.refs_GPB[group, rank]
            count = block_loops.walk_free(self.blocks, owner, number_B)
            assert count == self.num_free_GP[group, rank], (group, rank, count, self.num_free_GP[group, rank])
            free = number_B[:count] - owner * self.num_blocks
            found = np.sort(np.concatenate((free, np.flatnonzero(refs_B))))
            assert np.array_equal(found, np.arange(1, self.capacity_G[group] + 1)), (group, rank, free, refs_B)
            assert (refs_B >= 0).all(), (group, rank)
        named_B = np.flatnonzero(self.blocks.block_B["chain"] != UNNAMED)
        number_B = np.zeros(len(named_B), np.int32)
        assert block_loops.walk_chains(self.blocks, number_B) == len(named_B), (
            "a bucket has what it should not, or lacks some"
        )
        assert np.array_equal(np.sort(number_B), named_B), (number_B, named_B)

    def _owner(self, group: int, rank_B: np.ndarray) -> np.ndarray:
        return group * self.num_ranks + rank_B.astype(np.int64)
