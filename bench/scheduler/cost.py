"""Processor time of the scheduler a step, in its steady state.

The load: every slot is taken, some 1.1 % of the requests end each step and are replaced at once.
Prompts have 256 tokens, every second one shares its first half with others; one in twenty has
4,096, which are computed in chunks beside the decodes. Time is the measuring thread's on a
processor (CLOCK_THREAD_CPUTIME_ID, whose granularity is measured and reported), the wall's beside
it. It covers, in parts:

    arrivals    making the `Request`s (not their `SamplingParams`) and `submit`
    plan        `plan`: releases, matching, blocks, the plan
    serialise   `to_arrays` and `pack`, as the controller sends a plan
    commit      `commit`: tokens, hashing, ends
    unpack      of the ranks' answers; beside the total, as it belongs to the control channel
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from typing import Any

import numpy as np

from expertwire.bench.scheduler.simulation import CACHES, EOS, SimulatedRanks
from expertwire.comm.control.channel import pack, unpack
from expertwire.engine.controller import collect_when_idle
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import StepPlan, StepResult
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.scheduler import Scheduler

PARTS = ("arrivals", "plan", "serialise", "commit", "unpack")
_VOCAB = 32000
_PROMPT, _LONG_PROMPT, _LONG_SHARE, _SHARED = 256, 4096, 0.05, 128
_OUTPUT = (48, 132)  # uniform, so that a request lives for 90 steps and some of prefill
FULL = 0.97  # of the slots; some always wait for a prompt that is computed in chunks
WARM_UP = 300


class Asked:
    """Draws the load's requests: prompt, i32 [length], and output length."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._shared = self._generator.integers(1, _VOCAB, (8, _SHARED), dtype=np.int32)

    def draw(self, *, running_already: bool = False) -> tuple[np.ndarray, int]:
        """Draw one request; with `running_already`, cut its output as if it had been running for some time."""
        generator = self._generator
        length = _LONG_PROMPT if generator.random() < _LONG_SHARE else _PROMPT
        prompt = generator.integers(1, _VOCAB, length, dtype=np.int32)
        if generator.random() < 0.5:
            prompt[:_SHARED] = self._shared[generator.integers(len(self._shared))]
        output_len = int(generator.integers(*_OUTPUT, endpoint=True))
        return prompt, int(generator.integers(1, output_len, endpoint=True)) if running_already else output_len


class Stopwatch:
    """Processor and wall time of the parts of steps, in ns."""

    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[int, int]]] = []
        self._last = (0, 0)

    def begin(self) -> None:
        self.steps.append({})

    def start(self) -> None:
        self._last = _now()

    def stop(self, part: str) -> None:
        now = _now()
        self.steps[-1][part] = now[0] - self._last[0], now[1] - self._last[1]

    def part(self, name: str, clock: int = 0) -> np.ndarray:
        """Return µs of each step, on the processor (0) or the wall (1)."""
        return np.array([step.get(name, (0, 0))[clock] for step in self.steps]) * 1e-3

    def total(self, clock: int = 0) -> np.ndarray:
        return sum((self.part(name, clock) for name in PARTS[:-1]), np.zeros(len(self.steps)))


class Ours:
    """Our scheduler with `running` slots on each rank, under the load."""

    def __init__(
        self, num_ranks: int, running: int, *, max_num_batched_tokens: int = 2048, overlap: bool = True
    ) -> None:
        blocks_per_request = 40  # the mean is 30: 5 % long prompts of 256 blocks and others of 20
        self.config = SchedulerConfig(
            num_ranks=num_ranks,
            max_num_seqs=running,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=8192,
            block_size=16,
            num_blocks=max(blocks_per_request * running, 2048),
            max_queued_requests=num_ranks * running + 1,
            eos_token_ids=(EOS,),
            vocab_size=_VOCAB,
        )
        self.scheduler = Scheduler(self.config, CACHES)
        self.ranks = SimulatedRanks(self.config)
        self.slots = num_ranks * running
        self._asked = Asked(0)
        self._num_requests = 0
        self._overlap = overlap
        self._flight: tuple[StepPlan, list[bytes]] | None = None
        self.clear()
        self._missing = self.slots

    def clear(self) -> None:
        """Forget the measurements."""
        self.watch = Stopwatch()
        self.scheduled: list[int] = []  # requests, of each step; and so on
        self.plan_bytes: list[int] = []
        self.ended: list[int] = []
        self.in_slots: list[int] = []
        self.with_chunks: list[bool] = []

    def fill(self) -> None:
        """Run until all slots are taken, and `WARM_UP` more steps."""
        self.step(running_already=True)
        while self.in_slots[-1] < FULL * self.slots:
            self.step()
            assert len(self.scheduled) < 2000, f"only {self.in_slots[-1]} of {self.slots} slots can be filled"
        for _ in range(WARM_UP):
            self.step()
        self.clear()

    def step(self, *, running_already: bool = False) -> None:
        drawn = [self._asked.draw(running_already=running_already) for _ in range(self._missing)]
        params = [SamplingParams(max_tokens=output_len) for _, output_len in drawn]
        watch, now = self.watch, float(self._num_requests)
        watch.begin()
        watch.start()
        for (prompt, _), param in zip(drawn, params, strict=True):
            request = Request(key=self._num_requests, prompt=prompt, params=param, seed=self._num_requests)
            rejection = self.scheduler.submit(request, now)
            assert rejection is None, rejection
            self._num_requests += 1
        watch.stop("arrivals")
        if not self._overlap:
            self._missing = self._commit()
        watch.start()
        plan = self.scheduler.plan(now)
        watch.stop("plan")
        assert plan is not None, "the steady state has no idle step"
        self._serialise(plan)
        if self._overlap:
            self._missing = self._commit()
        self._flight = plan, self._answers(plan)

    def _serialise(self, plan: StepPlan) -> None:
        self.watch.start()
        message = pack(plan.to_arrays())
        self.watch.stop("serialise")
        self.plan_bytes.append(len(message))
        self.scheduled.append(len(plan.sched_slot_S))
        self.in_slots.append(self.scheduler.num_running)
        self.with_chunks.append(bool(((plan.sched_num_S > 1) & (plan.sched_sample_S == 0)).any()))

    def _answers(self, plan: StepPlan) -> list[bytes]:
        for key in plan.admit_sampling_A["seed"].tolist():
            self.ranks.expect(key, 0)
        results, _ = self.ranks.run(plan)
        return [pack(result.to_arrays()) for result in results]

    def _commit(self) -> int:
        """Commit the step in flight, and return how many requests have ended."""
        if self._flight is None:
            return 0
        plan, answers = self._flight
        self.watch.start()
        results = [StepResult.from_arrays(unpack(answer)) for answer in answers]
        self.watch.stop("unpack")
        self.watch.start()
        outputs = self.scheduler.commit(plan, results, float(plan.step))
        self.watch.stop("commit")
        self.ended.append(int(np.count_nonzero(outputs.finish_O)))
        return self.ended[-1]


