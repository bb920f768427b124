"""The one brain: which request computes how many tokens on which rank, step by step.

A request has `num_tokens` known tokens, of which `num_computed` are in the caches; a step schedules the next ones. Prefill,
chunks of it and decode differ only in how many tokens are not computed yet. After the last known token a rank samples the next
one and keeps it, so plans carry no sampled tokens.

Everything is a function of the calls made, their `now` included: the same calls give the same plans, byte by byte.

Where the rest will go: prefix hits raise `num_computed` at admission, preemption is one more way out of the running table
(`_end` without an answer, and back to the queue with the tokens known so far), priorities are policies, and overlap lets
`plan` count the tokens in flight as computed instead of insisting on the commit.

Shape letters: P ranks, A admitted requests, S scheduled requests, O sampled tokens, V vocabulary. `rows` are rows
of the running table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.intake import Rejection, invalid, token_limit, worst_case_blocks
from expertwire.scheduler.outputs import StepOutputs, gather
from expertwire.scheduler.placement import place
from expertwire.scheduler.plan import SAMPLING_DTYPE, CacheSpec, FinishReason, StepPlan, StepResult
from expertwire.scheduler.policy import Fcfs, Policy
from expertwire.scheduler.request import Request
from expertwire.scheduler.table import RunningTable

__all__ = ["Rejection", "Request", "Scheduler", "SchedulerConfig", "StepOutputs"]

SUPPORTED_KINDS = ("full",)
_NO_ROWS = np.zeros(0, np.int64)


class _Admission(NamedTuple):
    rank: int
    num_blocks: int  # reserved in each cache
    num_scheduled: int
    request: Request


class Scheduler:
    """Schedules the requests of all ranks. The caller alternates `plan` and `commit`; `submit` and `abort` come at any time.

    `epoch`, stamped on every plan, is that of the placement of experts: whoever moves experts raises it.

    Raises:
        ValueError: there is no cache, or one of a kind that is not supported yet, or two of one name.
    """

    def __init__(
        self, config: SchedulerConfig, cache_specs: tuple[CacheSpec, ...], policy: Policy | None = None
    ) -> None:
        _check_caches(cache_specs)
        self.config = config
        self.cache_specs = cache_specs
        self.epoch = 0
        self._policy = policy or Fcfs()
        # An id outside the vocabulary, which some checkpoints name, is never sampled.
        self._eos_token_ids = tuple(token for token in config.eos_token_ids if 0 <= token < config.vocab_size)
        self._pool = BlockPool(len(cache_specs), config.num_ranks, config.num_blocks)
        self._table = RunningTable(config, len(cache_specs))
        self._waiting: dict[int, Request] = {}  # by key, in order of submission
        self._running: dict[int, Request] = {}
        self._may_stop_V = np.zeros(config.vocab_size, bool)  # some request so far had this stop id
        self._ended: list[int] = []  # rows to release in the next plan
        self._in_flight: StepPlan | None = None
        self._num_plans = 0
        self._no_admissions = self._admissions([])

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        """No request is waiting or running, nothing is in flight, and the ranks' slots are released."""
        return not (self._waiting or self._running or self._ended or self._in_flight)

    def unfinished(self) -> list[int]:
        """Keys of all requests that are waiting or running."""
        return [*self._waiting, *self._running]

    def submit(self, request: Request, now: float) -> Rejection | None:
        """Put a request into the queue, or say why not."""
        assert request.key not in self._waiting, f"key {request.key} is waiting already"
        assert request.key not in self._running, f"key {request.key} is running already"
        if (reason := invalid(request, self.config)) is not None:
            return Rejection(request.key, "INVALID_ARGUMENT", reason)
        if len(self._waiting) >= self.config.max_waiting:
            reason = f"{len(self._waiting)} requests are waiting; allowed are max_waiting = {self.config.max_waiting}: try later"
            return Rejection(request.key, "RESOURCE_EXHAUSTED", reason)
        request.arrival = now
        request.limit = token_limit(request, self.config)
        self._waiting[request.key] = request
        return None

    def abort(self, key: int) -> None:
        """Forget a request: no further output. Its slot and blocks are free from the next plan on. Unknown keys are ignored."""
        if self._waiting.pop(key, None) is None and (request := self._running.get(key)) is not None:
            self._end(request)

    def plan(self, now: float, *, report_load: bool = False) -> StepPlan | None:
        """The next step; None if there is nothing to compute or release, unless the ranks shall report their load.

        Running requests come first: one token for each that needs no more, then the next chunk of a prompt. What is left of a
        rank's budget goes to new requests. A step may have no tokens: then it only releases slots.
        """
        assert self._in_flight is None, f"step {self._num_plans - 1} is not committed"
        released = _NO_ROWS
        if self._ended:
            released = np.sort(np.array(self._ended, np.int64))
            self._ended.clear()
            self._table.release(released, self._pool)
        rows, num, budget_P = self._schedule_running()
        requests, new_rows, new_num = self._admit(self._choose(now, budget_P))
        if not (len(rows) or requests or len(released) or report_load):
            return None
        if requests:
            rows, num = np.concatenate([rows, new_rows]), np.concatenate([num, new_num])
            order = np.argsort(rows)
            rows, num = rows[order], num[order]
        self._table.num_scheduled_N[rows] = num
        self._in_flight = self._build(report_load, released, requests, new_rows, rows, num)
        self._num_plans += 1
        return self._in_flight

    def commit(self, plan: StepPlan, results: Sequence[StepResult], now: float) -> StepOutputs:
        """Take in every rank's result of `plan`. Nothing reads `now` yet; it is there for policies that count time served."""
        assert plan is self._in_flight, f"step {plan.step} is not the one in flight"
        self._in_flight = None
        table = self._table
        rows_S = table.rows_of(plan.sched_offsets_P1, plan.sched_slot_S)
        table.num_computed_N[rows_S] += plan.sched_num_S
        table.num_scheduled_N[rows_S] = 0
        results = sorted(results, key=lambda result: result.rank)
        origins = [(result.step, result.rank) for result in results]
        assert origins == [(plan.step, rank) for rank in range(self.config.num_ranks)], (
            f"step {plan.step}: got {origins}"
        )
        rows_O = table.rows_of_parts([result.slot_O for result in results])
        expected = rows_S[plan.sched_sample_S == 1]
        assert np.array_equal(np.sort(rows_O), expected), f"step {plan.step}: sampled {rows_O}, expected {expected}"
        rows_O, outputs = gather(plan.step, results, rows_O, table)
        outputs.finish_O[:] = self._append_tokens(rows_O, outputs.token_O)
        return outputs

    def stats(self) -> dict[str, Any]:
        """Gauges as JSON values: lists have one entry a rank, caches go by name."""
        names = [spec.name for spec in self.cache_specs]
        pool = self._pool
        return {
            "num_plans": self._num_plans,
            "num_running": self.num_running,
            "num_waiting": self.num_waiting,
            "running": np.bincount(self._table.rank_N[self._table.running_N], minlength=self.config.num_ranks).tolist(),
            "outstanding_tokens": self._table.outstanding_P().tolist(),
            "blocks": pool.capacity,
            "blocks_used": {name: pool.num_used(group).tolist() for group, name in enumerate(names)},
            "blocks_reserved": {name: pool.reserved_GP[group].tolist() for group, name in enumerate(names)},
        }

    def check_integrity(self) -> None:
        """Assert that queue, table and pool agree. For tests, and for an idle engine."""
        self._pool.check_integrity()
        self._table.check_integrity(self._pool)
        rows = np.flatnonzero(self._table.running_N)
        keys = self._table.key_N[rows].tolist()
        assert sorted(keys) == sorted(self._running), (keys, list(self._running))
        assert not self._running.keys() & self._waiting.keys()
        ended = np.flatnonzero(self._table.occupied_N & ~self._table.running_N).tolist()
        assert ended == sorted(self._ended), (ended, self._ended)
        assert self._in_flight is not None or not self._table.num_scheduled_N.any(), "scheduled, but nothing in flight"

    def _schedule_running(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows to compute, i32 tokens for each, and the token budget that every rank has left."""
        table = self._table
        rows = np.flatnonzero(table.running_N)
        want = table.num_tokens_N[rows] - table.num_computed_N[rows]
        assert (want > 0).all(), f"nothing to compute in rows {rows[want <= 0]}"
        single_P = np.bincount(table.rank_N[rows[want == 1]], minlength=self.config.num_ranks)
        budget_P = self.config.max_num_tokens - single_P
        for i in np.flatnonzero(want > 1):  # at most one a rank: nothing is admitted behind a prompt that is cut
            rank = table.rank_N[rows[i]]
            want[i] = min(want[i], budget_P[rank])
            budget_P[rank] -= want[i]
        assert (budget_P >= 0).all(), f"over budget: {budget_P}"
        return rows[want > 0], want[want > 0], budget_P

    def _choose(self, now: float, budget_P: np.ndarray) -> list[_Admission]:
        """Which waiting requests start now, and where: in policy order, until one finds no room."""
        chosen: list[_Admission] = []
        if not self._waiting:
            return chosen
        free_P = self.config.max_running - self._table.occupied_P()
        room_P = (free_P > 0) & (budget_P > 0)
        blocks_P = self._pool.unreserved_P()
        load_P = self._table.outstanding_P()
        for request in self._policy.order(self._waiting.values(), now):
            num_blocks = worst_case_blocks(request.limit, self.config)
            rank = place(room_P & (blocks_P >= num_blocks), load_P)
            if rank is None:
                break
            count = min(len(request.prompt), int(budget_P[rank]))
            chosen.append(_Admission(rank, num_blocks, count, request))
            budget_P[rank] -= count
            free_P[rank] -= 1
            room_P[rank] = free_P[rank] > 0 and budget_P[rank] > 0
            blocks_P[rank] -= num_blocks
            load_P[rank] += request.limit
        return chosen

    def _admit(self, chosen: list[_Admission]) -> tuple[list[Request], np.ndarray, np.ndarray]:
        """Move requests from the queue to slots: the requests, their rows (ascending), i32 tokens to compute for each."""
        if not chosen:
            return [], _NO_ROWS, _NO_ROWS
        chosen.sort(key=lambda admission: admission.rank)
        for rank, *_, request in chosen:
            request.rank = rank
            if request.stop_ids:
                self._may_stop_V[list(request.stop_ids)] = True
            self._running[request.key] = self._waiting.pop(request.key)
        ranks, num_blocks, counts, requests = zip(*chosen, strict=True)
        self._pool.reserve(np.array(ranks), np.array(num_blocks))
        rows = self._table.admit(requests, np.array(num_blocks))
        return list(requests), rows, np.array(counts, np.int32)

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
        block_row, block_cache, block_index, block_id = table.append_blocks(rows, start + num, self._pool)
        sched_offsets_P1 = table.offsets_P1(rows)
        computed_1 = ragged.offsets(num)
        return StepPlan(
            epoch=self.epoch,
            step=self._num_plans,
            report_load=int(report_load),
            num_tokens_P=np.diff(computed_1[sched_offsets_P1]),
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
            sched_offsets_P1=sched_offsets_P1,
            sched_slot_S=table.slot_N[rows],
            sched_start_S=start,
            sched_num_S=num,
            sched_sample_S=(start + num == table.num_tokens_N[rows]).astype(np.uint8),
        )

    def _admissions(self, requests: list[Request]) -> dict[str, np.ndarray]:
        """What a plan says about new requests, besides their slots."""
        tokens, token_offsets = ragged.pack([request.prompt for request in requests], np.int32)
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

    def _append_tokens(self, rows_O: np.ndarray, token_O: np.ndarray) -> np.ndarray:
        """Count the sampled tokens and end the requests that are complete: u8 [O], finish reasons."""
        table = self._table
        table.num_tokens_N[rows_O] += 1
        num_tokens_O = table.num_tokens_N[rows_O]
        stop_O = np.zeros(len(rows_O), bool)
        for token in self._eos_token_ids:
            stop_O |= token_O == token
        stop_O &= table.eos_stops_N[rows_O]
        for i in np.flatnonzero(table.has_stop_ids_N[rows_O] & self._may_stop_V[token_O]):
            stop_O[i] |= int(token_O[i]) in self._running[int(table.key_N[rows_O[i]])].stop_ids
        stop_O &= num_tokens_O >= table.stop_from_N[rows_O]
        finish_O = np.where(num_tokens_O >= table.limit_N[rows_O], FinishReason.LENGTH, FinishReason.NONE)
        finish_O = np.where(stop_O, FinishReason.STOP, finish_O).astype(np.uint8)
        for key in table.key_N[rows_O[finish_O != FinishReason.NONE]]:
            self._end(self._running[int(key)])
        return finish_O

    def _end(self, request: Request) -> None:
        """Stop running a request; the next plan releases its slot."""
        row = int(self._table.bounds_P1[request.rank]) + request.slot
        self._table.running_N[row] = False
        self._ended.append(row)
        del self._running[request.key]


def _check_caches(cache_specs: tuple[CacheSpec, ...]) -> None:
    names = [spec.name for spec in cache_specs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"cache_specs must have at least one cache, each with a name of its own, got {names}")
    for spec in cache_specs:
        if spec.kind not in SUPPORTED_KINDS:
            raise ValueError(
                f"cache {spec.name!r} is of kind {spec.kind!r}; the scheduler supports these kinds: {', '.join(SUPPORTED_KINDS)}"
            )
