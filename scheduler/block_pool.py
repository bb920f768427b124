"""The pool of cache blocks: reference counts, free queues and block hashes.

A block in use has one reference or more. Free blocks wait in a queue; the null block, block 0 of
each cache of each rank, is never allocated (ranks pad with it). A block with a hash (see
`prefix_cache`) is freed to the queue's end, so that blocks are evicted least recently used first; a
block without one to its head. A request that shares a free block takes it out of the queue. Blocks of
states wait in a heap instead, and are evicted by their worth (see `heap` and `snapshots`).

The compiled loops find blocks by hash through buckets of chained blocks. Several blocks of equal
content may have one hash. `holders` remembers which rank used a hash last: a guess, because
entries overwrite each other and outlive their blocks.

C KV cache groups, P ranks, B blocks of all owners; an owner is a cache on a rank. Hashes are two
u64.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from expertwire.scheduler._compiled import blocks as block_loops
from expertwire.scheduler._compiled import prefixes as prefix_loops
from expertwire.scheduler._compiled.blocks import END, IN_USE, UNHASHED
from expertwire.scheduler._compiled.heap import WORTH

_LINE = 64  # bytes of a cache line
_WIDE_ROW = 1024  # lines, 64 KiB


def aligned(count: int, dtype: np.dtype) -> np.ndarray:
    """Return zeros [count] that begin at a cache line, so that small items lie in as few lines as possible."""
    size = count * dtype.itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype)


def aligned_rows(num_rows: int, width: int, kind: type) -> np.ndarray:
    """Return zeros [num_rows, at least width] whose rows are an odd number of cache lines.

    With a power of two, the same columns of all rows would compete for a few places of the
    processor's cache. What is never touched of a wide row takes no memory, as it lies in no huge page,
    which the beginnings of rows would fill with zeros of the rest. In huge pages narrow rows are found sooner.
    """
    dtype = np.dtype(kind)
    num_lines = -(-width * dtype.itemsize // _LINE) | 1
    memory = mmap.mmap(-1, max(1, num_rows * num_lines * _LINE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages refuses the advice
            memory.madvise(mmap.MADV_HUGEPAGE if num_lines < _WIDE_ROW else mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, num_rows * num_lines * _LINE // dtype.itemsize).reshape(num_rows, -1)


class BlockPool:
    """Blocks of each cache on each of `num_ranks` ranks: `num_blocks_C` usable ones, and the null block.

    Free blocks of the caches in `weighs_C` are evicted by their worth (see `heap`).
    """

    def __init__(self, num_blocks_C: list[int], num_ranks: int, weighs_C: Sequence[bool] | None = None) -> None:
        num_caches, num_blocks = len(num_blocks_C), max(num_blocks_C) + 1
        num_owners = num_caches * num_ranks
        total = num_owners * num_blocks
        assert total < 2**31, f"{total} blocks are more than can be numbered"
        num_buckets = 2 << max(total - 1, 1).bit_length()
        self.num_blocks_C = np.array(num_blocks_C, np.int64)
        self.num_ranks = num_ranks
        self.num_blocks = num_blocks
        block_B = aligned(total, block_loops.BLOCK)
        block_B["place"], block_B["chain"] = IN_USE, UNHASHED
        worth_B = aligned(total, WORTH)  # pages that are never touched take no memory
        owners = aligned(num_owners, block_loops.OWNER)
        owners["num_free"] = owners["tail"] = np.repeat(self.num_blocks_C, num_ranks)
        if weighs_C is not None:
            owners["weighs"] = np.repeat(weighs_C, num_ranks)
        queues = np.zeros((num_owners, 1 << (2 * num_blocks - 1).bit_length()), np.int32)
        for owner, usable in enumerate(np.repeat(self.num_blocks_C, num_ranks).tolist()):
            number_B = owner * num_blocks + np.arange(1, usable + 1)
            queues[owner, :usable], block_B["place"][number_B] = number_B, np.arange(usable)
            if owners["weighs"][owner]:
                worth_B["freed"][number_B] = np.arange(-usable, 0)
        self.blocks = block_loops.Blocks(
            num_blocks=num_blocks,
            num_ranks=num_ranks,
            block_B=block_B,
            owners=owners,
            queues=queues,
            worth_B=worth_B,
            buckets=np.full(num_buckets, END, np.int32),
            holders=np.zeros(num_buckets, np.uint64),
        )
        # Views by cache, rank and block.
        self.num_free_CP = owners["num_free"].reshape(num_caches, num_ranks)
        self.num_evicted_CP = owners["num_evicted"].reshape(num_caches, num_ranks)
        self.refs_CPB = block_B["refs"].reshape(num_caches, num_ranks, num_blocks)

    def allocate(self, cache: int, rank_B: np.ndarray) -> np.ndarray:
        """Return a block with one reference for every entry of `rank_B`: i32 [B]. They lose their hashes."""
        counts_P, free_P = np.bincount(rank_B, minlength=self.num_ranks), self.num_free_CP[cache]
        assert (counts_P <= free_P).all(), f"cache {cache}: asked for {counts_P} blocks, free are {free_P}"
        ids_B = np.zeros(len(rank_B), np.int32)
        prefix_loops.take(self.blocks, self._owner(cache, rank_B), ids_B)
        return ids_B

    def free(self, cache: int, rank_B: np.ndarray, ids_B: np.ndarray) -> None:
        """Drop one reference to every block (`rank_B`, `ids_B`), in reverse order."""
        assert np.all(ids_B), f"cache {cache}: the null block was freed"
        block_loops.drop(self.blocks, self._owner(cache, rank_B) * self.num_blocks + ids_B)

    def flush(self, cache: int) -> int:
        """Remove the hashes of all free blocks, so that nobody finds them; return how many had one."""
        count = np.count_nonzero(
            (self.blocks.block_B["chain"] != UNHASHED).reshape(self.refs_CPB.shape)[cache] & (self.refs_CPB[cache] == 0)
        )
        rank_B = np.repeat(np.arange(self.num_ranks), self.num_free_CP[cache])
        self.free(cache, rank_B, self.allocate(cache, rank_B))
        return int(count)

    def stats(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return how many blocks each cache has on a rank, and how many are used and were evicted on each, by name."""
        used_CP = self.num_blocks_C[:, None] - self.num_free_CP
        numbers = {"blocks": self.num_blocks_C, "blocks_used": used_CP, "blocks_evicted": self.num_evicted_CP}
        return {key: dict(zip(names, values.tolist(), strict=True)) for key, values in numbers.items()}

    def check_integrity(self) -> None:
        """Assert that every block is either free or referenced, and found by its hash."""
        number_B = np.zeros(self.num_blocks, np.int32)
        for cache, rank in np.ndindex(self.num_free_CP.shape):
            owner, refs_B = cache * self.num_ranks + rank, self.refs_CPB[cache, rank]
            count = block_loops.walk_free(self.blocks, owner, number_B)
            assert count == self.num_free_CP[cache, rank], (cache, rank, count, self.num_free_CP[cache, rank])
            free = number_B[:count] - owner * self.num_blocks
            if self.blocks.owners["weighs"][owner]:
                worth_B = self.blocks.worth_B[number_B[:count]]
                rank_B, freed_B, parents = worth_B["rank"], worth_B["freed"], (np.arange(1, count) - 1) // 2
                ordered_B = (rank_B[parents] < rank_B[1:]) | (rank_B[parents] == rank_B[1:]) & (
                    freed_B[parents] <= freed_B[1:]
                )
                assert ordered_B.all(), (cache, rank, rank_B, freed_B)
            found = np.sort(np.concatenate((free, np.flatnonzero(refs_B))))
            assert np.array_equal(found, np.arange(1, int(self.num_blocks_C[cache]) + 1)), (cache, rank, free, refs_B)
            assert (refs_B >= 0).all(), (cache, rank)
        hashed_B = np.flatnonzero(self.blocks.block_B["chain"] != UNHASHED)
        number_B = np.zeros(len(hashed_B), np.int32)
        assert prefix_loops.walk_chains(self.blocks, number_B) == len(hashed_B), (
            "a bucket has a wrong block, or lacks one"
        )
        assert np.array_equal(np.sort(number_B), hashed_B), "a block with a hash is missing from its bucket"

    def _owner(self, cache: int, rank_B: np.ndarray) -> np.ndarray:
        return cache * self.num_ranks + rank_B.astype(np.int64)
