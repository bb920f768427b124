"""Which block holds a prefix: from an owner (a rank's cache) and a prefix's name to a block, thousands at a time.

A table of buckets with eight ways, each a tag of the name and a block; the name itself is compared with the block's. A bucket
that is full takes no more, which loses two cached blocks in ten thousand when all have names, and nothing else.
The same name may be there several times, for blocks of equal content.

And a guess who holds a prefix at all: the rank that has named or used it last, in a table where others may have overwritten it.

Shape letters: M names to look for, B blocks, W ways. A name is two u64.
"""

from __future__ import annotations

import numpy as np

_WAYS = 8
_HIGH = np.uint64(32)
_OWNER_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads the owners over the buckets
NOBODY = -1
UNKNOWN = -2  # somebody, perhaps


class PrefixIndex:
    """Names of blocks, which are numbered through: owner * num_blocks + block, `num_owners` of them."""

    def __init__(self, num_owners: int, num_blocks: int) -> None:
        total = num_owners * num_blocks
        num_buckets = 1 << max(total // 2 - 1, 1).bit_length()
        self._num_blocks = num_blocks
        self._mask = np.uint64(num_buckets - 1)
        self._block_UW = np.full((num_buckets, _WAYS), NOBODY, np.int64)
        self._tag_UW = np.zeros((num_buckets, _WAYS), np.uint32)
        self.name_B2 = np.zeros((total, 2), np.uint64)  # of each block that is in the table
        self._guess_tag = np.zeros(4 * num_buckets, np.uint32)
        self._guess_rank = np.full(4 * num_buckets, NOBODY, np.int32)

    def insert(self, blocks_B: np.ndarray, rank_B: np.ndarray, names_B2: np.ndarray) -> np.ndarray:
        """Give blocks names, which have none; whether there was room for each: bool [B]."""
        bucket_B = self._bucket(blocks_B // self._num_blocks, names_B2)
        order = np.argsort(bucket_B, kind="stable")
        bucket = bucket_B[order]
        first = np.flatnonzero(np.concatenate(([True], bucket[1:] != bucket[:-1])))
        nth = np.arange(len(bucket)) - np.repeat(first, np.diff(np.append(first, len(bucket))))
        free_BW = self._block_UW[bucket] == NOBODY
        wanted_BW = free_BW & (free_BW.cumsum(axis=1) == nth[:, None] + 1)
        fits = wanted_BW.any(axis=1)
        way, bucket, order = wanted_BW.argmax(axis=1)[fits], bucket[fits], order[fits]
        blocks, names = blocks_B[order], names_B2[order]
        self._block_UW[bucket, way] = blocks
        self._tag_UW[bucket, way] = _tag(names)
        self.name_B2[blocks] = names
        self._remember(names, rank_B[order])
        inserted_B = np.zeros(len(blocks_B), bool)
        inserted_B[order] = True
        return inserted_B

    def remove(self, blocks_B: np.ndarray, rank_B: np.ndarray) -> None:
        """Take the names off blocks that have one."""
        names_B2 = self.name_B2[blocks_B]
        bucket_B = self._bucket(blocks_B // self._num_blocks, names_B2)
        mine_BW = self._block_UW[bucket_B] == blocks_B[:, None]
        assert mine_BW.any(axis=1).all(), f"blocks {blocks_B[~mine_BW.any(axis=1)]} have no name"
        self._block_UW[bucket_B, mine_BW.argmax(axis=1)] = NOBODY
        place_B = self._guess_place(names_B2)
        stale_B = (self._guess_rank[place_B] == rank_B) & (self._guess_tag[place_B] == names_B2[:, 1] >> _HIGH)
        self._guess_rank[place_B[stale_B]] = UNKNOWN

    def find(self, owner_M: np.ndarray, rank_M: np.ndarray, names_M2: np.ndarray) -> np.ndarray:
        """A block of each owner with each name, without the owner's part of its number, or -1: i64 [M]."""
        bucket_M = self._bucket(owner_M, names_M2)
        found_M = np.full(len(names_M2), NOBODY, np.int64)
        m, way = np.nonzero(self._tag_UW[bucket_M] == _tag(names_M2)[:, None])
        blocks = self._block_UW[bucket_M[m], way]
        same = (blocks != NOBODY) & (blocks // self._num_blocks == owner_M[m])
        same[same] = (self.name_B2[blocks[same]] == names_M2[m[same]]).all(axis=1)
        found_M[m[same]] = blocks[same] % self._num_blocks
        self._remember(names_M2[m[same]], rank_M[m[same]])
        return found_M

    def guess(self, names_M2: np.ndarray) -> np.ndarray:
        """A rank that probably holds each name, or `NOBODY`, or `UNKNOWN`: i32 [M]."""
        place_M = self._guess_place(names_M2)
        return np.where(self._guess_tag[place_M] == names_M2[:, 1] >> _HIGH, self._guess_rank[place_M], NOBODY)

    def check_integrity(self, named_B: np.ndarray) -> None:
        """Exactly the blocks `named_B`, bool, are in the table, once, under their names."""
        bucket, way = np.nonzero(self._block_UW != NOBODY)
        blocks = self._block_UW[bucket, way]
        assert np.array_equal(np.sort(blocks), np.flatnonzero(named_B)), (blocks, np.flatnonzero(named_B))
        names = self.name_B2[blocks]
        assert np.array_equal(self._bucket(blocks // self._num_blocks, names), bucket), "a name is in another's bucket"
        assert np.array_equal(self._tag_UW[bucket, way], _tag(names)), "a tag is another name's"

    def _bucket(self, owner_M: np.ndarray, names_M2: np.ndarray) -> np.ndarray:
        return ((names_M2[:, 0] ^ (owner_M.astype(np.uint64) * _OWNER_FACTOR)) & self._mask).astype(np.int64)

    def _remember(self, names_M2: np.ndarray, rank_M: np.ndarray) -> None:
        place_M = self._guess_place(names_M2)
        self._guess_tag[place_M] = names_M2[:, 1] >> _HIGH
        self._guess_rank[place_M] = rank_M

    def _guess_place(self, names_M2: np.ndarray) -> np.ndarray:
        return (names_M2[:, 1] & np.uint64(len(self._guess_rank) - 1)).astype(np.int64)


def _tag(names_M2: np.ndarray) -> np.ndarray:
    return (names_M2[:, 0] >> _HIGH).astype(np.uint32)
