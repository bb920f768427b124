"""The running requests of all ranks as numpy arrays: one row per slot, row = rank * max_running + slot.

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

from expertwire.scheduler import ragged, row_loops
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.caches import EVERYTHING, describe
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.placement import Placement
from expertwire.scheduler.plan import CacheSpec, FinishReason
from expertwire.scheduler.prefix import PrefixNames
from expertwire.scheduler.request import Request

ASK = 255
_NOTHING = np.zeros(0, np.int32)
_NO_NAMES = np.zeros((0, 2), np.uint64)
_NO_FACTORS = np.zeros((0, 4, 0), np.uint64)


class Admissions(NamedTuple):
    """Requests that start in a step, sorted by rank."""

    requests: list[Request]
    rank_A: np.ndarray  # i64, as the rest
    num_cached_A: np.ndarray  # tokens that need not be computed
    num_scheduled_A: np.ndarray  # tokens to compute in this step
    parent_A: np.ndarray  # of a fork: the row that has them; or -1


class Copies(NamedTuple):
    """Blocks to copy, sorted by rank: i32 arrays."""

    rank: np.ndarray
    cache: np.ndarray
    source: np.ndarray
    target: np.ndarray


class Scheduled(NamedTuple):
    """What a step computes of its rows, and what is new in the block tables, sorted by row."""

    start_S: np.ndarray  # i32, tokens computed before
    sample_S: np.ndarray  # u8, whether it then samples
    block_row_B: np.ndarray  # i64
    block_cache_B: np.ndarray  # i32, as the rest
    block_index_B: np.ndarray
    block_id_B: np.ndarray


NO_ADMISSIONS = Admissions([], *np.zeros((4, 0), np.int64))
_NO_COPIES = Copies(_NOTHING, _NOTHING, _NOTHING, _NOTHING)


class RunningTable:
    """Counters, tokens and block tables of the running requests.

    A row is *occupied* from admission until its release is planned, and *running* until its request has ended. Between the
    two it only waits to be released. A *draining* row runs, but computes no more: its request goes back to the queue.
    """

    def __init__(self, config: SchedulerConfig, specs: Sequence[CacheSpec], pool: BlockPool) -> None:
        slots, num_groups, size = config.max_running, len(specs), config.block_size
        n = config.num_ranks * slots
        self.config, self.pool, self.specs = config, pool, tuple(specs)
        self.num_given_P = np.zeros(config.num_ranks, np.int64)  # requests admitted so far
        self.rank_N = np.repeat(np.arange(config.num_ranks), slots)
        self.slot_N = np.tile(np.arange(slots, dtype=np.int32), config.num_ranks)
        self.bounds_P1 = np.arange(config.num_ranks + 1) * slots

        self.occupied_N = np.zeros(n, bool)
        self.running_N = np.zeros(n, bool)
        self.draining_N = np.zeros(n, bool)
        self.key_N = np.zeros(n, np.int64)
        self.order_N = np.zeros(n, np.int64)  # of submission
        self.priority_N = np.zeros(n, np.int64)
        self.num_known_N = np.zeros(n, np.int32)  # the prompt's and the sampled tokens
        self.num_tokens_N = np.zeros(n, np.int32)
        self.num_computed_N = np.zeros(n, np.int32)
        self.in_flight_N = np.zeros(n, np.int8)  # steps
        self.limit_N = np.zeros(n, np.int32)  # of num_known
        self.stop_from_N = np.zeros(n, np.int32)  # stop and end-of-sequence ids count from this num_known on
        self.eos_stops_N = np.zeros(n, bool)
        self.has_stop_ids_N = np.zeros(n, bool)
        self.num_cached_N = np.zeros(n, np.int32)  # prompt tokens found in the cache when first admitted
        self.shares_tail_N = np.zeros(n, bool)  # a fork: its last block may be another's too
        self._facts_N = (
            self.key_N,
            self.order_N,
            self.priority_N,
            self.limit_N,
            self.stop_from_N,
            self.eos_stops_N,
            self.has_stop_ids_N,
            self.num_cached_N,
        )
        # A row's blocks are those at [num_dropped, num_blocks) of its table: a window's first ones are given back. Its rank knows
        # of those before num_sent.
        self.num_blocks_GN, self.num_dropped_GN, self.num_sent_GN = np.zeros((3, num_groups, n), np.int32)
        # Untouched pages cost nothing, so these may be as wide as the longest request.
        width = config.blocks_for(config.max_model_len)
        self.block_ids_GNW = np.zeros((num_groups, n, width), np.int32)
        # Tokens known since admission: whole blocks, and behind them the tail, so that appending stays within little memory.
        self._tokens_NL = np.zeros((n, width * size), np.int32)
        self._tail_Ns = np.zeros((n, size), np.int32)
        self.names, self._factors = None, _NO_FACTORS
        if config.prefix_cache:
            self.names = PrefixNames(config.max_model_len, size, config.prefix_secret)
            self._factors = self.names.factors_W4s
        self.name_NW2 = np.zeros((n, width, 2), np.uint64)
        self.num_named_N = np.zeros(n, np.int32)  # blocks
        self.sum_N4 = np.zeros((n, 4), np.uint64)
        self.caches = describe(specs, config)
        self.for_loops = self._for_loops()
        self._want_N = np.zeros(n, np.int64), np.zeros(n, np.int32)

    def _for_loops(self) -> row_loops.Rows:
        return row_loops.Rows(
            block_size=self.config.block_size,
            rank_N=self.rank_N,
            occupied_N=self.occupied_N,
            running_N=self.running_N,
            draining_N=self.draining_N,
            in_flight_N=self.in_flight_N,
            num_known_N=self.num_known_N,
            num_tokens_N=self.num_tokens_N,
            num_computed_N=self.num_computed_N,
            limit_N=self.limit_N,
            stop_from_N=self.stop_from_N,
            eos_stops_N=self.eos_stops_N,
            has_stop_ids_N=self.has_stop_ids_N,
            order_N=self.order_N,
            shares_tail_N=self.shares_tail_N,
            num_named_N=self.num_named_N,
            num_blocks_GN=self.num_blocks_GN,
            num_dropped_GN=self.num_dropped_GN,
            num_sent_GN=self.num_sent_GN,
            block_ids_GNW=self.block_ids_GNW,
            tail_Ns=self._tail_Ns,
            tokens_NL=self._tokens_NL,
            name_NW2=self.name_NW2,
            sum_N4=self.sum_N4,
        )

    def admit(self, admissions: Admissions, tokens: np.ndarray, token_offsets_A1: np.ndarray) -> np.ndarray:
        """Give each request the lowest free slot of its rank: i64 [A] rows, ascending. `tokens`: theirs, one after another."""
        requests, rank_A, computed_A, _, parent_A = admissions
        counts_P = np.bincount(rank_A, minlength=len(self.bounds_P1) - 1)
        free = np.flatnonzero(~self.occupied_N)
        rows = free[self.offsets_P1(free)[rank_A] + ragged.positions(counts_P)]
        assert np.array_equal(self.rank_N[rows], rank_A), f"too few free slots for {counts_P} requests"
        self.num_given_P += counts_P
        self.occupied_N[rows] = self.running_N[rows] = True
        self.num_known_N[rows] = self.num_tokens_N[rows] = np.diff(token_offsets_A1)
        self.num_computed_N[rows] = computed_A
        self.num_named_N[rows] = computed_A // self.config.block_size
        self.shares_tail_N[rows] = (computed_A % self.caches.size_G[:, None] > 0).any(axis=0)
        facts = [self._facts(request) for request in requests]
        for of_N, fact_A in zip(self._facts_N, np.array(facts, np.int64).T, strict=True):
            of_N[rows] = fact_A
        name_W2 = _NO_NAMES
        if self.names is not None:
            name_W2 = np.concatenate([request.names for request in requests if request.names is not None])
            sums = [request.prefix_sum for request in requests if request.prefix_sum is not None]
            self.sum_N4[rows] = np.concatenate(sums).reshape(-1, 4)
        for request, slot in zip(requests, self.slot_N[rows].tolist(), strict=True):
            request.slot = slot
            request.names = request.prefix_sum = None  # now they are here
        row_loops.begin(
            self.caches, self.pool.blocks, self.for_loops, rows, parent_A, computed_A, tokens, token_offsets_A1, name_W2
        )
        return rows

    @staticmethod
    def _facts(request: Request) -> tuple[int, ...]:
        """What `_facts_N` hold of it."""
        params, limit = request.params, request.limit
        stop_from = min(len(request.prompt) + params.min_tokens, limit)
        flags = not params.ignore_eos, bool(request.stop_ids)
        return request.key, request.order, request.priority, limit, stop_from, *flags, request.num_cached

    def release(self, rows: np.ndarray) -> None:
        """Empty the rows; their blocks go back to the pool, the whole ones with names."""
        self.name_blocks(rows)
        row_loops.release(self.pool.blocks, self.for_loops, rows)
        self.occupied_N[rows] = self.running_N[rows] = self.draining_N[rows] = self.shares_tail_N[rows] = False
        self.in_flight_N[rows] = 0

    def want(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows to compute, i64, i32 tokens for each, and the token budget that every rank has left, i64 [P].

        One token for each that needs no more; what is left of a rank's budget goes to those that need more, in order."""
        config, (row_N, num_N) = self.config, self._want_N
        budget_P = np.zeros(config.num_ranks, np.int64)
        chunk_tokens = config.max_num_tokens if config.chunk_tokens is None else config.chunk_tokens
        count = row_loops.want(self.for_loops, config.max_num_tokens, chunk_tokens, row_N, num_N, budget_P)
        return row_N[:count].copy(), num_N[:count].copy(), budget_P

    def drop_blocks(self, rows: np.ndarray) -> None:
        """Give back what lies before each row's window, now that its next token to compute is known."""
        if (self.caches.window_G < EVERYTHING).any():
            row_loops.drop_unseen(self.caches, self.pool.blocks, self.for_loops, rows)

    def lacking(self, rows: np.ndarray, num: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many blocks each row lacks to compute `num` tokens more, with one for a shared block that it must copy: [G, R]; and
        how many each rank: [G, P]."""
        lacking_GR = np.zeros((len(self.specs), len(rows)), np.int64)
        lacking_GP = np.zeros((len(self.specs), self.config.num_ranks), np.int64)
        row_loops.lacking(self.caches, self.for_loops, rows, num, lacking_GR, lacking_GP)
        return lacking_GR, lacking_GP

    def promised_GP(self) -> np.ndarray:
        """Blocks that the running requests will still take for the tokens that they have: i64 [G, P]."""
        promised_GP = np.zeros((len(self.specs), self.config.num_ranks), np.int64)
        row_loops.promised(self.caches, self.for_loops, promised_GP)
        return promised_GP

    def unshare_tails(self, rows: np.ndarray) -> Copies:
        """Copy on write: rows about to write into a block that others use too get one of their own."""
        if not self.shares_tail_N.any():
            return _NO_COPIES
        rows = rows[self.shares_tail_N[rows]]
        if not len(rows):
            return _NO_COPIES
        parts = []
        for group, size in enumerate(self.caches.size_G.tolist()):
            index = self.num_computed_N[rows] // size
            inside = (self.num_computed_N[rows] % size > 0) & (index < self.num_blocks_GN[group, rows])
            row_C, index_C = rows[inside], index[inside]
            source_C = self.block_ids_GNW[group, row_C, index_C]
            shared = self.pool.refs_GPB[group, self.rank_N[row_C], source_C] > 1
            row_C, index_C, source_C = row_C[shared], index_C[shared], source_C[shared]
            rank_C = self.rank_N[row_C]
            target_C = self.pool.allocate(group, rank_C)
            self.pool.free(group, rank_C, source_C)
            self.block_ids_GNW[group, row_C, index_C] = target_C
            self.num_sent_GN[group, row_C] = np.minimum(self.num_sent_GN[group, row_C], index_C)
            parts.append((rank_C, np.full(len(row_C), group), source_C, target_C))
        self.shares_tail_N[rows] = False
        copies = Copies(*(np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True)))
        by_rank = np.argsort(copies.rank, kind="stable")
        return Copies(*(part[by_rank] for part in copies))

    def schedule(self, rows: np.ndarray, num: np.ndarray) -> Scheduled:
        """A step is planned that computes `num` tokens more of each row: give them the blocks that they lack, and count."""
        count = row_loops.count_new(self.caches, self.for_loops, rows, num)
        start_S, sample_S = np.empty(len(rows), np.int32), np.empty(len(rows), np.uint8)
        step = Scheduled(start_S, sample_S, np.empty(count, np.int64), *np.empty((3, count), np.int32))
        row_loops.schedule(self.caches, self.pool.blocks, self.for_loops, rows, num, *step, np.empty(count, np.int32))
        return step

    def shareable(self, row: int, most: int) -> int:
        """From how many of its first tokens, `most` at most, another request can go on with a row's blocks; 0: none.

        A state is there for all that are computed, and where one was kept; behind that it has gone on.
        """
        num = int(self.num_computed_N[row])
        if num > most:
            every = math.lcm(*(spec.tokens_per_block(1) for spec in self.specs if spec.kind == "state"))
            num = most // every * every
        first_G = np.maximum(num - self.caches.window_G + 1, 0) // self.caches.size_G
        return num if (self.num_dropped_GN[:, row] <= first_G).all() else 0

    def settle(self, rows: np.ndarray, order: np.ndarray) -> np.ndarray:
        """A step of these rows is done, which were these requests' by order of submission: bool [N], whether they still run."""
        going_N = np.zeros_like(self.running_N)
        row_loops.settle(self.for_loops, rows, order, going_N)
        return going_N

    def finish(self, rows: np.ndarray, tokens: np.ndarray, eos_ids: np.ndarray, may_stop_V: np.ndarray) -> np.ndarray:
        """Why each row ends with this token, its last one: u8, `FinishReason`, or `ASK`, which is where `may_stop_V` says that
        the token stops some requests, and the row's has stop ids of its own."""
        finish = np.empty(len(rows), np.uint8)
        row_loops.finish(
            self.for_loops,
            eos_ids,
            may_stop_V,
            rows,
            tokens,
            ASK,
            finish,
            int(FinishReason.STOP),
            int(FinishReason.LENGTH),
        )
        return finish

    def append_tokens(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """One sampled token for each row (in any order) is known now."""
        row_loops.append_tokens(self.for_loops, self._factors, rows, tokens)

    def tokens(self, row: int, request: Request) -> np.ndarray:
        """The known tokens of a running request, which has this row: i32, a copy."""
        num_known = int(self.num_known_N[row])
        behind = num_known % self.config.block_size
        tokens = np.concatenate((self._tokens_NL[row, : num_known - behind], self._tail_Ns[row, :behind]))
        tokens[: len(request.tokens)] = request.tokens
        return tokens

    def name_blocks(self, rows: np.ndarray) -> None:
        """Name the blocks of these rows that are whole now, or will be when the steps in flight are done."""
        if self.names is not None:
            row_loops.name_rows(self.caches, self.pool.blocks, self.for_loops, rows)

    def copy_names(self, row: int, request: Request) -> None:
        """Give a request that leaves its row the names of what it has."""
        if self.names is not None:
            request.names = self.name_NW2[row, : self.num_known_N[row] // self.config.block_size].copy()
            request.prefix_sum = self.sum_N4[row].copy()

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
        return self.block_ids_GNW[group, row, self.num_dropped_GN[group, row] : self.num_blocks_GN[group, row]]

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
        for group in range(len(self.num_blocks_GN)):
            blocks = -(-computed // self.caches.size_G[group])
            assert np.array_equal(self.num_blocks_GN[group, rows], blocks), (group, computed)
            for row in rows.tolist():
                np.add.at(refs_GPB[group, self.rank_N[row]], self.blocks_of(group, row), 1)
        assert np.array_equal(refs_GPB, self.pool.refs_GPB), "the block tables and the pool disagree on references"