def cost(num_ranks: int, running: int, steps: int, *, overlap: bool = True) -> dict[str, Any]:
    """Measure our scheduler; return µs a step by part, bytes of a plan, and the load."""
    ours = Ours(num_ranks, running, overlap=overlap)
    ours.fill()
    collect_when_idle()
    before = ours.scheduler.stats()
    for _ in range(steps):
        ours.step()
    prompt_tokens, cached = (ours.scheduler.stats()[name] - before[name] for name in ("prompt_tokens", "cached_tokens"))
    gc.unfreeze()
    gc.enable()
    watch = ours.watch
    return {
        "ranks": num_ranks,
        "running": running,
        "steps": steps,
        "overlap": overlap,
        "clock_granularity_ns": granularity_ns(),
        "cpu_us": {"total": _figures(watch.total())} | {name: _figures(watch.part(name)) for name in PARTS},
        "wall_us": {"total": _figures(watch.total(1))} | {name: _figures(watch.part(name, 1)) for name in PARTS},
        "plan_bytes": _figures(np.array(ours.plan_bytes)),
        "scheduled": statistics.fmean(ours.scheduled),
        "slots_taken": statistics.fmean(ours.in_slots) / ours.slots,
        "turnover": statistics.fmean(ours.ended) / statistics.fmean(ours.in_slots),
        "prefix_hits": cached / prompt_tokens,
        "steps_with_chunks": statistics.fmean(ours.with_chunks),
    }


def table(result: dict[str, Any]) -> str:
    """Return a report as text."""
    lines = [
        f"{result['ranks']} ranks x {result['running']} requests, {result['steps']:,} steps: {result['slots_taken']:.1%} of the "
        f"slots taken, {result['turnover']:.2%} of the requests end each step, {result['steps_with_chunks']:.1%} of the steps",
        f"with a chunk of a prompt, {result['scheduled']:,.0f} requests scheduled a step, {result['prefix_hits']:.1%} of the "
        "prompts' tokens found in the prefix cache",
        "",
        f"{'µs a step':<12}{'p50':>10}{'p99':>10}{'mean':>10}{'wall p50':>12}{'wall p99':>12}",
    ]
    for name, cpu in result["cpu_us"].items():
        wall = result["wall_us"][name]
        values = (
            f"{cpu['p50']:>10,.0f}{cpu['p99']:>10,.0f}{cpu['mean']:>10,.0f}{wall['p50']:>12,.0f}{wall['p99']:>12,.0f}"
        )
        lines.append(f"{name:<12}{values}")
    size = result["plan_bytes"]
    lines += [
        "",
        f"plan: {size['p50']:,.0f} bytes (p99 {size['p99']:,.0f}); clock granularity {result['clock_granularity_ns']} ns; "
        "`unpack` is not in the total; garbage collected as in the controller",
    ]
    return "\n".join(lines)


def granularity_ns() -> int:
    """Return the smallest visible step of the thread's clock."""
    readings = [_now()[0] for _ in range(1000)]
    return min(b - a for a, b in itertools.pairwise(readings) if b > a)


def _figures(values: np.ndarray) -> dict[str, float]:
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"p50": float(p50), "p99": float(p99), "mean": float(values.mean())}


def _now() -> tuple[int, int]:
    return time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID), time.perf_counter_ns()
