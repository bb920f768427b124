"""The running requests of all ranks as numpy arrays: one row per slot, row = rank * max_num_seqs + slot.

Shape letters: N rows (all slots of all ranks), P ranks, G caches, A admitted requests, W width of a block
table, B blocks, L tokens, s tokens in a block.
Functions take `rows`, an ascending array of row numbers, and so sorted by rank, as a `StepPlan` wants it.

Two counts run ahead of what is known: `num_tokens` includes the tokens that steps in flight will sample, `num_computed` those
that they will compute. A step's plan relies on all earlier ones, as ranks run them in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler._compiled import rows as row_loops
from expertwire.scheduler._compiled import steps as step_loops
from expertwire.scheduler.block_pool import BlockPool, aligned, aligned_rows
from expertwire.scheduler.caches import EVERYTHING, describe
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import CacheSpec
from expertwire.scheduler.prefix_cache import PrefixNames
from expertwire.scheduler.rank_placement import Placement
from expertwire.scheduler.request import FACTS, Request

_NOTHING = np.zeros(0, np.int32)
_NO_FACTORS = np.zeros((0, 4, 0), np.uint64)


class Admissions(NamedTuple):
    """Requests that start in a step, sorted by rank."""

    requests: list[Request]
    rank_A: np.ndarray  # i64, as the rest
    num_cached_A: np.ndarray  # tokens that need not be computed
    num_scheduled_A: np.ndarray  # tokens to compute in this step
    parent_A: np.ndarray  # of a fork: the row that has them; or -1
    first_A: np.ndarray  # its names, see `Request.names`, are those from here on; without a prefix cache nobody has any
    fact_A: np.ndarray  # request.FACTS
    name_W2: np.ndarray  # u64


class Copies(NamedTuple):
    """Blocks to copy, sorted by rank: i32 arrays."""

    rank: np.ndarray
    cache: np.ndarray
    source: np.ndarray
    target: np.ndarray


NO_NAMES = np.zeros((0, 2), np.uint64)
NO_ADMISSIONS = Admissions([], *np.zeros((5, 0), np.int64), np.zeros(0, FACTS), NO_NAMES)
_NO_COPIES = Copies(_NOTHING, _NOTHING, _NOTHING, _NOTHING)


class RunningTable:
    """Counters, tokens and block tables of the running requests.

    A row is *occupied* from admission until its release is planned, and *running* until its request has ended. Between the
    two it only waits to be released. A *draining* row runs, but computes no more: its request goes back to the queue.
    """

    def __init__(self, config: SchedulerConfig, specs: Sequence[CacheSpec], pool: BlockPool) -> None:
        slots, num_groups, size = config.max_num_seqs, len(specs), config.block_size
        n = config.num_ranks * slots
        self.config, self.pool, self.specs = config, pool, tuple(specs)
        self.num_given_P = np.zeros(config.num_ranks, np.int64)  # requests admitted so far
        self.rank_N = np.repeat(np.arange(config.num_ranks), slots)
        self.slot_N = np.tile(np.arange(slots, dtype=np.int32), config.num_ranks)
        self.bounds_P1 = np.arange(config.num_ranks + 1) * slots

        row_N, fixed_N = aligned(n, row_loops.ROW), aligned(n, row_loops.FIXED)
        fixed_N["rank"] = self.rank_N
        # The same memory, field by field.
        self.key_N, self.num_cached_N = fixed_N["key"], fixed_N["num_cached"]
        self.num_known_N, self.num_tokens_N, self.limit_N = row_N["num_known"], row_N["num_tokens"], row_N["limit"]
        self.num_computed_N, self.num_held_N, self.in_flight_N = (
            row_N[name] for name in ("num_computed", "num_held", "in_flight")
        )
        self.occupied_N, self.running_N, self.draining_N = np.zeros((3, n), bool)
        self.order_N = np.zeros(n, np.int64)  # of submission
        self.priority_N = np.zeros(n, np.int64)
        self.table_GN = np.zeros((num_groups, n), row_loops.BLOCK_TABLE)
        # Untouched pages cost nothing, so these may be as wide as the longest request.
        width = config.blocks_for(config.max_model_len)
        self.block_ids_GNW = aligned_rows(num_groups * n, width, np.int32).reshape(num_groups, n, -1)
        # Tokens known since admission: whole blocks, and behind them the tail, so that appending stays within little memory.
        self._tokens_NL = aligned_rows(n, width * size, np.int32)
        self._tail_Ns = aligned(n * size, np.dtype(np.int32)).reshape(n, size)
        self.names, self._factors = None, _NO_FACTORS
        if config.enable_prefix_caching:
            self.names = PrefixNames(config.max_model_len, size, config.prefix_secret)
            self._factors = self.names.factors_W4s
        self.name_NW2 = aligned_rows(n, 2 * width, np.uint64).reshape(n, -1, 2)
        self.sum_N4 = aligned(n * 4, np.dtype(np.uint64)).reshape(n, 4)
        self.caches = describe(specs, config)
        self._has_windows = bool((self.caches.window_G < EVERYTHING).any())
        self.for_loops = row_loops.Rows(
            block_size=size,
            per_rank=slots,
            occupied_N=self.occupied_N,
            running_N=self.running_N,
            draining_N=self.draining_N,
            row_N=row_N,
            fixed_N=fixed_N,
            table_GN=self.table_GN,
            block_ids_GNW=self.block_ids_GNW,
            tail_Ns=self._tail_Ns,
            tokens_NL=self._tokens_NL,
            name_NW2=self.name_NW2,
            sum_N4=self.sum_N4,
        )
        self._want_N = np.zeros((2, n), np.int32)

    def admit(self, admissions: Admissions, tokens: np.ndarray, token_offsets_A1: np.ndarray) -> np.ndarray:
        """Give each request the lowest free slot of its rank: i64 [A] rows, ascending. `tokens`: theirs, one after another."""
        rank_A, fact_A = admissions.rank_A, admissions.fact_A
        counts_P = np.bincount(rank_A, minlength=len(self.bounds_P1) - 1)
        free = np.flatnonzero(~self.occupied_N)
        rows = free[self.offsets_P1(free)[rank_A] + ragged.positions(counts_P)]
        assert (self.rank_N[rows] == rank_A).all(), f"too few free slots for {counts_P} requests"
        self.num_given_P += counts_P
        self.order_N[rows], self.priority_N[rows] = fact_A["order"], fact_A["priority"]
        row_loops.begin(
            self.caches,
            self.pool.blocks,
            self.for_loops,
            rows,
            admissions.parent_A,
            admissions.num_cached_A,
            fact_A,
            tokens,
            token_offsets_A1,
            admissions.first_A,
            admissions.name_W2,
        )
        return rows

    def release(self, rows: np.ndarray) -> None:
        """Empty the rows; their blocks go back to the pool, the whole ones with names."""
        row_loops.release(self.caches, self.pool.blocks, self.for_loops, self.names is not None, rows)

    def want(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows to compute, i32, tokens for each, i32, and the token budget that every rank has left, i64 [P]; and how many blocks
        each rank lacks for that, i64 [G, P].

        One token for each that needs no more; what is left of a rank's budget goes to those that need more, in order."""
        config, (row_N, num_N) = self.config, self._want_N
        budget_P = np.zeros(config.num_ranks, np.int64)
        lacking_GP = np.zeros((len(self.specs), config.num_ranks), np.int64)
        chunked_prefill_size = (
            config.max_num_batched_tokens if config.chunked_prefill_size is None else config.chunked_prefill_size
        )
        count = step_loops.want(
            self.caches,
            self.for_loops,
            config.max_num_batched_tokens,
            chunked_prefill_size,
            row_N,
            num_N,
            budget_P,
            lacking_GP,
        )
        return row_N[:count], num_N[:count], budget_P, lacking_GP

    def drop_blocks(self, rows: np.ndarray) -> None:
        """Give back what lies before each row's window, now that its next token to compute is known."""
        if self._has_windows:
            row_loops.drop_unseen(self.caches, self.pool.blocks, self.for_loops, rows)

    def lacking(self, rows: np.ndarray, num: np.ndarray) -> np.ndarray:
        """How many blocks each row lacks to compute `num` tokens more: i64 [G, R]."""
        lacking_GR = np.zeros((len(self.specs), len(rows)), np.int64)
        step_loops.lacking(self.caches, self.for_loops, rows, num, lacking_GR)
        return lacking_GR

    def unshare_tails(self, rows: np.ndarray) -> Copies:
        """Copy on write: forks about to write into a block that others use too get one of their own."""
        if not len(rows):
            return _NO_COPIES
        parts = []
        for group, size in enumerate(self.caches.size_G.tolist()):
            inside = self.num_computed_N[rows] % size > 0
            row_C, rank_C = rows[inside], self.rank_N[rows[inside]]
            index_C = self.num_computed_N[row_C] // size
            source_C = self.block_ids_GNW[group, row_C, index_C]
            assert (self.pool.refs_GPB[group, rank_C, source_C] > 1).all(), "a fork shares no block"
            target_C = self.pool.allocate(group, rank_C)
            self.pool.free(group, rank_C, source_C)
            self.block_ids_GNW[group, row_C, index_C] = target_C
            parts.append((rank_C, np.full(len(row_C), group), source_C, target_C))
        copies = Copies(*(np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True)))
        by_rank = np.argsort(copies.rank, kind="stable")
        return Copies(*(part[by_rank] for part in copies))

    def schedule(
        self,
        number: int,
        rows: np.ndarray,
        num: np.ndarray,
        num_lacking: int,
        new_rows: np.ndarray,
        new_num: np.ndarray,
    ) -> step_loops.Scheduled:
        """Step `number` is planned, which computes `num` tokens more of each row, which lack `num_lacking` blocks at most, and
        `new_num` of the new ones: give them the blocks, count, and name those that are whole, or will be after the steps in
        flight."""
        most = num_lacking + step_loops.count_new(self.caches, self.for_loops, new_rows, new_num)
        step = step_loops.Scheduled.empty(self.config.num_ranks, len(rows) + len(new_rows), most)
        count = step_loops.schedule(
            self.caches,
            self.pool.blocks,
            self.for_loops,
            self.names is not None,
            number,
            rows,
            num,
            new_rows,
            new_num,
            step,
            np.empty(most, np.int32),
            *np.empty((2, len(step.slot_S)), np.int32),
        )
        return step if count == most else step._replace(block_4B=step.block_4B[:, :count])

    def shareable(self, row: int, most: int) -> int:
        """From how many of its first tokens, `most` at most, another request can go on with a row's blocks; 0: none.

        A state is there for all that are computed, and where one was kept; behind that it has gone on.
        """
        num = int(self.num_computed_N[row])
        if num > most:
            every = math.lcm(*(spec.tokens_per_block(1) for spec in self.specs if spec.kind == "state"))
            num = most // every * every
        first_G = np.maximum(num - self.caches.window_G + 1, 0) // self.caches.size_G
        return num if (self.table_GN["num_dropped"][:, row] <= first_G).all() else 0

    def take_in(
        self,
        number: int,
        step: step_loops.Scheduled,
        offsets_P1: np.ndarray,
        sampled: step_loops.Sampled,
        eos_ids: np.ndarray,
        may_stop_V: np.ndarray,
    ) -> tuple[step_loops.Known, np.ndarray]:
        """Step `number` is done, with the tokens that each rank has sampled: those that count, and whether each row's request is
        still the one that the step was planned for, and running, u8 [N]. Finish reasons may be `ASK`, which is where
        `may_stop_V` says that the token stops some requests, and the row's has stop ids of its own."""
        known = step_loops.Known.empty(len(sampled.slot_O))
        going_N = np.zeros(len(self.rank_N), np.uint8)
        count = step_loops.take_in(
            self.for_loops,
            self._factors,
            eos_ids,
            may_stop_V,
            number,
            step,
            offsets_P1,
            sampled,
            going_N,
            known,
            np.empty_like(known.row_O),
        )
        assert count >= 0, f"step {number}: sampled {sampled.slot_O}, expected {step.slot_S[step.sample_S == 1]}"
        return step_loops.Known(*(column[:count] for column in known)), going_N

    def tokens(self, row: int, request: Request) -> np.ndarray:
        """The known tokens of a running request, which has this row: i32, a copy."""
        num_known = int(self.num_known_N[row])
        behind = num_known % self.config.block_size
        tokens = np.concatenate((self._tokens_NL[row, : num_known - behind], self._tail_Ns[row, :behind]))
        tokens[: len(request.tokens)] = request.tokens
        return tokens

    def copy_names(self, row: int, request: Request) -> None:
        """Give a request that leaves its row the names of what it has."""
        if self.names is not None:
            name_W2 = self.name_NW2[row, : self.num_known_N[row] // self.config.block_size]
            request.names = np.concatenate((name_W2, self.sum_N4[row].reshape(2, 2)))

    def offsets_P1(self, rows: np.ndarray) -> np.ndarray:
        """Where each rank's part of `rows` lies: i32 [P + 1]."""
        return np.searchsorted(rows, self.bounds_P1).astype(np.int32)

    def rows_of(self, slots_P: Sequence[np.ndarray]) -> np.ndarray:
        """The rows of slots given rank by rank: i64."""
        slots, offsets_P1 = ragged.pack(slots_P, np.int64)
        return np.repeat(self.bounds_P1[:-1], np.diff(offsets_P1)) + slots

    def count_P(self, of_N: np.ndarray) -> np.ndarray:
        """i64 [P], how many of each rank's rows are true."""
        return of_N.reshape(len(self.bounds_P1) - 1, -1).sum(axis=1)

    def outstanding_P(self) -> np.ndarray:
        """i64 [P], tokens that the running requests may still have to compute."""
        left_N = np.where(self.running_N, self.limit_N - self.num_computed_N, 0)
        return left_N.reshape(len(self.bounds_P1) - 1, -1).sum(axis=1, dtype=np.int64)

    def load_P(self, placement: Placement) -> np.ndarray:
        """f64 [P], what the running requests load their ranks with."""
        load_N = placement.load(self.num_tokens_N, self.num_computed_N, self.limit_N - self.num_tokens_N)
        return np.where(self.running_N, load_N, 0.0).reshape(len(self.bounds_P1) - 1, -1).sum(axis=1)

    def blocks_of(self, group: int, row: int) -> np.ndarray:
        """A row's blocks, i32."""
        table = self.table_GN[group, row]
        return self.block_ids_GNW[group, row, table["num_dropped"] : table["num_blocks"]]

    def check_integrity(self) -> None:
        """The counters are in order, and the block tables are exactly what the pool accounts for."""
        rows = np.flatnonzero(self.occupied_N)
        assert not (self.running_N & ~self.occupied_N).any(), "running, but not occupied"
        known, tokens, computed = self.num_known_N[rows], self.num_tokens_N[rows], self.num_computed_N[rows]
        ahead = tokens - known
        going = self.running_N[rows]
        assert (ahead >= 0).all(), (known, tokens)
        assert (ahead[going] <= self.in_flight_N[rows][going]).all(), (known, tokens, self.in_flight_N[rows])
        assert (computed <= tokens).all(), (computed, tokens)
        assert (tokens <= self.limit_N[rows]).all(), (tokens, self.limit_N[rows])
        refs_GPB = np.zeros_like(self.pool.refs_GPB)
        held = self.num_held_N[rows]
        assert (held >= computed).all(), (held, computed)
        for group, size in enumerate(self.caches.size_G.tolist()):
            num_blocks = self.table_GN["num_blocks"][group, rows]
            assert np.array_equal(num_blocks, -(-computed // size)), (group, computed)
            assert (held <= num_blocks * size).all(), (group, held, num_blocks)
            for row in rows.tolist():
                np.add.at(refs_GPB[group, self.rank_N[row]], self.blocks_of(group, row), 1)
        assert np.array_equal(refs_GPB, self.pool.refs_GPB), "the block tables and the pool disagree on references"
