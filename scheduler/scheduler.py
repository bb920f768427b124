"""The one brain: which request computes how many tokens on which rank, step by step.

A request has known tokens, of which a part is computed, in the caches; a step schedules the next ones. Prefill, chunks of it,
decode and coming back after preemption differ only in how many tokens are not computed yet. After the last token a rank samples
the next one and keeps it, so plans carry no sampled tokens, and a step can be planned while the one before it runs.

Everything is a function of the calls made, their `now` included: the same calls give the same plans, byte by byte.

The rest of the house: `request`, `intake` (which requests can be served at all), `queue` and `policy` (who is next), `prefix`,
`caches`, `block_pool` and `admission` (blocks, and which prefixes the ranks have), `admitter` (who starts), `placement` (which
rank), `table` (what runs), `preemption` (who gives way), `plan` (what ranks are told and answer), `outputs` (what the answers
say), and `block_loops`, `row_loops`, `step_loops` and `admission_loops` (what of all this is compiled).

Shape letters: P ranks, A admitted requests, S scheduled requests, O sampled tokens, N rows of the running table, V vocabulary.
`rows` are rows of the running table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from expertwire.scheduler import caches, preemption, ragged
from expertwire.scheduler._compiled.steps import ASK, Scheduled
from expertwire.scheduler.admitter import Admitter
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.intake import Pace, bound, invalid, refusal, token_limit
from expertwire.scheduler.outputs import gather
from expertwire.scheduler.plan import CacheSpec, ExpertMoves, FinishReason, Rejection, StepOutputs, StepPlan, StepResult
from expertwire.scheduler.policy import Fcfs, Policy
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.rank_placement import Balanced, Placement
from expertwire.scheduler.request import Request, describe, introduction
from expertwire.scheduler.running import NO_ADMISSIONS, Admissions, Copies, RunningTable

__all__ = ["Rejection", "Request", "Scheduler", "SchedulerConfig", "StepOutputs"]

MAX_IN_FLIGHT = 2  # steps: one that the ranks compute, and the next
_NO_ROWS = np.zeros(0, np.int64)


class _InFlight(NamedTuple):
    """A step that is planned and not committed."""

    plan: StepPlan
    scheduled: Scheduled


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
        caches.check(cache_specs, config)
        self.config = config
        self.cache_specs = cache_specs
        self.epoch = 0
        self._policy = policy or Fcfs()
        # An id outside the vocabulary, which some checkpoints name, is never sampled.
        self._eos_token_ids = tuple(token for token in config.eos_token_ids if 0 <= token < config.vocab_size)
        self._eos_ids = np.array(self._eos_token_ids, np.int64)
        self._pool = BlockPool(caches.capacities(cache_specs, config), config.num_ranks)
        self._table = RunningTable(config, cache_specs, self._pool)
        self._bound = bound(self._table.caches, self._pool.capacity_G)
        self._queue = WaitingQueue()
        self._admitter = Admitter(self._table, self._queue, self._policy, placement or Balanced())
        self._running: dict[int, Request] = {}
        self._may_stop_V = np.zeros(config.vocab_size, bool)  # some request so far had this stop id
        self._ended: list[int] = []  # rows to release in the next plan
        self._in_flight: deque[_InFlight] = deque()
        self._pace = Pace()
        self._counts = {"prompt_tokens": 0, "cached_tokens": 0, "preemptions": 0}
        self._num_plans = 0
        no_facts, no_tokens = NO_ADMISSIONS.fact_A, ragged.pack([], np.int32)
        self._no_introduction = introduction([], no_facts, *no_tokens, self._eos_token_ids)

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
        request.limit = token_limit(request, self.config)
        if (reason := invalid(request, self.config, self._table.caches, self._bound)) is not None:
            return Rejection(request.key, "INVALID_ARGUMENT", reason)
        if not self._queue:
            self._pace.nobody_waits()
        if (rejection := refusal(request, self.config, self._queue, self._pace, now)) is not None:
            return rejection
        if self._table.names is not None:
            request.names = self._table.names.name(request.tokens, request.tenant, request.salt)
        request.arrival = now
        request.place = self._policy.place(request, now)
        self._wait(request)
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
            row = self._running[key].row
            tokens = self._table.tokens(row, self._running[key])
        else:
            raise KeyError(f"request {key} is neither waiting nor running")
        rejections = []
        for child in children:
            assert len(tokens) < token_limit(child, self.config), (
                f"fork of {key}: its {len(tokens)} tokens are the limit"
            )
            child.tokens = tokens
            if (rejection := self.submit(child, now)) is not None:
                rejections.append(rejection)
            elif key in self._running:
                self._admitter.forks[child.key] = row
        return rejections

    def abort(self, key: int) -> None:
        """Forget a request: no further output. Its slot and blocks are free from the next plan on. Unknown keys are ignored."""
        self._admitter.forks.pop(key, None)
        if (waiting := self._queue.discard(key)) is not None:
            self._policy.dropped(waiting)
        elif (request := self._running.get(key)) is not None:
            self._end(np.array([request.row]))

    def plan(self, now: float, *, report_load: bool = False, moves: ExpertMoves | None = None) -> StepPlan | None:
        """The next step; None if there is nothing to compute or release, unless the ranks shall report load or move experts.

        Running requests come first: one token for each that needs no more, then the next chunk of a prompt. What is left of a
        rank's budget goes to new requests. A step may have no tokens: then it only releases slots.
        """
        assert len(self._in_flight) < MAX_IN_FLIGHT, f"step {self._in_flight[0].plan.step} is not committed"
        table = self._table
        released = self._release()
        rows, num, budget_P, lacking_GP = table.want()
        rows, num, preempted = self._serve(rows, num, lacking_GP)
        if len(preempted):
            released = np.sort(np.concatenate((released, preempted)))
        admissions = self._admitter.choose(budget_P)
        self._pace.admitted(len(admissions.requests), now)
        if not (len(rows) or admissions.requests or len(released) or report_load or moves):
            return None
        new_rows, new = _NO_ROWS, self._no_introduction
        if admissions.requests:
            new_rows, new = self._admit(admissions)
        copies = table.unshare_tails(new_rows[admissions.parent_A >= 0])
        num_lacking = int(lacking_GP.sum())
        step = table.schedule(self._num_plans, rows, num, num_lacking, new_rows, admissions.num_scheduled_A)
        plan = self._build(report_load, released, new_rows, new, copies, step)
        if moves is not None:
            plan = plan.moving(moves)
        self._num_plans += 1
        self._in_flight.append(_InFlight(plan, step))
        return plan

    def commit(self, plan: StepPlan, results: Sequence[StepResult], now: float) -> StepOutputs:
        """Take in every rank's result of `plan`, the first one in flight."""
        step = self._in_flight.popleft()
        assert plan is step.plan, f"step {plan.step} is not the first in flight, {step.plan.step} is"
        results = sorted(results, key=attrgetter("rank"))
        got = [(result.step, result.rank) for result in results]
        assert got == [*zip(repeat(plan.step), range(self.config.num_ranks))], f"step {plan.step}: got {got}"
        rows_O, outputs = gather(step.scheduled, results, self._table, self._eos_ids, self._may_stop_V)
        self._finish(rows_O, outputs)
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
            "blocks": dict(zip((spec.name for spec in self.cache_specs), pool.capacity_G.tolist(), strict=True)),
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
        assert all(child in self._queue and table.running_N[row] for child, row in self._admitter.forks.items())

    # ---- planning: who goes, who goes on, who gives way, who comes

    def _release(self) -> np.ndarray:
        """Empty the rows of requests that have ended, or must give way and have nothing in flight any more: these rows."""
        table = self._table
        ended, self._ended = self._ended, []
        if table.draining_N.any():
            draining = np.flatnonzero(table.draining_N & table.running_N)
            draining = draining[table.in_flight_N[draining] == 0]
            for row, request in zip(draining.tolist(), self._leave(draining), strict=True):
                self._requeue(row, request)
            ended += draining.tolist()
        rows = np.array(sorted(ended), np.int64)
        if len(rows):
            table.release(rows)
        return rows

    def _serve(
        self, rows: np.ndarray, num: np.ndarray, lacking_GP: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of the rows that get the blocks they need, their tokens, and the rows that were emptied for it. `lacking_GP`:
        blocks that each rank lacks for them.

        Where blocks are short, requests are preempted. One with a token in flight is let drain first, and its blocks come with
        the next plan.
        """
        table = self._table
        table.drop_blocks(rows)
        if (lacking_GP <= self._pool.num_free_GP).all():
            return rows, num, _NO_ROWS
        victims = preemption.victims(table, np.maximum(lacking_GP - self._pool.num_free_GP, 0))
        table.draining_N[victims] = True
        self._counts["preemptions"] += len(victims)
        emptied = self._release()
        stay = ~np.isin(rows, victims)
        rows, num = rows[stay], num[stay]
        gets = preemption.served(table, rows, table.lacking(rows, num))
        return rows[gets], num[gets], emptied

    def _admit(self, admissions: Admissions) -> tuple[np.ndarray, dict[str, Any]]:
        """Move requests from the queue to slots: their rows, ascending, and what the plan says about them."""
        requests, fact_A = admissions.requests, admissions.fact_A
        self._queue.remove(requests)
        first_A = fact_A["num_cached"] < 0  # others come back after preemption
        cached_A = np.minimum(admissions.num_cached_A, fact_A["prompt_len"])
        self._counts["prompt_tokens"] += int(fact_A["prompt_len"][first_A].sum())
        self._counts["cached_tokens"] += int(cached_A[first_A].sum())
        fact_A["num_cached"][first_A] = cached_A[first_A]
        tokens = np.concatenate([request.tokens for request in requests])
        token_offsets_A1 = ragged.offsets(fact_A["num_tokens"])
        rows = self._table.admit(admissions, tokens, token_offsets_A1)
        self._running.update(zip(fact_A["key"].tolist(), requests, strict=True))
        for i in np.flatnonzero(fact_A["has_stop_ids"]):
            self._may_stop_V[list(requests[i].stop_ids)] = True
        for request, row in zip(requests, rows.tolist(), strict=True):
            request.row, request.names, request.facts = row, None, b""  # the table has them now
            self._policy.admitted(request)
        return rows, introduction(requests, fact_A, tokens, token_offsets_A1, self._eos_token_ids)

    def _build(
        self,
        report_load: bool,
        released: np.ndarray,
        new_rows: np.ndarray,
        new: dict[str, Any],
        copies: Copies,
        step: Scheduled,
    ) -> StepPlan:
        """The plan that releases and admits these, of which `new` tells, and then computes."""
        table = self._table
        return StepPlan(
            epoch=self.epoch,
            step=self._num_plans,
            report_load=int(report_load),
            num_tokens_P=np.diff(step.tokens_P1),
            release_offsets_P1=table.offsets_P1(released),
            release_slot=table.slot_N[released],
            admit_offsets_P1=table.offsets_P1(new_rows),
            admit_slot_A=table.slot_N[new_rows],
            **new,
            block_offsets_P1=step.block_offsets_P1,
            **dict(zip(("block_slot_B", "block_cache_B", "block_index_B", "block_id_B"), step.block_4B, strict=True)),
            copy_offsets_P1=ragged.starts(copies.rank, self.config.num_ranks),
            copy_cache_C=copies.cache,
            copy_from_C=copies.source,
            copy_to_C=copies.target,
            sched_offsets_P1=step.offsets_P1,
            sched_slot_S=step.slot_S,
            sched_start_S=step.start_S,
            sched_num_S=step.num_S,
            sched_sample_S=step.sample_S,
        )

    # ---- names, ends and returns

    def _finish(self, rows_O: np.ndarray, outputs: StepOutputs) -> None:
        """End the requests that are complete with these outputs, and say so there."""
        table, finish_O = self._table, outputs.finish_O
        for i in np.flatnonzero(finish_O == ASK):
            row = rows_O[i]
            if int(outputs.token_O[i]) in self._running[int(table.key_N[row])].stop_ids:
                finish_O[i] = FinishReason.STOP
            else:
                finish_O[i] = FinishReason.LENGTH if table.num_known_N[row] >= table.limit_N[row] else FinishReason.NONE
        self._end(rows_O[np.flatnonzero(finish_O)])

    def _end(self, rows: np.ndarray) -> None:
        """Stop running these rows' requests; the next plan releases their slots."""
        self._leave(rows)
        self._table.running_N[rows] = False
        self._ended += rows.tolist()

    def _requeue(self, row: int, request: Request) -> None:
        """Put a preempted request, whose row is about to be released, back to its place in the queue, with its output so far."""
        table = self._table
        request.tokens = table.tokens(row, request)
        table.copy_names(row, request)
        request.row, request.num_cached = -1, int(table.num_cached_N[row])
        request.num_counted = max(request.num_counted, int(table.num_computed_N[row]))
        self._wait(request)

    def _wait(self, request: Request) -> None:
        """Put it into the queue, with its facts at hand."""
        self._queue.add(request)
        request.facts = describe(request, self.config.vocab_size)

    def _leave(self, rows: np.ndarray) -> list[Request]:
        """Take the requests of these rows out of the running ones."""
        self._admitter.parents_left(rows)
        return [self._running.pop(key) for key in self._table.key_N[rows].tolist()]
