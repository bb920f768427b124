"""The real scheduler on simulated ranks: no model, no processes, a simulated clock.

`SimulatedRanks` answer a plan for all ranks at once; `Simulation` moves the clock by a model of
step times and plays the clients of a trace. Everything is a function of the arguments; only
`host_s` is measured.

P ranks, Z slots of all ranks, S scheduled requests, O sampled tokens, A
admitted requests.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from expertwire.bench.scheduler.log import Recorder
from expertwire.bench.scheduler.traces import Arrival, Poisson
from expertwire.scheduler.config import CacheSpec, SchedulerConfig
from expertwire.scheduler.load_balancing import LoadBalancing
from expertwire.scheduler.outputs import FinishReason, StepOutputs
from expertwire.scheduler.plan import StepPlan, StepResult, to_offsets
from expertwire.scheduler.policy import Policy, make_policy
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

CACHES = (CacheSpec(name="kv", kind="full", bytes_per_token=98304, writers=(0,), readers=(0,)),)
EOS = 0
LEFT = 255  # instead of a `FinishReason`: the client has

_ROW = np.dtype(
    [
        ("submitted", np.float64),
        ("first", np.float64),  # token
        ("last", np.float64),
        ("count", np.int32),  # of tokens
        ("finish", np.uint8),  # FinishReason, or `LEFT`
        ("rejected", np.bool_),
    ]
)


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """A step's duration: the slowest rank's base_s + token_s * tokens + kv_token_s * context tokens read.

    The defaults are fitted to the sums of kernel times of Qwen3-30B-A3B in BF16 on one H200
    (aiconfigurator's tables, as summed in the project's notes on performance): 16.9, 20.2 and 25.6
    ms at 64, 128 and 256 decodes of context 1,024, where they give 18.1, 20.3 and 24.6 ms. `base_s`
    is the reading of all experts' weights (60.4 GB at 4.3 TB/s is 14 ms) and what else does not
    grow; `token_s` is the slope of prefill; `kv_token_s` is 98 kB at 4.3 TB/s. Below some 64 tokens
    a step, where not all experts are read, they are too slow; an all-to-all is not in them.
    """

    base_s: float = 16e-3
    token_s: float = 10e-6
    kv_token_s: float = 23e-9

    def seconds_P(self, tokens_P: np.ndarray, context_P: np.ndarray) -> np.ndarray:
        return self.base_s + self.token_s * tokens_P + self.kv_token_s * context_P


@dataclass(frozen=True, kw_only=True)
class Load:
    """A step's load of each rank, f64 [P].

    Prefill (or recomputed) tokens, decode tokens, cached tokens read; and the most tokens of one request.
    """

    prefill_P: np.ndarray
    decode_P: np.ndarray
    context_P: np.ndarray
    largest: int


class SimulatedRanks:
    """Simulates all ranks. An output is a hash of the request's key, and ends with `EOS`.

    Attributes:
        cached: by key, the tokens of the prompt that were in the prefix cache when the request was
        first admitted.
        preemptions: admissions of requests that had been admitted before.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        assert config.eos_token_ids == (EOS,), config.eos_token_ids
        self.cached: dict[int, int] = {}
        self.preemptions = 0
        self._vocab_size = config.vocab_size
        num_rows = config.num_ranks * config.max_num_seqs
        self._first_row_P = np.arange(config.num_ranks) * config.max_num_seqs
        self._key_Z = np.zeros(num_rows, np.int64)
        self._prompt_len_Z = np.zeros(num_rows, np.int32)
        self._output_len = np.zeros(1024, np.int32)  # by key

    def expect(self, key: int, output_len: int) -> None:
        """Set after how many tokens the output of request `key` ends, which must also be its seed; 0: never."""
        if key >= len(self._output_len):
            self._output_len = np.concatenate([self._output_len, np.zeros(key, np.int32)])
        self._output_len[key] = output_len

    def tokens(self, key_O: np.ndarray, index_O: np.ndarray) -> np.ndarray:
        """Return token number `index_O` of each request's output, i32 [O]: splitmix64's mixer."""
        mixed = key_O.astype(np.uint64) << np.uint64(32) | index_O.astype(np.uint64)
        mixed += np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        token_O = (1 + (mixed >> np.uint64(33)) % np.uint64(self._vocab_size - 1)).astype(np.int32)
        token_O[index_O == self._output_len[key_O] - 1] = EOS
        return token_O

    def run(self, plan: StepPlan) -> tuple[list[StepResult], Load]:
        """Apply the plan."""
        row_A = np.repeat(self._first_row_P, np.diff(plan.admit_offsets_P1)) + plan.admit_slot_A
        self._key_Z[row_A] = plan.admit_sampling_A["seed"]
        self._prompt_len_Z[row_A] = plan.admit_sampling_A["prompt_len"]
        counts_P = np.diff(plan.sched_offsets_P1)
        rank_S = np.repeat(np.arange(len(counts_P)), counts_P)
        row_S = self._first_row_P[rank_S] + plan.sched_slot_S
        self._note_admissions(row_A, row_S, plan.sched_start_S)
        end_S = plan.sched_start_S + plan.sched_num_S
        decode_S = plan.sched_start_S >= self._prompt_len_Z[row_S]
        tokens_P = np.bincount(rank_S, plan.sched_num_S, len(counts_P))
        decode_P = np.bincount(rank_S, plan.sched_num_S * decode_S, len(counts_P))
        load = Load(
            prefill_P=tokens_P - decode_P,
            decode_P=decode_P,
            context_P=np.bincount(rank_S, end_S, len(counts_P)),
            largest=int(plan.sched_num_S.max(initial=0)),
        )
        sampled = np.flatnonzero(plan.sched_sample_S)
        rows = row_S[sampled]
        token_O = self.tokens(self._key_Z[rows], end_S[sampled] - self._prompt_len_Z[rows])
        bounds = to_offsets(np.bincount(rank_S[sampled], minlength=len(counts_P))).tolist()
        slot_O = plan.sched_slot_S[sampled]
        results = [
            StepResult.sampled(step=plan.step, rank=rank, slot_O=slot_O[begin:end], token_O=token_O[begin:end])
            for rank, (begin, end) in enumerate(itertools.pairwise(bounds))
        ]
        return results, load

    def _note_admissions(self, row_A: np.ndarray, row_S: np.ndarray, start_S: np.ndarray) -> None:
        start_Z = np.full(len(self._key_Z), -1, np.int32)
        start_Z[row_S] = start_S
        for key, start in zip(self._key_Z[row_A].tolist(), start_Z[row_A].tolist(), strict=True):
            assert start >= 0, f"request {key} is admitted, but not scheduled"
            if key in self.cached:
                self.preemptions += 1
            else:
                self.cached[key] = start


