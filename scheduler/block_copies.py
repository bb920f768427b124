"""Copies of blocks: of the last blocks that forks and followers share with those whose tokens they continue.

`rows` are rows of the running batch. C KV cache groups, M blocks copied, S requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertwire.scheduler.running import RunningBatch

_NO_INTS = np.zeros(0, np.int32)


class BlockCopies(NamedTuple):
    """Blocks to copy, sorted by rank; i32."""

    rank_M: np.ndarray
    cache_M: np.ndarray
    from_M: np.ndarray
    to_M: np.ndarray

    def joined(self, others: BlockCopies) -> BlockCopies:
        """Return these and other copies."""
        return (
            _by_rank([self, others]) if len(self.rank_M) and len(others.rank_M) else max(self, others, key=_num_copies)
        )


class NewTails(NamedTuple):
    """Last blocks of rows that started as followers: they get what their leaders' hold before the next step."""

    rows: np.ndarray
    from_CS: np.ndarray  # block ids; -1 where the last block is full, and shared
    to_CS: np.ndarray


_NO_COPIES = BlockCopies(_NO_INTS, _NO_INTS, _NO_INTS, _NO_INTS)


class TailCopies:
    """The copies of last blocks that plans need. A row that writes into a block has it for itself."""

    def __init__(self, batch: RunningBatch) -> None:
        self._batch = batch
        self._new_tails: list[NewTails] = []

    def unshare(self, rows: np.ndarray) -> BlockCopies:
        """Copy on write: give forks that are about to write into a shared block one of their own."""
        batch = self._batch
        if not len(rows):
            return _NO_COPIES
        parts = []
        for cache, (size, every) in enumerate(
            zip(batch.caches.size_C.tolist(), batch.caches.every_C.tolist(), strict=True)
        ):
            # A parent may go on in the block of a state at any token.
            inside = (batch.num_computed_Z[rows] % size > 0) | (every > 1)
            row_M, rank_M = rows[inside], batch.rank_Z[rows[inside]]
            index_M = (batch.num_computed_Z[row_M] - 1) // size
            from_M = batch.block_ids_CZW[cache, row_M, index_M]
            assert (batch.pool.refs_CPB[cache, rank_M, from_M] > 1).all(), "a fork shares no block"
            to_M = batch.pool.allocate(cache, rank_M)
            batch.pool.free(cache, rank_M, from_M)
            batch.block_ids_CZW[cache, row_M, index_M] = to_M
            parts.append((rank_M, np.full(len(row_M), cache), from_M, to_M))
        return _by_rank(parts)

    def follow(self, rows: np.ndarray, leaders: np.ndarray) -> None:
        """Let new rows that are not their own leaders get copies of their last blocks; after their step was scheduled."""
        if len(follow := np.flatnonzero(leaders != rows)):
            new = rows[follow]
            self._new_tails.append(NewTails(new, self._tails(leaders[follow], new), self._tails(new, new)))

    def due(self) -> BlockCopies:
        """Return the copies due before the next step: of the last blocks of the leaders whose followers have started."""
        batch = self._batch
        if not self._new_tails:
            return _NO_COPIES
        parts = []
        for rows, from_CS, to_CS in self._new_tails:
            caches, places = np.nonzero((from_CS >= 0) & batch.running_Z[rows])
            ids = from_CS[caches, places], to_CS[caches, places]
            parts.append((batch.rank_Z[rows[places]], caches, *ids))
        self._new_tails.clear()
        return _by_rank(parts)

    def num_shareable(self, row: int, most: int) -> int:
        """Return how many of a row's first tokens, `most` at most, a fork can share, or 0.

        A state exists for all computed tokens, and where a snapshot was kept; behind a snapshot it
        has changed.
        """
        batch = self._batch
        if any(row in tails.rows for tails in self._new_tails):
            return 0  # what its last block will hold is not there yet
        num = int(batch.num_computed_Z[row])
        if num > most:
            every = math.lcm(*(spec.snapshot_every or 1 for spec in batch.specs))
            num = most // every * every
        first_C = np.maximum(num - batch.caches.window_C + 1, 0) // batch.caches.size_C
        return num if (batch.tables_CZ["num_dropped"][:, row] <= first_C).all() else 0

    def _tails(self, rows: np.ndarray, like: np.ndarray) -> np.ndarray:
        """Return the rows' blocks of the last tokens that the rows `like` have computed, i32 [C, S]; -1 where these are full."""
        batch = self._batch
        num_S = batch.num_computed_Z[like]
        return np.stack(
            [
                np.where(num_S % size > 0, batch.block_ids_CZW[cache, rows, num_S // size], -1)
                for cache, size in enumerate(batch.caches.size_C.tolist())
            ]
        )


def _num_copies(copies: BlockCopies) -> int:
    return len(copies.rank_M)


def _by_rank(parts: Sequence[Sequence[np.ndarray]]) -> BlockCopies:
    """Return copies joined; each part has the fields of `BlockCopies`."""
    copies = BlockCopies(*(np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True)))
    by_rank = np.argsort(copies.rank_M, kind="stable")
    return BlockCopies(*(part[by_rank] for part in copies))
