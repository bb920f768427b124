"""The running requests of all ranks as numpy arrays: one row per slot, row = rank * max_running + slot.

Shape letters: N rows (all slots of all ranks), P ranks, G caches, A admitted requests, B positions in a block table, L tokens,
s tokens in a block.
Functions take `rows`, an ascending array of row numbers, and so sorted by rank, as a `StepPlan` wants it.

Two counts run ahead of what is known: `num_tokens` includes the tokens that steps in flight will sample, `num_computed` those
that they will compute. A step's plan relies on all earlier ones, as ranks run them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler.admission import Admission
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.placement import Placement
from expertwire.scheduler.plan import CacheSpec
from expertwire.scheduler.prefix import PrefixNames, names
from expertwire.scheduler.request import Request

SUPPORTED_KINDS = ("full", "latent", "index", "window")
_NOTHING = np.zeros(0, np.int32)
_NO_NAMES = np.zeros(0, np.uint64)


class Copies(NamedTuple):
    """Blocks to copy, sorted by rank: i32 arrays."""

    rank: np.ndarray
    cache: np.ndarray
    source: np.ndarray
    target: np.ndarray


_NO_COPIES = Copies(_NOTHING, _NOTHING, _NOTHING, _NOTHING)


class RunningTable:
    """Counters, tokens and block tables of the running requests.

    A row is *occupied* from admission until its release is planned, and *running* until its request has ended. Between the
    two it only waits to be released. A *draining* row runs, but computes no more: its request goes back to the queue.
    """

    def __init__(self, config: SchedulerConfig, specs: Sequence[CacheSpec], pool: BlockPool) -> None:
        slots, num_groups = config.max_running, len(specs)
        n = config.num_ranks * slots
        self.block_size = config.block_size
        self.pool = pool
        self.specs = tuple(specs)
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
        # A row's blocks are those at [num_dropped, num_blocks) of its table: a window's first ones are given back.
        self.num_blocks_GN = np.zeros((num_groups, n), np.int32)
        self.num_dropped_GN = np.zeros((num_groups, n), np.int32)
        self.most_blocks_G = np.array([most_blocks(spec, config) for spec in specs])
        # Untouched pages cost nothing, so these may be as wide as the longest request.
        width = config.blocks_for(config.max_model_len)
        self.block_ids_GNB = np.zeros((num_groups, n, width), np.int32)
        self._ids_G = [ids_NB.reshape(-1) for ids_NB in self.block_ids_GNB]  # the same by one index, which is faster
        # Tokens known since admission: whole blocks, and behind them the tail, so that appending stays within little memory.
        self._tokens_NL = np.zeros((n, width * config.block_size), np.int32)
        self._tail_Ns = np.zeros((n, config.block_size), np.int32)
        self.names = None
        if config.prefix_cache:
            self.names = PrefixNames(config.max_model_len, config.block_size, config.prefix_secret)
        self.name_NB2 = np.zeros((n, width, 2), np.uint64)
        self._names_M2 = self.name_NB2.reshape(-1, 2)  # by row * width + index, as `_ids_G`
        self._width = width
        self.num_named_N = np.zeros(n, np.int32)  # blocks
        self.sum_N4 = np.zeros((n, 4), np.uint64)
        self._new_blocks: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # group, rows, index, ids

    def admit(self, admissions: Sequence[Admission]) -> np.ndarray:
        """Give each request (sorted by rank) the lowest free slot of its rank: i64 [A] rows, ascending."""
        rank_A = np.array([admission.rank for admission in admissions], np.int64)
        requests = [admission.request for admission in admissions]
        counts_P = np.bincount(rank_A, minlength=len(self.bounds_P1) - 1)
        free = np.flatnonzero(~self.occupied_N)
        rows = free[self.offsets_P1(free)[rank_A] + ragged.positions(counts_P)]
        assert np.array_equal(self.rank_N[rows], rank_A), f"too few free slots for {counts_P} requests"
        prompt_len_A = np.array([len(request.prompt) for request in requests])
        limit_A = np.array([request.limit for request in requests])
        min_tokens_A = np.array([min(request.params.min_tokens, request.limit) for request in requests])
        self.occupied_N[rows] = self.running_N[rows] = True
        self.key_N[rows] = [request.key for request in requests]
        self.order_N[rows] = [request.order for request in requests]
        self.priority_N[rows] = [request.priority for request in requests]
        self.num_known_N[rows] = self.num_tokens_N[rows] = [len(request.tokens) for request in requests]
        self.num_computed_N[rows] = [admission.num_cached for admission in admissions]
        self.limit_N[rows] = limit_A
        self.stop_from_N[rows] = np.minimum(prompt_len_A + min_tokens_A, limit_A)
        self.eos_stops_N[rows] = [not request.params.ignore_eos for request in requests]
        self.has_stop_ids_N[rows] = [bool(request.stop_ids) for request in requests]
        self.num_cached_N[rows] = [request.num_cached for request in requests]
        self.num_named_N[rows] = self.num_computed_N[rows] // self.block_size
        if self.names is not None:
            self.sum_N4[rows] = np.concatenate([request.prefix_sum for request in requests]).reshape(-1, 4)
        for request, slot, row in zip(requests, self.slot_N[rows].tolist(), rows.tolist(), strict=True):
            request.slot = slot
            behind = len(request.tokens) % self.block_size
            self._tail_Ns[row, :behind] = request.tokens[len(request.tokens) - behind :]
            if request.names is not None:
                self.name_NB2[row, : len(request.names)] = request.names
                request.names = request.prefix_sum = None  # now they are here
        self.shares_tail_N[rows] = self.num_computed_N[rows] % self.block_size > 0
        self._share_cached(admissions, rows)
        return rows

    def release(self, rows: np.ndarray) -> None:
        """Empty the rows; their blocks go back to the pool."""
        for group, dropped_N in enumerate(self.num_dropped_GN):
            counts = self.num_blocks_GN[group, rows] - dropped_N[rows]
            self._give_back(group, rows, counts)
        self.num_blocks_GN[:, rows] = self.num_dropped_GN[:, rows] = 0
        self.occupied_N[rows] = self.running_N[rows] = self.draining_N[rows] = self.shares_tail_N[rows] = False
        self.in_flight_N[rows] = 0

    def lacking_GR(self, rows: np.ndarray, end: np.ndarray) -> np.ndarray:
        """How many blocks each row lacks to hold `end` tokens, with one for a shared block that it must copy: [G, R]."""
        lacking = np.maximum(-(-end // self.block_size) - self.num_blocks_GN.take(rows, axis=1), 0)
        return lacking + self.shares_tail_N[rows]

    def promised_GP(self) -> np.ndarray:
        """Blocks that the running requests will still take for the tokens that they have: i64 [G, P]."""
        going_N = self.running_N & (self.num_tokens_N > self.num_computed_N)
        lacking_GN = np.maximum(-(-self.num_tokens_N // self.block_size) - self.num_blocks_GN, 0) + self.shares_tail_N
        held_GN = self.num_blocks_GN - self.num_dropped_GN
        promised_GN = np.minimum(lacking_GN, self.most_blocks_G[:, None] - held_GN + 1) * going_N
        return promised_GN.reshape(len(promised_GN), len(self.bounds_P1) - 1, -1).sum(axis=2)

    def append_blocks(self, rows: np.ndarray, end: np.ndarray) -> None:
        """Give each row the blocks it lacks to hold `end` tokens."""
        needed = -(-end // self.block_size)
        for group, num_blocks_N in enumerate(self.num_blocks_GN):
            counts = needed - num_blocks_N.take(rows)
            lacks = np.flatnonzero(counts > 0)
            if not len(lacks):
                continue
            row_B = np.repeat(rows[lacks], counts[lacks])
            index_B = num_blocks_N[row_B] + ragged.positions(counts[lacks])
            ids_B = self.pool.allocate(group, self.rank_N[row_B])
            num_blocks_N[rows[lacks]] = needed[lacks]
            self._set_blocks(group, row_B, index_B, ids_B)

    def drop_blocks(self, rows: np.ndarray) -> None:
        """Give back what lies before each row's window, now that its next token to compute is known."""
        for group, spec in enumerate(self.specs):
            if spec.window is not None:
                first = spec.first_seen(self.num_computed_N[rows], self.block_size)
                counts = np.minimum(first, self.num_blocks_GN[group, rows]) - self.num_dropped_GN[group, rows]
                self._give_back(group, rows, counts)
                self.num_dropped_GN[group, rows] += counts

    def unshare_tails(self, rows: np.ndarray) -> Copies:
        """Copy on write: rows about to write into a block that others use too get one of their own."""
        if not self.shares_tail_N.any():
            return _NO_COPIES
        rows = rows[self.shares_tail_N[rows]]
        if not len(rows):
            return _NO_COPIES
        parts = []
        for group in range(len(self.num_blocks_GN)):
            index = self.num_computed_N[rows] // self.block_size
            inside = (self.num_computed_N[rows] % self.block_size > 0) & (index < self.num_blocks_GN[group, rows])
            row_C, index_C = rows[inside], index[inside]
            source_C = self.block_ids_GNB[group, row_C, index_C]
            shared = self.pool.refs_GPB[group, self.rank_N[row_C], source_C] > 1
            row_C, index_C, source_C = row_C[shared], index_C[shared], source_C[shared]
            rank_C = self.rank_N[row_C]
            target_C = self.pool.allocate(group, rank_C)
            self.pool.free(group, rank_C, source_C)
            self._set_blocks(group, row_C, index_C, target_C)
            parts.append((rank_C, np.full(len(row_C), group), source_C, target_C))
        self.shares_tail_N[rows] = False
        copies = Copies(*(np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True)))
        by_rank = np.argsort(copies.rank, kind="stable")
        return Copies(*(part[by_rank] for part in copies))

    def advance(self, rows: np.ndarray, end: np.ndarray, num_tokens: np.ndarray) -> None:
        """A step has been planned that computes each row up to `end`; then, with what is to be sampled, it has `num_tokens`."""
        self.num_computed_N[rows] = end
        self.num_tokens_N[rows] = num_tokens
        scheduled_N = np.zeros_like(self.running_N)
        scheduled_N[rows] = True
        self.in_flight_N += scheduled_N

    def take_new_blocks(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What has been set in block tables since the last call: i32 row, cache, index and id of each, sorted by rank."""
        if not self._new_blocks:
            return _NOTHING, _NOTHING, _NOTHING, _NOTHING
        parts = [
            (row_B, np.full(len(row_B), group), index_B, ids_B) for group, row_B, index_B, ids_B in self._new_blocks
        ]
        self._new_blocks.clear()
        row_B, cache_B, index_B, ids_B = (np.concatenate(part).astype(np.int32) for part in zip(*parts, strict=True))
        order = np.argsort(self.rank_N[row_B], kind="stable")
        return row_B[order], cache_B[order], index_B[order], ids_B[order]

    def append_tokens(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        """One sampled token for each row (in any order) is known now."""
        known = self.num_known_N[rows]
        block = known // self.block_size
        within = known - block * self.block_size
        self._tail_Ns[rows, within] = tokens
        self.num_known_N[rows] = known + 1
        full = np.flatnonzero(within == self.block_size - 1)
        if not len(full):
            return
        rows, block, tails_Rs = rows[full], block[full], self._tail_Ns.take(rows[full], axis=0)
        self._tokens_NL.reshape(-1, self.block_size)[rows * self._width + block] = tails_Rs
        if self.names is not None:
            self.sum_N4[rows] = sums_R4 = self.names.extended(self.sum_N4.take(rows, axis=0), block, tails_Rs)
            self.name_NB2[rows, block] = names(sums_R4)

    def tokens(self, row: int, request: Request) -> np.ndarray:
        """The known tokens of a running request, which has this row: i32, a copy."""
        num_known = int(self.num_known_N[row])
        behind = num_known % self.block_size
        tokens = np.concatenate((self._tokens_NL[row, : num_known - behind], self._tail_Ns[row, :behind]))
        tokens[: len(request.tokens)] = request.tokens
        return tokens

    def name_blocks(self) -> None:
        """Name the blocks that are whole now, or will be when the steps in flight are done."""
        if self.names is None:
            return
        whole_N = np.minimum(self.num_computed_N, self.num_known_N) // self.block_size
        rows = np.flatnonzero(self.occupied_N & (whole_N > self.num_named_N))
        if not len(rows):
            return
        counts = whole_N[rows] - self.num_named_N[rows]
        row_B = np.repeat(rows, counts)
        index_B = self.num_named_N[row_B] + ragged.positions(counts)
        self.num_named_N[rows] = whole_N[rows]
        place_B = row_B * self._width + index_B
        names_B2 = self._names_M2.take(place_B, axis=0)
        for group, dropped_N in enumerate(self.num_dropped_GN):
            here = slice(None) if self.specs[group].window is None else index_B >= dropped_N[row_B]
            ids = self._ids_G[group].take(place_B[here])
            self.pool.name(group, self.rank_N.take(row_B[here]), ids, names_B2[here])

    def copy_names(self, row: int, request: Request) -> None:
        """Give a request that leaves its row the names of what it has."""
        if self.names is not None:
            request.names = self.name_NB2[row, : self.num_known_N[row] // self.block_size].copy()
            request.prefix_sum = self.sum_N4[row].copy()

    def names_next(self) -> np.ndarray:
        """The first half of the next name of every running request that has still to compute whole blocks: u64."""
        rows = np.flatnonzero(self.running_N & (self.num_known_N // self.block_size > self.num_named_N))
        return self.name_NB2[rows, self.num_named_N[rows], 0] if self.names is not None else _NO_NAMES

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
        return self.block_ids_GNB[group, row, self.num_dropped_GN[group, row] : self.num_blocks_GN[group, row]]

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
            assert np.array_equal(self.num_blocks_GN[group, rows], -(-computed // self.block_size)), (group, computed)
            for row in rows.tolist():
                np.add.at(refs_GPB[group, self.rank_N[row]], self.blocks_of(group, row), 1)
        assert np.array_equal(refs_GPB, self.pool.refs_GPB), "the block tables and the pool disagree on references"

    def _share_cached(self, admissions: Sequence[Admission], rows: np.ndarray) -> None:
        having = [i for i, admission in enumerate(admissions) if admission.num_cached]
        if not having:
            return
        held_rows = rows[having]
        ends = -(-self.num_computed_N[held_rows] // self.block_size)
        for group in range(len(self.num_blocks_GN)):
            held = [admissions[i].blocks_G[group] for i in having]
            counts = np.array([len(blocks) for blocks in held])
            row_B = np.repeat(held_rows, counts)
            index_B = np.repeat(ends - counts, counts) + ragged.positions(counts)
            ids_B = np.concatenate(held).astype(np.int32)
            self.pool.share(group, self.rank_N[row_B], ids_B)
            self.num_blocks_GN[group, held_rows] = ends
            self.num_dropped_GN[group, held_rows] = ends - counts
            self._set_blocks(group, row_B, index_B, ids_B)

    def _set_blocks(self, group: int, row_B: np.ndarray, index_B: np.ndarray, ids_B: np.ndarray) -> None:
        self._ids_G[group][row_B * self._width + index_B] = ids_B
        self._new_blocks.append((group, row_B, index_B, ids_B))

    def _give_back(self, group: int, rows: np.ndarray, counts: np.ndarray) -> None:
        """Free the first `counts` blocks that each row still has."""
        row_B = np.repeat(rows, counts)
        index_B = self.num_dropped_GN[group, row_B] + ragged.positions(counts)
        self.pool.free(group, self.rank_N[row_B], self._ids_G[group].take(row_B * self._width + index_B))


def most_blocks(spec: CacheSpec, config: SchedulerConfig) -> int:
    """Blocks of a cache that one request can hold: those of the longest, or of its window and one step's tokens."""
    longest = config.blocks_for(config.max_model_len)
    if spec.kind != "window":
        return longest
    assert spec.window is not None, f"cache {spec.name!r} has no window"
    return min(longest, config.blocks_for(spec.window + config.max_num_tokens) + 1)


def check_caches(cache_specs: tuple[CacheSpec, ...]) -> None:
    """ValueError: there is no cache, or one of a kind that is not supported, or two of one name."""
    given = [spec.name for spec in cache_specs]
    if not given or len(set(given)) < len(given):
        raise ValueError(f"cache_specs must have at least one cache, each with a name of its own, got {given}")
    for spec in cache_specs:
        if spec.kind not in SUPPORTED_KINDS:
            raise ValueError(
                f"cache {spec.name!r} is of kind {spec.kind!r}; the scheduler supports these kinds: {', '.join(SUPPORTED_KINDS)}"
            )
        if spec.kind == "window" and (spec.window is None or spec.window < 1):
            raise ValueError(
                f"cache {spec.name!r} is of kind 'window'; window must be an integer >= 1, got {spec.window!r}"
            )
        if spec.kind != "window" and spec.window is not None:
            raise ValueError(f"cache {spec.name!r} is of kind {spec.kind!r}; window must be None, got {spec.window!r}")
