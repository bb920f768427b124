"""The running requests of all ranks as numpy arrays: one row per slot, row = rank * max_num_seqs + slot.

Functions take `rows`, an ascending array of row numbers, which is sorted by rank, as a `StepPlan` needs it.

Two counters run ahead of what is known: `num_tokens` includes the tokens that steps in flight will
sample, `num_computed` those that they will compute. A step's plan relies on all earlier ones,
because ranks run them in order.

Z slots of all ranks, C KV cache groups, P ranks, A admitted requests, S scheduled requests, W
entries of a block table, B blocks, M blocks copied, O sampled tokens, T tokens of a request, s
tokens in a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertwire.scheduler._compiled import rows as row_loops
from expertwire.scheduler._compiled import steps as step_loops
from expertwire.scheduler._compiled.blocks import EVERYTHING, Caches
from expertwire.scheduler.block_pool import BlockPool, aligned, aligned_rows
from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.plan import pack_lists, positions_in_lists
from expertwire.scheduler.prefix_cache import BlockHasher
from expertwire.scheduler.request import NO_HASHES, REQUEST_DTYPE, Request

_NO_INTS = np.zeros(0, np.int32)
_NO_FACTORS = np.zeros((0, 4, 0), np.uint64)
_MAX_MISSES = 4  # blocks whose entries in the table of guesses may be overwritten


class Admissions(NamedTuple):
    """Requests that start in a step, sorted by rank."""

    requests: list[Request]
    rank_A: np.ndarray  # i64, as the next four
    num_cached_A: np.ndarray  # tokens that need not be computed
    num_scheduled_A: np.ndarray  # tokens to compute in this step
    parent_A: (
        np.ndarray
    )  # the row whose blocks a fork shares; `LEADER`: a follower, which shares those of its leader; or -1
    first_A: np.ndarray  # index of the request's first hash in `hash_B2`, which is empty without a prefix cache
    record_A: np.ndarray  # REQUEST_DTYPE
    hash_B2: np.ndarray  # u64, see `Request.block_hashes`


_NO_ROWS = np.zeros(0, np.int64)
NO_ADMISSIONS = Admissions([], _NO_ROWS, _NO_ROWS, _NO_ROWS, _NO_ROWS, _NO_ROWS, np.zeros(0, REQUEST_DTYPE), NO_HASHES)


def describe(specs: Sequence[CacheSpec], config: SchedulerConfig) -> Caches:
    """Return the sizes of the caches as arrays."""
    size_C = np.array([spec.tokens_per_block(config.block_size) for spec in specs])
    most = [spec.most_blocks(config.block_size, config.max_model_len, config.max_num_batched_tokens) for spec in specs]
    return Caches(
        size_C=size_C,
        window_C=np.array([spec.num_seen or EVERYTHING for spec in specs]),
        hashes_C=size_C // config.block_size,
        every_C=np.array([spec.entries_per_snapshot(config.block_size) for spec in specs]),
        extra_C=np.array([spec.num_extra for spec in specs]),
        most_C=np.array(most),
        # A cache without a window needs a prefix's first blocks. If all caches have windows, the
        # last blocks are enough.
        max_misses=_MAX_MISSES if any(spec.num_seen is None for spec in specs) else EVERYTHING,
    )


class RunningBatch:
    """Counters, tokens and block tables of the running requests.

    A row is *occupied* from admission until its release is planned, and *running* until its request
    has ended. Between the two it waits for its release. A *draining* row runs, but is scheduled no
    more: its request returns to the queue. A *paused* one runs, and is not scheduled until its request is resumed.
    """

    def __init__(self, config: SchedulerConfig, specs: Sequence[CacheSpec], pool: BlockPool) -> None:
        slots, num_caches, size = config.max_num_seqs, len(specs), config.block_size
        num_rows = config.num_ranks * slots
        self.config, self.pool, self.specs = config, pool, tuple(specs)
        self.num_admitted_P = np.zeros(config.num_ranks, np.int64)
        self.num_free_P = np.full(config.num_ranks, slots)  # rows that are not occupied
        self.rank_Z = np.repeat(np.arange(config.num_ranks), slots)
        self.slot_Z = np.tile(np.arange(slots, dtype=np.int32), config.num_ranks)
        self.bounds_P1 = np.arange(config.num_ranks + 1) * slots

        counters_Z, info_Z = aligned(num_rows, row_loops.COUNTERS), aligned(num_rows, row_loops.ROW_INFO)
        info_Z["rank"] = self.rank_Z
        # Views by field.
        self.key_Z, self.num_cached_Z, self.suspends_Z = (info_Z[name] for name in ("key", "num_cached", "suspends"))
        self.stop_from_Z = info_Z["stop_from"]
        self.num_known_Z, self.num_tokens_Z = counters_Z["num_known"], counters_Z["num_tokens"]
        self.num_computed_Z, self.num_held_Z = counters_Z["num_computed"], counters_Z["num_held"]
        self.limit_Z, self.in_flight_Z = counters_Z["limit"], counters_Z["in_flight"]
        self.num_hashed_Z = counters_Z["num_hashed"]
        self.occupied_Z, self.running_Z, self.draining_Z, self.paused_Z = np.zeros((4, num_rows), bool)
        self.order_Z = np.zeros(num_rows, np.int64)  # of submission
        self.priority_Z = np.zeros(num_rows, np.int64)
        self.tenant_Z = np.zeros(num_rows, np.int64)  # `Account.index`
        self.tables_CZ = np.zeros((num_caches, num_rows), row_loops.BLOCK_TABLE)
        # As wide as the longest request: pages that are never touched take no memory.
        width = config.blocks_for(config.max_model_len)
        self.block_ids_CZW = aligned_rows(num_caches * num_rows, width, np.int32).reshape(num_caches, num_rows, -1)
        # Tokens known since admission: full blocks, and apart from them the tail, so that appending
        # touches little memory.
        self._tokens_ZT = aligned_rows(num_rows, width * size, np.int32)
        self._tail_Zs = aligned(num_rows * size, np.dtype(np.int32)).reshape(num_rows, size)
        self.hasher: BlockHasher | None = None
        self._factors = _NO_FACTORS
        if config.enable_prefix_caching:
            self.hasher = BlockHasher(config.max_model_len, size, config.prefix_secret)
            self._factors = self.hasher.factors_B4s
        self._hash_ZB2 = aligned_rows(num_rows, 2 * width, np.uint64).reshape(num_rows, -1, 2)
        self._sum_Z4 = aligned(num_rows * 4, np.dtype(np.uint64)).reshape(num_rows, 4)
        self.caches = describe(specs, config)
        self._has_windows = bool((self.caches.window_C < EVERYTHING).any())
        self._repeats = bool((self.caches.every_C > 1).any())  # blocks in block tables
        self.arrays = row_loops.BatchArrays(
            block_size=size,
            per_rank=slots,
            occupied_Z=self.occupied_Z,
            running_Z=self.running_Z,
            draining_Z=self.draining_Z,
            paused_Z=self.paused_Z,
            counters_Z=counters_Z,
            info_Z=info_Z,
            snapshots_Z=aligned(num_rows, row_loops.SNAPSHOTS),
            tables_CZ=self.tables_CZ,
            block_ids_CZW=self.block_ids_CZW,
            tail_Zs=self._tail_Zs,
            tokens_ZT=self._tokens_ZT,
            hash_ZB2=self._hash_ZB2,
            sum_Z4=self._sum_Z4,
        )
        self._selected_Z = np.zeros((2, num_rows), np.int64)

    def admit(self, admissions: Admissions, tokens: np.ndarray, token_offsets_A1: np.ndarray) -> np.ndarray:
        """Give each request the lowest free slot of its rank; return i64 [A] rows, ascending.

        `tokens`: of all requests, joined.
        """
        rank_A, record_A = admissions.rank_A, admissions.record_A
        counts_P = np.bincount(rank_A, minlength=len(self.bounds_P1) - 1)
        free = np.flatnonzero(~self.occupied_Z)
        rows = free[self.offsets_P1(free)[rank_A] + positions_in_lists(counts_P)]
        assert (self.rank_Z[rows] == rank_A).all(), f"too few free slots for {counts_P} requests"
        self.num_admitted_P += counts_P
        self.num_free_P -= counts_P
        self.order_Z[rows], self.priority_Z[rows] = record_A["order"], record_A["priority"]
        row_loops.start_rows(
            self.caches,
            self.pool.blocks,
            self.arrays,
            rows,
            admissions.parent_A,
            admissions.num_cached_A,
            record_A,
            tokens,
            token_offsets_A1,
            admissions.first_A,
            admissions.hash_B2,
        )
        return rows

    def release(self, rows: np.ndarray) -> None:
        """Empty the rows and free their blocks; the full ones stay in the prefix cache."""
        row_loops.release_rows(self.caches, self.pool.blocks, self.arrays, self.hasher is not None, rows)
        self.num_free_P += np.bincount(self.rank_Z[rows], minlength=len(self.num_free_P))

    def forget(self, rows: np.ndarray) -> None:
        """Remove the tokens of these rows, which are to be released next, from the prefix cache."""
        if self.hasher is not None:
            row_loops.forget_rows(self.caches, self.pool.blocks, self.arrays, rows)

    def select(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Select the rows of the next step: every decode, then prefills while the token budget lasts.

        Returns:
            rows, i64; tokens of each, i64; the tokens that every rank's budget has left, i64 [P];
            and how many blocks each rank lacks for the rows, i64 [C, P].
        """
        config, (row_S, num_S) = self.config, self._selected_Z
        tokens_P = np.zeros(config.num_ranks, np.int64)
        missing_CP = np.zeros((len(self.specs), config.num_ranks), np.int64)
        most = config.max_num_batched_tokens
        chunk = most if config.chunked_prefill_size is None else config.chunked_prefill_size
        count = step_loops.select_rows(self.caches, self.arrays, most, chunk, row_S, num_S, tokens_P, missing_CP)
        return row_S[:count], num_S[:count], tokens_P, missing_CP

    def free_outside_windows(self, rows: np.ndarray) -> None:
        """Free the blocks before each row's windows, whose next token to compute is known."""
        if self._has_windows:
            row_loops.free_outside_windows(self.caches, self.pool.blocks, self.arrays, rows)

    def missing_blocks(self, rows: np.ndarray, num: np.ndarray) -> np.ndarray:
        """Return how many blocks each row lacks to compute `num` more tokens: i64 [C, S]."""
        missing_CS = np.zeros((len(self.specs), len(rows)), np.int64)
        step_loops.missing_blocks(self.caches, self.arrays, rows, num, missing_CS)
        return missing_CS

    def schedule(
        self,
        number: int,
        rows: np.ndarray,
        num: np.ndarray,
        num_missing: int,
        new_rows: np.ndarray,
        new_num: np.ndarray,
        leaders: np.ndarray,
    ) -> step_loops.StepSchedule:
        """Schedule step `number`: `num` more tokens of each row and `new_num` of the new rows.

        New rows that are not their own `leaders` compute nothing, share their leaders' full blocks and sample as they do.
        Allocate blocks, of which the rows lack `num_missing` at most, advance the counters, and put full blocks into the
        prefix cache, including those that steps in flight will fill.
        """
        if self._repeats:
            num_missing = step_loops.count_new_entries(self.caches, self.arrays, rows, num)
        most = num_missing + step_loops.count_new_entries(self.caches, self.arrays, new_rows, new_num)
        step = step_loops.StepSchedule.empty(self.config.num_ranks, len(rows) + len(new_rows), most)
        count = step_loops.schedule(
            self.caches,
            self.pool.blocks,
            self.arrays,
            self.hasher is not None,
            number,
            rows,
            num,
            new_rows,
            new_num,
            leaders,
            step,
            np.empty(most, np.int32),
            *np.empty((2, len(step.slot_S)), np.int64),
        )
        return step if count == most else step._replace(block_4B=step.block_4B[:, :count].copy())

    def append_sampled(
        self,
        number: int,
        step: step_loops.StepSchedule,
        offsets_P1: np.ndarray,
        sampled: Sequence[np.ndarray],
        eos_ids: np.ndarray,
        special_V: np.ndarray,
    ) -> tuple[step_loops.Accepted, np.ndarray]:
        """Append the tokens that the ranks have sampled in step `number` to their rows; `sampled`: `Sampled`.

        Returns:
            the tokens of requests that run, without those that have none; and for each row of the step whether its request is
            still the scheduled one and runs, u8 [Z]. A finish reason is `CHECK_IDS` where
            `special_V` says that the token stops or pauses some requests, and the row's request has such
            ids; it is `SUSPENDED` where a request is to leave its row.
        """
        tokens = step_loops.Sampled(*sampled)
        accepted = step_loops.Accepted.empty(len(tokens.slot_O))
        runs_Z = np.zeros(len(self.rank_Z), np.uint8)
        count = step_loops.append_sampled(
            self.arrays,
            self._factors,
            eos_ids,
            special_V,
            number,
            step,
            offsets_P1,
            tokens,
            runs_Z,
            accepted,
            np.empty_like(accepted.row_O),
        )
        assert count >= 0, f"step {number}: sampled {tokens.slot_O}, expected {step.slot_S[step.sample_S == 1]}"
        return step_loops.Accepted(*(column[:count] for column in accepted)), runs_Z

    def tokens(self, row: int, request: Request) -> np.ndarray:
        """Return the known tokens of the running request in this row: i32, a copy."""
        num_known = int(self.num_known_Z[row])
        num_tail = num_known % self.config.block_size
        tokens = np.concatenate((self._tokens_ZT[row, : num_known - num_tail], self._tail_Zs[row, :num_tail]))
        tokens[: len(request.tokens)] = request.tokens
        return tokens

    def block_hashes(self, row: int) -> np.ndarray:
        """Return the `Request.block_hashes` of a row, a copy."""
        if self.hasher is None:
            return NO_HASHES
        hash_B2 = self._hash_ZB2[row, : self.num_known_Z[row] // self.config.block_size]
        return np.concatenate((hash_B2, self._sum_Z4[row].reshape(2, 2)))

    def offsets_P1(self, rows: np.ndarray) -> np.ndarray:
        """Return where each rank's part of `rows` begins: i32 [P + 1]."""
        return np.searchsorted(rows, self.bounds_P1).astype(np.int32)

    def rows_of(self, slots_P: Sequence[np.ndarray]) -> np.ndarray:
        """Return the rows of each rank's slots, joined: i64."""
        slots, offsets_P1 = pack_lists(slots_P, np.int64)
        return np.repeat(self.bounds_P1[:-1], np.diff(offsets_P1)) + slots

    def sum_P(self, values_Z: np.ndarray) -> np.ndarray:
        """Return the sum of a value over each rank's running rows: [P], i64 or f64."""
        return np.where(self.running_Z, values_Z, 0).reshape(len(self.bounds_P1) - 1, -1).sum(axis=1)

    def num_blocks_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of blocks in each row's block tables: i64 [C, S]."""
        tables_CS = self.tables_CZ[:, rows]
        num_CS = (tables_CS["num_blocks"] - tables_CS["num_dropped"]).astype(np.int64)
        for cache in np.flatnonzero(self.caches.every_C > 1).tolist():
            num_CS[cache] = [len(self.blocks_of(cache, row)) for row in rows.tolist()]
        return num_CS

    def blocks_of(self, cache: int, row: int) -> np.ndarray:
        """Return the ids of a row's blocks: i32."""
        table = self.tables_CZ[cache, row]
        ids_B = self.block_ids_CZW[cache, row, table["num_dropped"] : table["num_blocks"]]
        return ids_B[np.diff(ids_B, prepend=0) != 0]  # states repeat

    def check_integrity(self) -> None:
        """Assert that the counters are consistent, and the block tables are what the pool accounts for."""
        rows = np.flatnonzero(self.occupied_Z)
        num_free_P = (~self.occupied_Z).reshape(len(self.num_free_P), -1).sum(axis=1)
        assert np.array_equal(self.num_free_P, num_free_P), (self.num_free_P, num_free_P)
        assert not (self.running_Z & ~self.occupied_Z).any(), "running, but not occupied"
        known, tokens, computed = self.num_known_Z[rows], self.num_tokens_Z[rows], self.num_computed_Z[rows]
        ahead = tokens - known
        runs = self.running_Z[rows]
        assert (ahead >= 0).all(), (known, tokens)
        assert (ahead[runs] <= self.in_flight_Z[rows][runs]).all(), (known, tokens, self.in_flight_Z[rows])
        assert (computed <= tokens).all(), (computed, tokens)
        assert (tokens <= self.limit_Z[rows]).all(), (tokens, self.limit_Z[rows])
        refs_CPB = np.zeros_like(self.pool.refs_CPB)
        held = self.num_held_Z[rows]
        assert (held >= computed).all(), (held, computed)
        for cache, size in enumerate(self.caches.size_C.tolist()):
            num_blocks = self.tables_CZ["num_blocks"][cache, rows]
            assert np.array_equal(num_blocks, -(-computed // size)), (cache, computed)
            assert (held <= num_blocks * size).all(), (cache, held, num_blocks)
            for row in rows.tolist():
                np.add.at(refs_CPB[cache, self.rank_Z[row]], self.blocks_of(cache, row), 1)
        assert np.array_equal(refs_CPB, self.pool.refs_CPB), "the block tables and the pool disagree on references"
