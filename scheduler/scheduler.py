"""The scheduler of all ranks: which request computes how many tokens on which rank, step by step.

A request has known tokens, some of which are computed, in the KV caches; a step schedules the next
ones. Prefill, chunked prefill, decode and recomputation after preemption differ only in how many
tokens are not computed yet. After the last known token a rank samples the next one and keeps it, so
plans carry no sampled tokens, and a step can be planned while the one before runs.

Everything is a function of the calls made, their `now` included: the same calls give the same
plans, byte by byte.

Modules: `request` and `limits` (whether it can be served), `queue` and `policy` (the order), `admission`
(which requests start), `load_balancing` (on which rank), `running` (what runs), `preemption` (who gives up its blocks),
`block_pool`, `prefix_cache` and `block_copies`, `plan` (messages to and from the ranks) and `plan_building`, `outputs`,
`completion` (which requests end), and `_compiled` (loops over all of these).

P ranks, A admitted requests, S scheduled requests, O sampled tokens, V vocabulary, C KV cache
groups, B blocks added to block tables, Z slots of all ranks. `rows` are rows of the running batch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from expertwire.scheduler._compiled.blocks import LEADER
from expertwire.scheduler._compiled.steps import MAY_PAUSE, MAY_STOP, StepSchedule
from expertwire.scheduler.admission import Admission
from expertwire.scheduler.block_copies import TailCopies
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.completion import Completion
from expertwire.scheduler.config import CacheSpec, SchedulerConfig, check_cache_specs
from expertwire.scheduler.groups import WaitingGroups
from expertwire.scheduler.lifecycle import Lifecycle
from expertwire.scheduler.limits import capacity, token_limit, why_invalid
from expertwire.scheduler.load_balancing import LeastLoaded, LoadBalancing
from expertwire.scheduler.outputs import Rejection, StepOutputs
from expertwire.scheduler.pauses import Pauses
from expertwire.scheduler.plan import ExpertMoves, StepPlan, StepResult, to_offsets
from expertwire.scheduler.plan_building import build_plan, plan_fields
from expertwire.scheduler.policy import FairShare, Fcfs, Policy
from expertwire.scheduler.preemption import Preemption
from expertwire.scheduler.queue import AdmissionRate, WaitingQueue, reject
from expertwire.scheduler.request import NO_HASHES, Request
from expertwire.scheduler.running import NO_ADMISSIONS, Admissions, RunningBatch
from expertwire.scheduler.sharing import Sharing
from expertwire.scheduler.tenants import TenantAccounts

MAX_IN_FLIGHT = 2  # steps: one that the ranks compute, and the next
_NO_ROWS = np.zeros(0, np.int64)
_NO_TOKENS = np.zeros(0, np.int32)


class _InFlight(NamedTuple):
    """A step that is planned and not committed."""

    plan: StepPlan
    schedule: StepSchedule


class Scheduler:
    """Schedules the requests of all ranks.

    The caller plans a step, sends the plan to the ranks, and commits their results, in the order of
    the plans; the next step may be planned before that. `submit`, `grant`, `resume` and `abort` may be
    called at any time.

    A request that has used up its credit is *held*: it has no slot, no blocks and no place in the
    queue. With more credit it returns to its place; what it has computed is found in the prefix
    cache, unless it was evicted.

    A request that has sampled one of its `pause_ids` is *paused*: it keeps its slot and blocks, and is not
    scheduled until `resume`. What the step in flight has sampled for it by then is kept back until then. Where others
    wait, or need its blocks, it loses both after `PATIENCE_S`, and comes back as after a preemption.

    Where the model has an original context (`SchedulerConfig.original_max_position_embeddings`), a
    request is *long* or short from its submission on. One without `max_tokens` that outgrows that context
    returns to its place in the queue and is computed again, as a long one.

    `epoch`, stamped on every plan, is that of the placement of experts; whoever moves experts
    increments it.

    Raises:
        ValueError: there is no cache, two have one name, or one's kind or sizes are not supported.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache_specs: tuple[CacheSpec, ...],
        policy: Policy | None = None,
        balancing: LoadBalancing | None = None,
    ) -> None:
        check_cache_specs(cache_specs, config)
        self.config = config
        self.cache_specs = cache_specs
        self.epoch = 0
        self._policy = policy or Fcfs()
        # Some checkpoints name ids outside the vocabulary, which are never sampled.
        self._eos_token_ids = tuple(token for token in config.eos_token_ids if 0 <= token < config.vocab_size)
        weighs_C = [spec.kind == "state" for spec in cache_specs]
        self._pool = BlockPool(config.num_usable_blocks(len(cache_specs)), config.num_ranks, weighs_C)
        self._batch = RunningBatch(config, cache_specs, self._pool)
        self._copies = TailCopies(self._batch)
        self._capacity = capacity(self._batch.caches, self._pool.num_blocks_C)
        self._queue = WaitingQueue()
        self._tenants = tenants = TenantAccounts(config.tenant_quotas, config.default_tenant_quota)
        balancing = balancing or LeastLoaded()
        groups = WaitingGroups(config.num_ranks)
        self._admission = Admission(
            self._batch, self._copies, self._queue, self._policy, balancing, groups, quotas_hold=tenants.quotas_hold
        )
        self._lifecycle = Lifecycle(config, self._batch, self._queue, groups, tenants, self._admission)
        self._groups, self._running, self._held = groups, self._lifecycle.running, self._lifecycle.held
        self._pauses = Pauses(self._batch, self._lifecycle, tenants)
        self._preemption = Preemption(self._batch, self._lifecycle)
        self._sharing: Sharing | None = None
        if isinstance(self._policy, FairShare):
            self._sharing = Sharing(self._policy, self._batch, self._running, self._preemption.suspend_now)
            self._preemption.shares = self._sharing.share_Z
            self._admission.make_room = self._sharing.make_room
        # The ids at which requests so far stop or pause: `MAY_STOP` and `MAY_PAUSE`.
        self._special_V = np.zeros(config.vocab_size, np.uint8)
        eos_ids = np.array(self._eos_token_ids, np.int64)
        self._completion = Completion(self._batch, self._lifecycle, self._pauses, eos_ids, self._special_V)
        self._in_flight: deque[_InFlight] = deque()
        self._rate = AdmissionRate()
        self._counts = {"prompt_tokens": 0, "cached_tokens": 0}
        self._num_plans = 0
        no_tokens, no_offsets = np.zeros(0, np.int32), np.zeros(1, np.int32)
        self._no_admissions = plan_fields([], NO_ADMISSIONS.record_A, no_tokens, no_offsets, self._eos_token_ids)

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + len(self._groups)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """There is nothing to do: no request waits or runs, unless it is held or paused, nothing is in flight, and the ranks'
        slots are released."""
        if self._queue or self._lifecycle.has_ended or self._in_flight:
            return False
        return not self._running or len(self._running) == np.count_nonzero(self._batch.paused_Z)

    def unfinished(self) -> list[int]:
        """Return the keys of all requests that are waiting, running or held."""
        return self._lifecycle.unfinished()

    def submit(self, request: Request, now: float) -> Rejection | None:
        """Queue a request, or return why it is rejected."""
        return self.submit_group((request,), now)

    def submit_group(self, requests: Sequence[Request], now: float, parent: int | None = None) -> Rejection | None:
        """Queue branches of one request as a group, or return why they are rejected, all of them.

        What all of them have is computed once, see `groups`.

        Args:
            requests: the branches, which differ in `key`, `branch` and what they report only.
            parent: key of a request whose blocks they share as far as their tokens are the same, if it runs; else they wait
                like any other request. It does not matter if there is none of this key.
        """
        request = requests[0]
        for each in requests:
            assert self._lifecycle.find(each.key) is None, f"key {each.key} is in use"
            each.limit = token_limit(each, self.config)
        if (reason := why_invalid(request, self.config, self._batch.caches, self._capacity)) is not None:
            return Rejection(request.key, "INVALID_ARGUMENT", reason)
        if not self._queue:
            self._rate.reset()
        if (account := self._tenants.find(request.tenant, now)) is None:
            message = "too many tenants that no quota names have requests: try later"
            return Rejection(request.key, "RESOURCE_EXHAUSTED", message)
        request.account = account
        rejection = reject(
            request, self.config, self._queue, self._rate, self._policy.num_ahead, now, self._groups, len(requests)
        ) or self._tenants.accept(request, now, len(requests))
        if rejection is not None:
            account.num_refused += rejection.code == "RESOURCE_EXHAUSTED"
            return rejection
        self._lifecycle.classify(request)
        request.arrival = now
        request.place = self._policy.place(request, now)
        if request.credit is not None:
            request.credit_limit = len(request.tokens) + request.credit
        for each in requests[1:]:
            each.account, each.arrival, each.place = account, now, request.place
            each.is_long, each.outgrows_at = request.is_long, request.outgrows_at
            each.block_hashes, each.credit_limit = request.block_hashes, request.credit_limit
        self._lifecycle.lead(requests)
        running = None if parent is None else self._running.get(parent)
        if running is not None and request.key in self._queue:
            self._admission.add_fork(request, running, self._batch.tokens(running.row, running))
        return None

    def grant(self, key: int, num_tokens: int) -> None:
        """Let a request sample `num_tokens` more output tokens than before. Unknown keys are ignored.

        A held request is admitted again as after a preemption, so it is better to grant many tokens at once.
        """
        if (request := self._lifecycle.find(key)) is None or request.credit is None:
            return
        request.credit_limit += num_tokens
        if key in self._running:
            self._batch.limit_Z[request.row] = request.next_limit
            self._batch.suspends_Z[request.row] = request.suspends
        elif self._held.pop(key, None) is not None:
            self._lifecycle.enqueue(request)
        else:
            request.record = request.pack(self.config.vocab_size)

    def resume(self, key: int) -> StepOutputs | None:
        """Let a paused request go on; others and unknown keys are ignored.

        Returns:
            The token that was kept back, if there is one. It may end or pause the request.
        """
        return self._pauses.resume(key)

    def abort(self, key: int) -> None:
        """Forget a request: no further output. The next plan frees its slot and blocks. Unknown keys are ignored."""
        self._admission.forks.pop(key, None)
        self._pauses.forget(key)
        if (request := self._running.get(key)) is not None:
            self._lifecycle.close(np.array([request.row]))
        elif (
            request := self._groups.discard(key) or self._queue.discard(key) or self._held.pop(key, None)
        ) is not None:
            self._tenants.ended(request, len(request.tokens) if request.has_run else 0)
            self._lifecycle.lead_others(key)

    def plan(self, now: float, *, report_load: bool = False, moves: ExpertMoves | None = None) -> StepPlan | None:
        """Return the next step, or None if there is nothing to compute, release, report or move.

        Running requests come first: every decode, then the next chunks of prefills. What is left of
        a rank's token budget goes to new requests. A step may have no tokens: then it only releases
        slots.
        """
        assert len(self._in_flight) < MAX_IN_FLIGHT, f"step {self._in_flight[0].plan.step} is not committed"
        batch = self._batch
        if self._queue and batch.paused_Z.any():
            self._pauses.end_patience(now)
        released = self._lifecycle.release()
        share = self._sharing
        rows, num, tokens_P, missing_CP = batch.select() if share is None else share.select(self._queue.num_of)
        rows, num, preempted = self._preemption.serve(rows, num, missing_CP)
        admissions, rows, num, suspended = self._choose(rows, num, tokens_P)
        if len(preempted) or len(suspended):
            released = np.sort(np.concatenate((released, preempted, suspended)))
        if self._groups:
            admissions = self._admission.with_followers(admissions, rows, num)
        self._rate.admitted(len(admissions.requests), now)
        if not (len(rows) or admissions.requests or len(released) or report_load or moves):
            return None
        copies = self._copies.due()
        new_rows, new = _NO_ROWS, self._no_admissions
        if admissions.requests:
            new_rows, new = self._admit(admissions)
        copies = copies.joined(self._copies.unshare(new_rows[admissions.parent_A >= 0]))
        leaders = new_rows
        if self._groups and (admissions.requests or self._admission.complete):
            leaders = self._start_followers(admissions, new_rows)
        num_missing = int(missing_CP.sum())
        step = batch.schedule(self._num_plans, rows, num, num_missing, new_rows, admissions.num_scheduled_A, leaders)
        self._copies.follow(new_rows, leaders)
        if share is not None and self._queue:
            share.charge(np.append(rows, new_rows), np.append(num, admissions.num_scheduled_A))
        plan = build_plan(
            batch,
            step,
            number=self._num_plans,
            epoch=self.epoch,
            report_load=report_load,
            released=released,
            new_rows=new_rows,
            leaders=leaders,
            new=new,
            copies=copies,
        )
        if moves is not None:
            plan = plan.with_moves(moves)
        self._num_plans += 1
        self._in_flight.append(_InFlight(plan, step))
        return plan

    def commit(self, plan: StepPlan, results: Sequence[StepResult], now: float) -> StepOutputs:
        """Process every rank's result of `plan`, the first step in flight."""
        step = self._in_flight.popleft()
        assert plan is step.plan, f"step {plan.step} is not the first in flight, {step.plan.step} is"
        results = sorted(results, key=attrgetter("rank"))
        got = [(result.step, result.rank) for result in results]
        assert got == [*zip(repeat(plan.step), range(self.config.num_ranks))], f"step {plan.step}: got {got}"
        return self._completion.take_in(step.schedule, results, now)

    def stats(self) -> dict[str, Any]:
        """Return gauges as JSON values: lists have one entry a rank, caches go by name.

        `held` is the number of requests that have used up their credit, or were paused and have lost their slot; `paused`
        that of paused requests with a slot.

        Counters since the start: prompt tokens of the admitted requests, how many of them were in
        the prefix cache, preemptions, cached blocks that were evicted, and requests that ended because
        their logits were not finite.
        `tenants` has both, see `TenantAccounts.stats`; `tenants_forgotten` counts those that have left it.
        """
        batch = self._batch
        return {
            "num_plans": self._num_plans,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "held": len(self._held),
            "paused": int(np.count_nonzero(batch.paused_Z)),
            "running": batch.sum_P(np.array(1)).tolist(),
            "outstanding_tokens": batch.sum_P(batch.limit_Z - batch.num_computed_Z).tolist(),
            **self._pool.stats([spec.name for spec in self.cache_specs]),
            "tenants": self._tenants.stats(),
            "tenants_forgotten": self._tenants.num_forgotten,
            **self._counts,
            "preemptions": self._preemption.num,
            "non_finite": self._completion.num_failed,
        }

    def flush_cache(self) -> dict[str, int]:
        """Forget the cached prefixes that no request uses; return the number of their blocks on all ranks, by cache."""
        return {spec.name: self._pool.flush(cache) for cache, spec in enumerate(self.cache_specs)}

    def check_integrity(self) -> None:
        """Assert that queue, batch and pool agree. For tests, and for an idle engine."""
        self._pool.check_integrity()
        batch = self._batch
        batch.check_integrity()
        self._lifecycle.check_integrity()
        self._pauses.check_integrity()
        in_flight = batch.in_flight_Z[np.flatnonzero(batch.running_Z)]
        assert self._in_flight or not in_flight.any(), "scheduled, but nothing in flight"
        self._tenants.check_integrity(self._running.values(), batch.tenant_Z, len(self.unfinished()))
        assert all(child in self._queue and batch.running_Z[row] for child, (row, _) in self._admission.forks.items())

    def _choose(
        self, rows: np.ndarray, num: np.ndarray, tokens_P: np.ndarray
    ) -> tuple[Admissions, np.ndarray, np.ndarray, np.ndarray]:
        """Choose the requests that start; return them, the rows that are still computed and their tokens, and those suspended."""
        if self._sharing is None:
            return self._admission.choose(tokens_P), rows, num, _NO_ROWS
        held = self._sharing.hold_back(rows, num, tokens_P)
        admissions = self._admission.choose(tokens_P)
        rows, num = self._sharing.give_back(held, rows, tokens_P)
        return admissions, rows, num, self._lifecycle.take_suspended()

    def _admit(self, admissions: Admissions) -> tuple[np.ndarray, dict[str, Any]]:
        """Move requests from the queue to slots; return their rows, ascending, and the plan's fields about them."""
        requests, record_A = admissions.requests, admissions.record_A
        follows_A = admissions.parent_A == LEADER
        self._queue.remove(list(itertools.compress(requests, ~follows_A)) if follows_A.any() else requests)
        first_A = record_A["num_cached"] < 0  # others come back after preemption
        cached_A = np.minimum(admissions.num_cached_A, record_A["prompt_len"])
        self._counts["prompt_tokens"] += int(record_A["prompt_len"][first_A].sum())
        self._counts["cached_tokens"] += int(cached_A[first_A].sum())
        record_A["num_cached"][first_A] = cached_A[first_A]
        tokens = np.concatenate([request.tokens for request in requests])
        token_offsets_A1 = to_offsets(record_A["num_tokens"])
        rows = self._batch.admit(admissions, tokens, token_offsets_A1)
        self._running.update(zip(record_A["key"].tolist(), requests, strict=True))
        for i in np.flatnonzero(record_A["has_stop_ids"]):
            self._special_V[list(requests[i].stop_ids)] |= MAY_STOP
        for i in np.flatnonzero(record_A["has_pause_ids"]):
            self._special_V[requests[i].pause_ids] |= MAY_PAUSE
        for request, row in zip(requests, rows.tolist(), strict=True):
            request.row, request.block_hashes, request.record = row, NO_HASHES, b""  # the batch has them now
            request.account.num_running += 1
        self._batch.tenant_Z[rows] = [request.account.index for request in requests]
        if follows_A.any():  # ranks have the tokens of leaders
            own = itertools.compress(requests, ~follows_A)
            tokens = np.concatenate([_NO_TOKENS, *(request.tokens for request in own)])
            token_offsets_A1 = to_offsets(np.where(follows_A, 0, record_A["num_tokens"]))
        return rows, plan_fields(requests, record_A, tokens, token_offsets_A1, self._eos_token_ids)

    def _start_followers(self, admissions: Admissions, new_rows: np.ndarray) -> np.ndarray:
        """Take the followers that start from their groups; return the row of each new row's leader, its own where it has none.

        Those for which there is no slot or no block are a group of their own from now on, and wait.
        """
        leaders, groups = new_rows.copy(), self._groups
        for key, num_started in self._admission.complete.items():
            followers = groups.cut(key, 0)
            rows = [follower.row for follower in followers[:num_started]]
            leaders[np.searchsorted(new_rows, rows)] = self._running[key].row
            self._lifecycle.lead(followers[num_started:])
        for request in admissions.requests:
            if request.key in groups:
                self._lifecycle.lead(groups.cut(request.key, groups.num_reserved(request.key)))
        return leaders