@dataclass
class Outcome:
    """Record of a simulation. Lists have one entry a step that computed tokens; arrays in them one entry a rank."""

    arrivals: list[Arrival] = field(default_factory=list)  # by key
    rows: np.ndarray = field(default_factory=lambda: np.zeros(1024, _ROW))  # by key
    start: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rank_s: list[np.ndarray] = field(default_factory=list)
    prefill: list[np.ndarray] = field(default_factory=list)  # tokens
    decode: list[np.ndarray] = field(default_factory=list)  # tokens
    largest: list[int] = field(default_factory=list)  # tokens of one request
    blocks: list[np.ndarray] = field(default_factory=list)  # in use
    host_s: float = 0.0  # processor time in the scheduler

    def busy(self) -> np.ndarray:
        """Return the share of each step's time in which a rank computes and does not wait: f64 [steps, P]."""
        some = np.add(self.prefill, self.decode) > 0
        return np.where(some, np.array(self.rank_s) / np.array(self.seconds)[:, None], 0.0)

    @property
    def served(self) -> np.ndarray:
        """Rows of all requests."""
        return self.rows[: len(self.arrivals)]


@dataclass(frozen=True, kw_only=True)
class _Flight:
    """A step that the ranks are computing."""

    plan: StepPlan
    results: list[StepResult]
    start: float
    end: float


