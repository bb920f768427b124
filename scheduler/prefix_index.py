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
_LOW_HALF = np.uint64(2**32 - 1)
_OWNER_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads the owners over the buckets
NOBODY = -1
UNKNOWN = -2  # somebody, perhaps


class PrefixIndex:
    """Names of blocks, which are numbered through: owner * num_blocks + block, `num_owners` of them."""

    def __init__(self, num_owners: int, num_blocks: int) -> None:
        total = num_owners * num_blocks
        assert total < 2**31, f"{total} blocks are more than the table can number"
        num_buckets = 1 << max(total // 2 - 1, 1).bit_length()
        self._num_blocks = num_blocks
        self._mask = np.uint64(num_buckets - 1)
        self._block_UW = np.full((num_buckets, _WAYS), NOBODY, np.int32)
        self._tag_UW = np.zeros((num_buckets, _WAYS), np.uint32)
        self._blocks, self._tags = self._block_UW.reshape(-1), self._tag_UW.reshape(-1)  # the same, by place
        # Of each block that is in the table: its place, which is bucket * ways + way, and the halves of its name.
        self._place_B = np.zeros(total, np.int64)
        self._first_B, self._second_B = np.zeros((2, total), np.uint64)
        self._guess = np.full(4 * num_buckets, _guess(np.uint64(0), np.int64(NOBODY)), np.uint64)

    def insert(self, blocks_B: np.ndarray, rank_B: np.ndarray, names_B2: np.ndarray) -> np.ndarray:
        """Give blocks names, which have none; whether there was room for each: bool [B]."""
        bucket_B = self._bucket(blocks_B // self._num_blocks, names_B2)
        inserted_B = np.zeros(len(blocks_B), bool)
        left = np.arange(len(blocks_B))
        while len(left):  # again for those that choose a way that one before them chooses, too
            free_LW = self._block_UW.take(bucket_B[left], axis=0) == NOBODY
            place = bucket_B[left] * _WAYS + free_LW.argmax(axis=1)
            fits = self._blocks.take(place) == NOBODY
            left, place = left[fits], place[fits]
            blocks = blocks_B[left]
            self._blocks[place[::-1]] = blocks[::-1]  # the first of those in one place is the last to be written
            gets = self._blocks.take(place) == blocks
            self._place_B[blocks[gets]] = place[gets]
            inserted_B[left[gets]] = True
            left = left[~gets]
        blocks, names_B2 = blocks_B[inserted_B], names_B2[inserted_B]
        self._tags[self._place_B[blocks]] = _tag(names_B2)
        self._first_B[blocks], self._second_B[blocks] = names_B2[:, 0], names_B2[:, 1]
        self._remember(names_B2[:, 1], rank_B[inserted_B])
        return inserted_B

    def remove(self, blocks_B: np.ndarray, rank_B: np.ndarray) -> None:
        """Take the names off blocks that have one."""
        place_B = self._place_B.take(blocks_B)
        mine_B = self._blocks.take(place_B) == blocks_B
        assert mine_B.all(), f"blocks {blocks_B[~mine_B]} have no name"
        self._blocks[place_B] = NOBODY
        second_B = self._second_B.take(blocks_B)
        place_B = self._guess_place(second_B)
        stale_B = self._guess.take(place_B) == _guess(second_B, rank_B)
        self._guess[place_B[stale_B]] = _guess(second_B[stale_B], np.int64(UNKNOWN))

    def find(self, owner_M: np.ndarray, rank_M: np.ndarray, names_M2: np.ndarray) -> np.ndarray:
        """A block of each owner with each name, without the owner's part of its number, or -1: i64 [M]."""
        bucket_M = self._bucket(owner_M, names_M2)
        found_M = np.full(len(names_M2), NOBODY, np.int64)
        m, way = np.nonzero(self._tag_UW.take(bucket_M, axis=0) == _tag(names_M2)[:, None])
        blocks = self._block_UW[bucket_M[m], way]
        same = (blocks != NOBODY) & (blocks // self._num_blocks == owner_M[m])
        m, blocks = m[same], blocks[same]
        same = (self._first_B[blocks] == names_M2[m, 0]) & (self._second_B[blocks] == names_M2[m, 1])
        m, blocks = m[same], blocks[same]
        found_M[m] = blocks % self._num_blocks
        self._remember(names_M2[m, 1], rank_M[m])
        return found_M

    def guess(self, names_M2: np.ndarray) -> np.ndarray:
        """A rank that probably holds each name, or `NOBODY`, or `UNKNOWN`: i32 [M]."""
        second_M = names_M2[:, 1]
        guess_M = self._guess.take(self._guess_place(second_M))
        rank_M = (guess_M & _LOW_HALF).astype(np.int32) + UNKNOWN
        return np.where((guess_M ^ second_M) <= _LOW_HALF, rank_M, np.int32(NOBODY))

    def check_integrity(self, named_B: np.ndarray) -> None:
        """Exactly the blocks `named_B`, bool, are in the table, once, under their names."""
        bucket, way = np.nonzero(self._block_UW != NOBODY)
        blocks = self._block_UW[bucket, way]
        assert np.array_equal(np.sort(blocks), np.flatnonzero(named_B)), (blocks, np.flatnonzero(named_B))
        names = np.stack((self._first_B[blocks], self._second_B[blocks]), axis=1)
        assert np.array_equal(self._place_B[blocks], bucket * _WAYS + way), "a block is elsewhere"
        assert np.array_equal(self._bucket(blocks // self._num_blocks, names), bucket), "a name is in another's bucket"
        assert np.array_equal(self._tag_UW[bucket, way], _tag(names)), "a tag is another name's"

    def _bucket(self, owner_M: np.ndarray, names_M2: np.ndarray) -> np.ndarray:
        return ((names_M2[:, 0] ^ (owner_M.astype(np.uint64) * _OWNER_FACTOR)) & self._mask).astype(np.int64)

    def _remember(self, second_M: np.ndarray, rank_M: np.ndarray) -> None:
        self._guess[self._guess_place(second_M)] = _guess(second_M, rank_M)

    def _guess_place(self, second_M: np.ndarray) -> np.ndarray:
        return (second_M & np.uint64(len(self._guess) - 1)).astype(np.int64)


def _tag(names_M2: np.ndarray) -> np.ndarray:
    return (names_M2[:, 0] >> _HIGH).astype(np.uint32)


def _guess(second_M: np.ndarray, rank_M: np.ndarray) -> np.ndarray:
    """An entry of the table of guesses: the upper half of a name's second half, and beneath it the rank, from `UNKNOWN` on."""
    return (second_M & ~_LOW_HALF) | (rank_M - UNKNOWN).astype(np.uint64)
