"""The one brain: which request computes how many tokens on which rank, step by step.

A request has known tokens, of which a part is computed, in the caches; a step schedules the next ones. Prefill, chunks of it,
decode and coming back after preemption differ only in how many tokens are not computed yet. After the last token a rank samples
the next one and keeps it, so plans carry no sampled tokens, and a step can be planned while the one before it runs.

Everything is a function of the calls made, their `now` included: the same calls give the same plans, byte by byte.

The rest of the house: `request`, `intake` (which requests can be served at all), `queue` and `policy` (who is next), `prefix`,
`block_pool` and `admission` (blocks, and which prefixes the ranks have), `placement` (which rank), `table` (what runs),
`preemption` (who gives way), `plan` (what ranks are told and answer), `outputs` (what the answers say).

Shape letters: P ranks, A admitted requests, S scheduled requests, O sampled tokens, N rows of the running table, V vocabulary.
`rows` are rows of the running table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from expertwire.scheduler import preemption, ragged
from expertwire.scheduler.admission import Admission, PrefixCache, Room
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.intake import Pace, Rejection, invalid, refusal, token_limit
from expertwire.scheduler.outputs import StepOutputs, gather
from expertwire.scheduler.placement import Balanced, Placement
from expertwire.scheduler.plan import SAMPLING_DTYPE, CacheSpec, FinishReason, StepPlan, StepResult
from expertwire.scheduler.policy import Fcfs, Policy
from expertwire.scheduler.prefix_index import NOBODY
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import Request
from expertwire.scheduler.table import RunningTable

__all__ = ["Rejection", "Request", "Scheduler", "SchedulerConfig", "StepOutputs"]

SUPPORTED_KINDS = ("full", "latent", "index", "window")
MAX_IN_FLIGHT = 2  # steps: one that the ranks compute, and the next
_LOOK_AHEAD = 64  # waiting requests that are looked up together
_NO_ROWS = np.zeros(0, np.int64)


class _InFlight(NamedTuple):
    """A step that is planned and not committed: which requests its rows were, as rows are given to others meanwhile."""

    plan: StepPlan
    rows_S: np.ndarray
    key_S: np.ndarray


class Scheduler:
    """Schedules the requests of all ranks.

    The caller plans a step, hands the plan to the ranks, and commits their results, in the order of the plans; the next step may
    be planned before that. `submit`, `abort` and `fork` come at any time.

    `epoch`, stamped on every plan, is that of the placement of experts: whoever moves experts raises it.

    Raises:
        ValueError: there is no cache, or one of a kind that is not supported yet, or two of one name.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache_specs: tuple[CacheSpec, ...],
        policy: Policy | None = None,
        placement: Placement | None = None,
    ) -> None:
        _check_caches(cache_specs)
        self.config = config
        self.cache_specs = cache_specs
        self.epoch = 0
        self._policy = policy or Fcfs()
        self._placement = placement or Balanced()
        # An id outside the vocabulary, which some checkpoints name, is never sampled.
        self._eos_token_ids = tuple(token for token in config.eos_token_ids if 0 <= token < config.vocab_size)
        self._pool = BlockPool(len(cache_specs), config.num_ranks, config.num_blocks)
        self._prefixes = PrefixCache(self._pool, cache_specs, config)
        self._table = RunningTable(config, cache_specs, self._pool)
        self._queue = WaitingQueue()
        self._running: dict[int, Request] = {}
        self._forks: dict[int, int] = {}  # waiting request -> running one that it continues
        self._most_blocks = int(self._table.most_blocks_G.max())
        self._may_stop_V = np.zeros(config.vocab_size, bool)  # some request so far had this stop id
        self._ended: list[int] = []  # rows to release in the next plan
        self._in_flight: deque[_InFlight] = deque()
        self._pace = Pace()
        self._counts = {"prompt_tokens": 0, "cached_tokens": 0, "preemptions": 0}
        self._num_plans = 0
        self._no_admissions = self._admissions([])

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """No request is waiting or running, nothing is in flight, and the ranks' slots are released."""
        return not (self._queue or self._running or self._ended or self._in_flight)

    def unfinished(self) -> list[int]:
        """Keys of all requests that are waiting or running."""
        return [*(request.key for request in self._queue), *self._running]

    def submit(self, request: Request, now: float) -> Rejection | None:
        """Put a request into the queue, or say why not."""
        assert request.key not in self._running, f"key {request.key} is running already"
        if (reason := invalid(request, self.config, self._table.most_blocks_G)) is not None:
            return Rejection(request.key, "INVALID_ARGUMENT", reason)
        if (rejection := refusal(request, self.config, self._queue, self._pace, now)) is not None:
            return rejection
        request.arrival = now
        request.limit = token_limit(request, self.config)
        request.place = self._policy.place(request, now)
        self._table.name_prefixes(request)
        self._queue.add(request)
        return None

    def fork(self, key: int, children: Sequence[Request], now: float) -> list[Rejection]:
        """Let `children` go on from where the request `key` is now: its tokens so far are theirs, and so are its blocks, until
        one of them writes. A child has the prompt of `key`, counts its tokens so far as its own, and draws with its own seed and
        branch. One that finds no slot next to `key` waits as any other request.

        Returns:
            A rejection for each child that is not accepted.

        Raises:
            KeyError: `key` is neither waiting nor running.
        """
        if key in self._queue:
            tokens = self._queue.get(key).tokens
        elif key in self._running:
            row = self._row(self._running[key])
            tokens = self._table.tokens_NL[row, : self._table.num_known_N[row]].copy()
        else:
            raise KeyError(f"request {key} is neither waiting nor running")
        rejections = []
        for child in children:
            assert len(tokens) < token_limit(child, self.config), (
                f"fork of {key}: its {len(tokens)} tokens are the limit"
            )
            if (rejection := self.submit(child, now)) is not None:
                rejections.append(rejection)
                continue
            child.tokens = tokens
            self._table.name_prefixes(child)
            if key in self._running:
                self._forks[child.key] = key
        return rejections

    def abort(self, key: int) -> None:
        """Forget a request: no further output. Its slot and blocks are free from the next plan on. Unknown keys are ignored."""
        self._forks.pop(key, None)
        if (waiting := self._queue.discard(key)) is not None:
            self._policy.dropped(waiting)
        elif (request := self._running.get(key)) is not None:
            self._end(request)

    def plan(self, now: float, *, report_load: bool = False) -> StepPlan | None:
        """The next step; None if there is nothing to compute or release, unless the ranks shall report their load.

        Running requests come first: one token for each that needs no more, then the next chunk of a prompt. What is left of a
        rank's budget goes to new requests. A step may have no tokens: then it only releases slots.
        """
        assert len(self._in_flight) < MAX_IN_FLIGHT, f"step {self._in_flight[0].plan.step} is not committed"
        table = self._table
        released = self._release()
        rows, num, budget_P = self._want()
        rows, num, preempted = self._serve(rows, num)
        released = np.sort(np.concatenate((released, preempted)))
        admissions = self._choose(now, budget_P)
        if not (len(rows) or admissions or len(released) or report_load):
            return None
        new_rows = self._admit(admissions) if admissions else _NO_ROWS
        if admissions:
            rows = np.concatenate((rows, new_rows))
            num = np.concatenate((num, np.array([admission.num_scheduled for admission in admissions], np.int32)))
            order = np.argsort(rows)
            rows, num = rows[order], num[order]
        plan = self._build(report_load, released, [admission.request for admission in admissions], new_rows, rows, num)
        self._num_plans += 1
        self._in_flight.append(_InFlight(plan, rows, table.key_N[rows]))
        return plan

    def commit(self, plan: StepPlan, results: Sequence[StepResult], now: float) -> StepOutputs:
        """Take in every rank's result of `plan`, the first one in flight."""
        step = self._in_flight.popleft()
        assert plan is step.plan, f"step {plan.step} is not the first in flight, {step.plan.step} is"
        table = self._table
        results = sorted(results, key=lambda result: result.rank)
        origins = [(result.step, result.rank) for result in results]
        assert origins == [(plan.step, rank) for rank in range(self.config.num_ranks)], (
            f"step {plan.step}: got {origins}"
        )
        same = table.key_N[step.rows_S] == step.key_S
        same &= table.running_N[step.rows_S]
        going_N = np.zeros_like(table.running_N)
        going_N[step.rows_S[same]] = True
        table.in_flight_N[step.rows_S[same]] -= 1
        rows_O = table.rows_of_parts([result.slot_O for result in results])
        rows_R = table.rows_of_parts([result.prompt_slot for result in results])
        expected = step.rows_S[plan.sched_sample_S == 1]
        assert np.array_equal(np.sort(rows_O), expected), f"step {plan.step}: sampled {rows_O}, expected {expected}"
        rows_O, outputs = gather(plan.step, results, rows_O, rows_R, going_N, table)
        table.append_tokens(rows_O, outputs.token_O)
        table.name_blocks(np.sort(rows_O))
        outputs.finish_O[:] = self._finish(rows_O, outputs.token_O)
        return outputs

    def stats(self) -> dict[str, Any]:
        """Gauges as JSON values: lists have one entry a rank, caches go by name. Counters since the start: prompt tokens of the
        requests admitted, how many of them were in the prefix cache, and preemptions."""
        pool = self._pool
        return {
            "num_plans": self._num_plans,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "running": self._table.count_P(self._table.running_N).tolist(),
            "outstanding_tokens": self._table.outstanding_P().tolist(),
            "blocks": pool.capacity,
            "blocks_used": {spec.name: pool.num_used(group).tolist() for group, spec in enumerate(self.cache_specs)},
            **self._counts,
        }

    def check_integrity(self) -> None:
        """Assert that queue, table and pool agree. For tests, and for an idle engine."""
        self._pool.check_integrity()
        table = self._table
        table.check_integrity()
        rows = np.flatnonzero(table.running_N)
        keys = table.key_N[rows].tolist()
        assert sorted(keys) == sorted(self._running), (keys, list(self._running))
        assert not any(request.key in self._running for request in self._queue)
        ended = np.flatnonzero(table.occupied_N & ~table.running_N).tolist()
        assert ended == sorted(self._ended), (ended, self._ended)
        assert self._in_flight or not table.in_flight_N[rows].any(), "scheduled, but nothing in flight"
        assert all(child in self._queue and parent in self._running for child, parent in self._forks.items())

    # ---- planning: who goes, who goes on, who gives way, who comes

    def _release(self) -> np.ndarray:
        """Empty the rows of requests that have ended, or must give way and have nothing in flight any more: these rows."""
        table = self._table
        ended, self._ended = self._ended, []
        draining = np.flatnonzero(table.draining_N & table.running_N & (table.in_flight_N == 0))
        for request in [self._running[key] for key in table.key_N[draining].tolist()]:
            self._requeue(request)
        rows = np.sort(np.concatenate((np.array(ended, np.int64), draining)))
        if len(rows):
            table.release(rows)
        return rows

    def _want(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows to compute, i32 tokens for each, and the token budget that every rank has left."""
        table, config = self._table, self.config
        going_N = table.running_N & ~table.draining_N & (table.num_tokens_N < table.limit_N)
        rows = np.flatnonzero(going_N)
        want = table.num_tokens_N[rows] - table.num_computed_N[rows]
        assert (want > 0).all(), f"nothing to compute in rows {rows[want <= 0]}"
        single_P = np.bincount(table.rank_N[rows[want == 1]], minlength=config.num_ranks)
        budget_P = config.max_num_tokens - single_P
        if config.chunk_tokens is not None:
            budget_P = np.where(single_P > 0, np.minimum(budget_P, config.chunk_tokens), budget_P)
        for i in np.flatnonzero(want > 1):  # few: nothing is admitted behind a prompt that is cut
            rank = table.rank_N[rows[i]]
            want[i] = min(want[i], budget_P[rank])
            budget_P[rank] -= want[i]
        assert (budget_P >= 0).all(), f"over budget: {budget_P}"
        return rows[want > 0], want[want > 0], budget_P

    def _serve(self, rows: np.ndarray, num: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of the rows that get the blocks they need, their tokens, and the rows that were emptied for it.

        Where blocks are short, requests are preempted. One with a token in flight is let drain first, and its blocks come with
        the next plan.
        """
        table = self._table
        if any(window is not None for window in table.window_G):
            table.drop_blocks(rows)
        lacking_GR = table.lacking_GR(rows, table.num_computed_N[rows] + num)
        short_GP = preemption.shortage_GP(table, rows, lacking_GR)
        if not short_GP.any():
            return rows, num, _NO_ROWS
        victims = preemption.victims(table, short_GP)
        table.draining_N[victims] = True
        self._counts["preemptions"] += len(victims)
        emptied = self._release()
        stay = ~np.isin(rows, victims)
        rows, num, lacking_GR = rows[stay], num[stay], lacking_GR[:, stay]
        gets = preemption.served(table, rows, lacking_GR)
        return rows[gets], num[gets], emptied

    def _choose(self, now: float, budget_P: np.ndarray) -> list[Admission]:
        """Which waiting requests start now, and where, sorted by rank: in policy order, until one finds no room."""
        if not self._queue or not (budget_P > 0).any():
            return []
        table, config = self._table, self.config
        slots_P = min(config.max_running, config.max_num_tokens) - table.count_P(table.occupied_N)
        blocks_P = (self._pool.num_free_GP - table.promised_GP()).min(axis=0) - table.count_P(table.running_N)
        room = Room(self._placement, slots_P, budget_P, blocks_P, table.load_P(self._placement))
        if room.full:
            return []
        chosen = self._continue_forks(room) if self._forks else []
        forked = {admission.request.key for admission in chosen}
        queue = (request for request in self._policy.order(self._queue, self._num_cached) if request.key not in forked)
        arriving = set(table.names_next().tolist())
        going_on = True
        while going_on and (batch := list(islice(queue, _LOOK_AHEAD))):
            found, going_on = self._find_places(batch, room, arriving)
            chosen += found
        self._pace.admitted(len(chosen), now)
        chosen.sort(key=lambda admission: admission.rank)
        return chosen

    def _find_places(self, requests: list[Request], room: Room, arriving: set[int]) -> tuple[list[Admission], bool]:
        """Admit these requests, in this order, but for those whose next block is being computed: these do better to wait for it.

        Returns:
            The admissions, and whether every request found room.
        """
        size, everyone = self.config.block_size, True
        taken: list[tuple[Request, int, int]] = []
        hopeful = []  # places in `taken`
        for request, guess in zip(requests, self._prefixes.guess(requests), strict=True):
            if guess.following in arriving:
                continue
            num_blocks = min(self.config.blocks_for(len(request.tokens)), self._most_blocks)
            rank = room.choose(num_blocks, guess.rank, guess.num_blocks * size)
            if rank is None and guess.rank >= 0:  # there is room, perhaps, beside what it shares
                cached = self._prefixes.find([request], [guess.rank])[0]
                left = self.config.blocks_for(len(request.tokens) - cached.num_tokens)
                num_blocks = min(left, self._most_blocks) + self._prefixes.num_taken(cached, guess.rank)
                rank = guess.rank if room.fits(guess.rank, num_blocks) else None
            if rank is None:
                everyone = False
                break
            num_scheduled = room.take(request, rank, num_blocks, guess.num_blocks * size if rank == guess.rank else 0)
            if guess.rank != NOBODY:
                hopeful.append(len(taken))
            taken.append((request, rank, num_scheduled))
            if guess.following is not None:
                arriving.add(guess.following)
        cached_A = [self._prefixes.nothing] * len(taken)
        if hopeful:
            found = self._prefixes.find([taken[i][0] for i in hopeful], [taken[i][1] for i in hopeful])
            for i, cached in zip(hopeful, found, strict=True):
                cached_A[i] = cached
        admissions = [
            Admission(request, rank, min(num_scheduled, len(request.tokens) - cached.num_tokens), *cached)
            for (request, rank, num_scheduled), cached in zip(taken, cached_A, strict=True)
        ]
        return admissions, everyone

    def _continue_forks(self, room: Room) -> list[Admission]:
        """Forks that start beside the request that they continue, with its blocks; those without room there wait as any other."""
        table, chosen = self._table, []
        for child_key, parent_key in self._forks.items():
            child, parent = self._queue.get(child_key), self._running[parent_key]
            row = self._row(parent)
            num_cached = min(int(table.num_computed_N[row]), len(child.tokens) - 1)
            num_held = self.config.blocks_for(num_cached)
            needed = self.config.blocks_for(len(child.tokens)) - num_held + 2  # both may have to copy the last block
            first_G = table.num_dropped_GN[:, row]
            holds_all = num_cached and (first_G <= table.first_seen_G(num_cached)).all()
            if holds_all and not table.draining_N[row] and room.fits(parent.rank, needed):
                blocks_G = [table.block_ids_GNB[g, row, first:num_held] for g, first in enumerate(first_G)]
                num_scheduled = room.take(child, parent.rank, needed, num_cached)
                chosen.append(Admission(child, parent.rank, num_scheduled, num_cached, blocks_G))
                table.shares_tail_N[row] = True
        self._forks.clear()
        return chosen

    def _num_cached(self, request: Request) -> int:
        return self._prefixes.guess([request])[0].num_blocks * self.config.block_size

    def _admit(self, admissions: list[Admission]) -> np.ndarray:
        """Move requests from the queue to slots: their rows, ascending."""
        for admission in admissions:
            request = admission.request
            request.rank = admission.rank
            if request.num_cached < 0:
                request.num_cached = min(admission.num_cached, len(request.prompt))
                self._counts["prompt_tokens"] += len(request.prompt)
                self._counts["cached_tokens"] += request.num_cached
            if request.stop_ids:
                self._may_stop_V[list(request.stop_ids)] = True
            self._running[request.key] = self._queue.pop(request.key)
            self._policy.admitted(request)
        return self._table.admit(admissions)

    def _build(
        self,
        report_load: bool,
        released: np.ndarray,
        requests: list[Request],
        new_rows: np.ndarray,
        rows: np.ndarray,
        num: np.ndarray,
    ) -> StepPlan:
        """The plan that releases and admits these and computes `num` tokens of each of `rows`."""
        table = self._table
        start = table.num_computed_N[rows]
        copies = table.unshare_tails(rows)
        table.append_blocks(rows, start + num)
        block_row, block_cache, block_index, block_id = table.take_new_blocks()
        sample = start + num == table.num_tokens_N[rows]
        table.advance(rows, num, sample)
        table.name_blocks(rows)
        sched_offsets_P1 = table.offsets_P1(rows)
        return StepPlan(
            epoch=self.epoch,
            step=self._num_plans,
            report_load=int(report_load),
            num_tokens_P=np.diff(ragged.offsets(num)[sched_offsets_P1]),
            release_offsets_P1=table.offsets_P1(released),
            release_slot=table.slot_N[released],
            admit_offsets_P1=table.offsets_P1(new_rows),
            admit_slot_A=table.slot_N[new_rows],
            **(self._admissions(requests) if requests else self._no_admissions),
            block_offsets_P1=table.offsets_P1(block_row),
            block_slot_B=table.slot_N[block_row],
            block_cache_B=block_cache,
            block_index_B=block_index,
            block_id_B=block_id,
            copy_offsets_P1=ragged.starts(copies.rank, self.config.num_ranks),
            copy_cache_C=copies.cache,
            copy_from_C=copies.source,
            copy_to_C=copies.target,
            sched_offsets_P1=sched_offsets_P1,
            sched_slot_S=table.slot_N[rows],
            sched_start_S=start,
            sched_num_S=num,
            sched_sample_S=sample.astype(np.uint8),
        )

    def _admissions(self, requests: list[Request]) -> dict[str, np.ndarray]:
        """What a plan says about new requests, besides their slots."""
        tokens, token_offsets = ragged.pack([request.tokens for request in requests], np.int32)
        bans, ban_offsets = ragged.pack([request.bans(self._eos_token_ids) for request in requests], np.int32)
        biases = [request.params.logit_bias or {} for request in requests]
        bias_ids, bias_offsets = ragged.pack([list(bias) for bias in biases], np.int32)
        bias_values, _ = ragged.pack([list(bias.values()) for bias in biases], np.float32)
        return {
            "admit_sampling_A": np.array([r.sampling(self.config.vocab_size) for r in requests], SAMPLING_DTYPE),
            "admit_token_offsets_A1": token_offsets,
            "admit_tokens": tokens,
            "admit_ban_offsets_A1": ban_offsets,
            "admit_bans": bans,
            "admit_bias_offsets_A1": bias_offsets,
            "admit_bias_ids": bias_ids,
            "admit_bias_values": bias_values,
        }

    # ---- names, ends and returns

    def _finish(self, rows_O: np.ndarray, token_O: np.ndarray) -> np.ndarray:
        """End the requests that are complete with these tokens: u8 [O], finish reasons."""
        table = self._table
        num_known_O = table.num_known_N[rows_O]
        stop_O = np.zeros(len(rows_O), bool)
        for token in self._eos_token_ids:
            stop_O |= token_O == token
        stop_O &= table.eos_stops_N[rows_O]
        for i in np.flatnonzero(table.has_stop_ids_N[rows_O] & self._may_stop_V[token_O]):
            stop_O[i] |= int(token_O[i]) in self._running[int(table.key_N[rows_O[i]])].stop_ids
        stop_O &= num_known_O >= table.stop_from_N[rows_O]
        finish_O = np.where(num_known_O >= table.limit_N[rows_O], FinishReason.LENGTH, FinishReason.NONE)
        finish_O = np.where(stop_O, FinishReason.STOP, finish_O).astype(np.uint8)
        for key in table.key_N[rows_O[finish_O != FinishReason.NONE]].tolist():
            self._end(self._running[key])
        return finish_O

    def _end(self, request: Request) -> None:
        """Stop running a request; the next plan releases its slot."""
        row = self._leave(request)
        self._table.running_N[row] = False
        self._ended.append(row)

    def _requeue(self, request: Request) -> None:
        """Put a preempted request, whose row is about to be released, back to its place in the queue, with its output so far."""
        row, table = self._leave(request), self._table
        num_known = int(table.num_known_N[row])
        request.tokens = table.tokens_NL[row, :num_known].copy()
        table.copy_names(row, request)
        request.rank = request.slot = -1
        self._queue.add(request)

    def _leave(self, request: Request) -> int:
        """Take a request out of the running ones: the row that it had."""
        del self._running[request.key]
        row = self._row(request)
        self._forks = {child: parent for child, parent in self._forks.items() if parent != request.key}
        return row

    def _row(self, request: Request) -> int:
        return int(self._table.bounds_P1[request.rank]) + request.slot


def _check_caches(cache_specs: tuple[CacheSpec, ...]) -> None:
    names = [spec.name for spec in cache_specs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"cache_specs must have at least one cache, each with a name of its own, got {names}")
    for spec in cache_specs:
        if spec.kind not in SUPPORTED_KINDS:
            raise ValueError(
                f"cache {spec.name!r} is of kind {spec.kind!r}; the scheduler supports these kinds: {', '.join(SUPPORTED_KINDS)}"
            )
        if spec.kind == "window" and (spec.window is None or spec.window < 1):
            raise ValueError(
                f"cache {spec.name!r} is of kind 'window'; window must be an integer >= 1, got {spec.window!r}"
            )