class Simulation:
    """One run of a trace. `outcome` and `ranks` (what they counted) are there when `run` returns.

    Args:
        trace: the requests.
        config: of the scheduler.
        model: duration of a step.
        overlap: plan the next step while one runs.
        host_time: add the scheduler's measured processor time to the simulated clock.
        record: a file for the log of all calls; only with the default load balancing.
        balancing: data-parallel load balancing; None: the scheduler's default.
    """

    def __init__(
        self,
        trace: Poisson,
        config: SchedulerConfig,
        *,
        model: StepModel,
        overlap: bool,
        host_time: bool = False,
        policy: str | Policy,
        record: Path | None = None,
        balancing: LoadBalancing | None = None,
    ) -> None:
        assert record is None or balancing is None, "a log does not record the load balancing"
        self.scheduler = Scheduler(
            config, CACHES, make_policy(policy) if isinstance(policy, str) else policy, balancing
        )
        self.ranks = SimulatedRanks(config)
        self.outcome = Outcome()
        self._calls: Scheduler | Recorder = self.scheduler
        if record is not None:
            assert isinstance(policy, str), "a log records a policy by its name"
            self._calls = Recorder(self.scheduler, record, policy)
        self.overlap = overlap
        self._trace, self._model, self._host_time = trace, model, host_time
        self._now = 0.0
        self._host_s = 0.0  # since it last entered the clock
        self._events: list[
            tuple[float, int, Arrival | int]
        ] = []  # a heap: when, tie break, an arrival or a key to abort
        self._num_events = 0
        for arrival in trace.arrivals():
            self._expect(arrival.time, arrival)

    def run(self, until: float = math.inf) -> Outcome:
        """Serve everything, or as much as there is time for."""
        flight: _Flight | None = None
        while self._now < until:
            if flight is not None and not self.overlap:
                self._commit(flight)
                flight = None
            self._take_in()
            plan = self._plan()
            waited = flight is None
            if flight is not None:
                self._commit(flight)
                flight = None
            if plan is not None:
                flight = self._start(plan)
            elif waited and not self._events:
                break
            elif waited:  # nothing to do until somebody comes or goes
                self._now = max(self._now, self._events[0][0])
        self._spend_host_time()
        assert self.scheduler.idle or self._now >= until, (
            f"nothing more will come, and nothing is planned: {self.scheduler.stats()}"
        )
        if isinstance(self._calls, Recorder):
            self._calls.close()
        return self.outcome

    def _expect(self, when: float, what: Arrival | int) -> None:
        heapq.heappush(self._events, (when, self._num_events, what))
        self._num_events += 1

    def _take_in(self) -> None:
        """Submit and abort what is due."""
        while self._events and self._events[0][0] <= self._now:
            _, _, what = heapq.heappop(self._events)
            if isinstance(what, Arrival):
                self._submit(what)
            elif not self.outcome.rows["finish"][what]:
                self.outcome.rows["finish"][what] = LEFT
                self._calls.abort(what)

    def _submit(self, arrival: Arrival) -> None:
        outcome = self.outcome
        key = len(outcome.arrivals)
        outcome.arrivals.append(arrival)
        if key == len(outcome.rows):
            outcome.rows = np.concatenate([outcome.rows, np.zeros_like(outcome.rows)])
        self.ranks.expect(key, arrival.output_len if arrival.output_len < arrival.max_tokens else 0)
        request = Request(
            key=key,
            prompt=arrival.prompt,
            params=SamplingParams(max_tokens=arrival.max_tokens),
            seed=key,
            tenant=arrival.tenant,
            priority=arrival.priority,
        )
        begin = _cpu_s()
        rejection = self._calls.submit(request, self._now)
        self._host_s += _cpu_s() - begin
        outcome.rows["submitted"][key] = self._now
        outcome.rows["rejected"][key] = rejection is not None
        if rejection is None and arrival.abort_at is not None:
            self._expect(arrival.abort_at, key)

    def _plan(self) -> StepPlan | None:
        begin = _cpu_s()
        plan = self._calls.plan(self._now)
        self._host_s += _cpu_s() - begin
        return plan

    def _start(self, plan: StepPlan) -> _Flight:
        """Start a step on the ranks."""
        if not self.overlap:
            self._now += self._spend_host_time()
        outcome = self.outcome
        results, load = self.ranks.run(plan)
        rank_s = self._model.seconds_P(load.prefill_P + load.decode_P, load.context_P)
        seconds = float(rank_s.max()) if plan.num_tokens_P.any() else 0.0
        if seconds:
            outcome.start.append(self._now)
            outcome.seconds.append(seconds)
            outcome.rank_s.append(rank_s)
            outcome.prefill.append(load.prefill_P)
            outcome.decode.append(load.decode_P)
            outcome.largest.append(load.largest)
            used = self.scheduler.stats()["blocks_used"]
            outcome.blocks.append(np.sum(list(used.values()), axis=0))
        return _Flight(plan=plan, results=results, start=self._now, end=self._now + seconds)

    def _commit(self, flight: _Flight) -> None:
        """End the step: move the clock and commit the results."""
        self._now = flight.end
        if self.overlap:
            self._now = max(flight.end, flight.start + self._spend_host_time())
        begin = _cpu_s()
        outputs = self._calls.commit(flight.plan, flight.results, self._now)
        self._host_s += _cpu_s() - begin
        self._deliver(outputs)

    def _spend_host_time(self) -> float:
        """Return how far the clock moves for the scheduler's work since the last call."""
        host_s, self._host_s = self._host_s, 0.0
        self.outcome.host_s += host_s
        return host_s if self._host_time else 0.0

    def _deliver(self, outputs: StepOutputs) -> None:
        """Deliver tokens to their clients, and check that each comes exactly once and in order."""
        rows, key_O = self.outcome.rows, outputs.key_O
        expected = self.ranks.tokens(key_O, rows["count"][key_O])
        assert np.array_equal(outputs.token_O, expected), f"step {outputs.step}: a token is lost, repeated or misplaced"
        assert not rows["finish"][key_O].any(), f"step {outputs.step}: a request is answered after its end"
        rows["first"][key_O[rows["count"][key_O] == 0]] = self._now
        rows["last"][key_O] = self._now
        rows["count"][key_O] += 1
        rows["finish"][key_O] = outputs.finish_O
        for key in key_O[outputs.finish_O != FinishReason.NONE].tolist():
            answer = self.ranks.tokens(np.full(rows["count"][key], key), np.arange(rows["count"][key]))
            following = self._trace.follow_up(self.outcome.arrivals[key], answer, self._now)
            if following is not None:
                self._expect(following.time, following)


def _cpu_s() -> float:
    return time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
