"""The running requests of all ranks as numpy arrays: one row per slot, row = rank * max_running + slot.

Shape letters: N rows (all slots of all ranks), P ranks, G caches, A admitted requests, B positions in a block table.
Functions take `rows`, an ascending array of row numbers, and so sorted by rank, as a `StepPlan` wants it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.request import Request

_NOTHING = np.zeros(0, np.int32)


class RunningTable:
    """Counters and block tables of the running requests.

    A row is *occupied* from admission until its release is planned, and *running* until its request has ended. Between the
    two it only waits to be released.
    """

    def __init__(self, config: SchedulerConfig, num_groups: int) -> None:
        slots = config.max_running
        n = config.num_ranks * slots
        self.block_size = config.block_size
        self.rank_N = np.repeat(np.arange(config.num_ranks), slots)
        self.slot_N = np.tile(np.arange(slots, dtype=np.int32), config.num_ranks)
        self.bounds_P1 = np.arange(config.num_ranks + 1) * slots

        self.occupied_N = np.zeros(n, bool)
        self.running_N = np.zeros(n, bool)
        self.key_N = np.zeros(n, np.int64)
        self.num_tokens_N = np.zeros(n, np.int32)  # known: the prompt's and the sampled ones
        self.num_computed_N = np.zeros(n, np.int32)  # in the caches
        self.num_scheduled_N = np.zeros(n, np.int32)  # in the step in flight
        self.limit_N = np.zeros(n, np.int32)  # of num_tokens
        self.stop_from_N = np.zeros(n, np.int32)  # stop and end-of-sequence ids count from this num_tokens on
        self.eos_stops_N = np.zeros(n, bool)
        self.has_stop_ids_N = np.zeros(n, bool)
        self.num_reserved_N = np.zeros(n, np.int32)  # blocks of each cache
        self.num_blocks_GN = np.zeros((num_groups, n), np.int32)
        # Untouched pages cost nothing, so the width may be that of the longest request.
        self.block_ids_GNB = np.zeros((num_groups, n, config.blocks_for(config.max_model_len)), np.int32)

    def admit(self, requests: Sequence[Request], num_reserved_A: np.ndarray) -> np.ndarray:
        """Give each request (sorted by `rank`) the lowest free slot of its rank: i64 [A] rows, ascending."""
        rank_A = np.array([request.rank for request in requests], np.int64)
        counts_P = np.bincount(rank_A, minlength=len(self.bounds_P1) - 1)
        free = np.flatnonzero(~self.occupied_N)
        rows = free[self.offsets_P1(free)[rank_A] + ragged.positions(counts_P)]
        assert np.array_equal(self.rank_N[rows], rank_A), f"too few free slots for {counts_P} requests"
        prompt_len_A = np.array([len(request.prompt) for request in requests])
        limit_A = np.array([request.limit for request in requests])
        min_tokens_A = np.array([min(request.params.min_tokens, request.limit) for request in requests])
        self.occupied_N[rows] = self.running_N[rows] = True
        self.key_N[rows] = [request.key for request in requests]
        self.num_tokens_N[rows] = prompt_len_A
        self.num_computed_N[rows] = 0
        self.limit_N[rows] = limit_A
        self.stop_from_N[rows] = np.minimum(prompt_len_A + min_tokens_A, limit_A)
        self.eos_stops_N[rows] = [not request.params.ignore_eos for request in requests]
        self.has_stop_ids_N[rows] = [bool(request.stop_ids) for request in requests]
        self.num_reserved_N[rows] = num_reserved_A
        for request, slot in zip(requests, self.slot_N[rows].tolist(), strict=True):
            request.slot = slot
        return rows

    def release(self, rows: np.ndarray, pool: BlockPool) -> None:
        """Empty the rows; their blocks go back to the pool."""
        for group in range(len(self.num_blocks_GN)):
            counts = self.num_blocks_GN[group, rows]
            row_B = np.repeat(rows, counts)
            pool.free(group, self.rank_N[row_B], self.block_ids_GNB[group, row_B, ragged.positions(counts)])
        pool.unreserve(self.rank_N[rows], self.num_reserved_N[rows])
        self.num_blocks_GN[:, rows] = 0
        self.occupied_N[rows] = False

    def append_blocks(
        self, rows: np.ndarray, end: np.ndarray, pool: BlockPool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Give each row the blocks it lacks to hold `end` tokens: i32 row, cache, index and id of each, sorted by rank."""
        needed = -(-end // self.block_size)
        if not (needed > self.num_blocks_GN[:, rows]).any():
            return _NOTHING, _NOTHING, _NOTHING, _NOTHING
        parts = []
        for group, num_blocks_N in enumerate(self.num_blocks_GN):
            counts = needed - num_blocks_N[rows]
            row_B = np.repeat(rows, counts)
            index_B = num_blocks_N[row_B] + ragged.positions(counts)
            ids_B = pool.allocate(group, self.rank_N[row_B])
            self.block_ids_GNB[group, row_B, index_B] = ids_B
            num_blocks_N[rows] += counts
            parts.append((row_B, np.full(len(row_B), group), index_B, ids_B))
        row_B, cache_B, index_B, ids_B = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
        order = np.argsort(self.rank_N[row_B], kind="stable")
        return row_B[order], cache_B[order], index_B[order], ids_B[order]

    def offsets_P1(self, rows: np.ndarray) -> np.ndarray:
        """Where each rank's part of `rows` lies: i32 [P + 1]."""
        return np.searchsorted(rows, self.bounds_P1).astype(np.int32)

    def rows_of(self, offsets_P1: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """The rows of a plan's `slots`: the inverse of `offsets_P1` and `slot_N`."""
        return np.repeat(self.bounds_P1[:-1], np.diff(offsets_P1)) + slots

    def rows_of_parts(self, slots_P: Sequence[np.ndarray]) -> np.ndarray:
        """The rows of slots given rank by rank: i64."""
        slots, offsets_P1 = ragged.pack(slots_P, np.int64)
        return self.rows_of(offsets_P1, slots)

    def occupied_P(self) -> np.ndarray:
        """i64 [P], occupied slots."""
        return self.occupied_N.reshape(len(self.bounds_P1) - 1, -1).sum(axis=1)

    def outstanding_P(self) -> np.ndarray:
        """i64 [P], tokens that the running requests may still have to compute."""
        left_N = np.where(self.running_N, self.limit_N - self.num_computed_N, 0)
        return left_N.reshape(len(self.bounds_P1) - 1, -1).sum(axis=1, dtype=np.int64)

    def check_integrity(self, pool: BlockPool) -> None:
        """The counters are in order, and the block tables and reservations are exactly what the pool accounts for."""
        rows = np.flatnonzero(self.occupied_N)
        assert not (self.running_N & ~self.occupied_N).any(), "running, but not occupied"
        end = self.num_computed_N[rows] + self.num_scheduled_N[rows]
        assert (end <= self.num_tokens_N[rows]).all(), (end, self.num_tokens_N[rows])
        assert (self.num_tokens_N[rows] <= self.limit_N[rows]).all(), (self.num_tokens_N[rows], self.limit_N[rows])
        refs_GPB = np.zeros_like(pool.refs_GPB)
        for group in range(len(self.num_blocks_GN)):
            counts = self.num_blocks_GN[group, rows]
            assert np.array_equal(counts, -(-end // self.block_size)), (group, counts, end)
            assert (counts <= self.num_reserved_N[rows]).all(), (group, counts, self.num_reserved_N[rows])
            row_B = np.repeat(rows, counts)
            ids_B = self.block_ids_GNB[group, row_B, ragged.positions(counts)]
            np.add.at(refs_GPB[group], (self.rank_N[row_B], ids_B), 1)
        assert np.array_equal(refs_GPB, pool.refs_GPB), "the block tables and the pool disagree on references"
        reserved_P = np.bincount(self.rank_N[rows], self.num_reserved_N[rows], minlength=len(self.bounds_P1) - 1)
        assert (pool.reserved_GP == reserved_P).all(), (pool.reserved_GP, reserved_P)
