"""`python -m expertwire.bench fair`: first-token times of a tenant beside another one's storm, on simulated ranks.

The real scheduler under the policy "fair" plans steps whose duration is a model's (see `simulation`), on a simulated
clock, so a run can be repeated exactly. Tenant "good" sends requests at random times, which alone take less than half of
the slots and of the tokens of a step; tenant "storm" sends what its name says, from the beginning to the end:

    streams        400 outputs of 4,000 tokens
    long prompts   prompts of 16,000 tokens, 16 outstanding on each rank
    short          prompts of 16 tokens and outputs of 16, in bursts of 500, far more than there are slots for

The bar is a p99 beside a storm of less than 1.25 times that alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from expertwire.bench.scheduler.simulation import EOS, Simulation, StepModel
from expertwire.bench.scheduler.traces import Arrival, Lengths, Poisson
from expertwire.scheduler.config import SchedulerConfig

BAR = 1.25
_VOCAB = 32000
_LAST_S = 10.0  # for the answers to the last requests


@dataclass(frozen=True, kw_only=True)
class Beside(Poisson):
    """A trace of tenant "good", and arrivals of others beside it."""

    others: tuple[Arrival, ...] = ()

    def arrivals(self) -> list[Arrival]:
        mine = [replace(arrival, tenant="good") for arrival in super().arrivals()]
        return sorted([*mine, *self.others], key=lambda arrival: arrival.time)


def _prompts(count: int, length: int) -> list[np.ndarray]:
    generator = np.random.default_rng(7)
    return [generator.integers(1, _VOCAB, length, dtype=np.int32) for _ in range(count)]


def streams(ranks: int, seconds: float) -> list[Arrival]:
    """Return 400 long outputs at once."""
    return [
        Arrival(time=0.0, prompt=prompt, output_len=4000, max_tokens=4000, tenant="storm")
        for prompt in _prompts(400, 32)
    ]


def long_prompts(ranks: int, seconds: float) -> list[Arrival]:
    """Return long prompts, more than the ranks can compute in this time."""
    count = 16 * ranks + int(seconds * ranks * 2)
    times = np.maximum(np.arange(count) - 16 * ranks, 0) / (2 * ranks)
    return [
        Arrival(time=float(time), prompt=prompt, output_len=64, max_tokens=64, tenant="storm")
        for time, prompt in zip(times, _prompts(count, 16000), strict=True)
    ]


def short(ranks: int, seconds: float) -> list[Arrival]:
    """Return bursts of short requests."""
    return [
        Arrival(time=time / 2, prompt=prompt, output_len=16, max_tokens=16, tenant="storm")
        for time in range(int(2 * seconds))
        for prompt in _prompts(500, 16)
    ]


STORMS: Mapping[str, Callable[[int, float], Sequence[Arrival]]] = {
    "streams": streams,
    "long prompts": long_prompts,
    "short": short,
}


def measure(
    *, ranks: int, num_seqs: int, chunk: int, rate: float, requests: int, policy: str = "fair"
) -> dict[str, Any]:
    """Return first-token times of the good tenant, alone and beside each storm."""
    config = SchedulerConfig(
        num_ranks=ranks,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=2048,
        max_model_len=20480,
        block_size=16,
        num_blocks=32768,
        max_queued_requests=100_000,
        eos_token_ids=(EOS,),
        vocab_size=_VOCAB,
        chunked_prefill_size=chunk,
    )
    trace = Beside(
        num_requests=requests,
        rate=rate,
        prompt=Lengths(median=300, sigma=0.8, low=16, high=2000),
        output=Lengths(median=64, sigma=0.5, high=200),
        max_model_len=config.max_model_len,
        vocab_size=_VOCAB,
    )
    seconds = trace.arrivals()[-1].time
    runs = {"alone": trace} | {
        name: replace(trace, others=tuple(storm(ranks, seconds))) for name, storm in STORMS.items()
    }
    return {name: _run(config, run, policy, until=seconds + _LAST_S) for name, run in runs.items()}


def _run(config: SchedulerConfig, trace: Beside, policy: str, until: float) -> dict[str, Any]:
    simulation = Simulation(trace, config, model=StepModel(), overlap=True, policy=policy)
    outcome = simulation.run(until=until)
    rows = outcome.served
    good = np.array([arrival.tenant == "good" for arrival in outcome.arrivals])
    arrived = np.array([arrival.time for arrival in outcome.arrivals])
    first = np.where(rows["count"] > 0, rows["first"], until)  # at least
    ttft_ms = 1e3 * (first - arrived)[good]
    return {
        "requests": int(good.sum()),
        "without_a_token": int((good & (rows["count"] == 0)).sum()),
        "ttft_ms": {f"p{q}": float(np.percentile(ttft_ms, q)) for q in (50, 90, 99)},
        "step_ms": float(1e3 * np.mean(outcome.seconds)),
        "storm_tokens_per_s": float(rows["count"][~good].sum() / outcome.start[-1]),
        "preemptions": simulation.ranks.preemptions,
        "scheduler_us_per_step": 1e6 * outcome.host_s / len(outcome.seconds),
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the figures as text."""
    alone = result["alone"]["ttft_ms"]["p99"]
    lines = [
        f"{'beside':<14}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'ratio':>7}{'step ms':>9}{'preempted':>11}{'µs a step':>11}"
    ]
    for name, run in result.items():
        ttft = run["ttft_ms"]
        lines.append(
            f"{name:<14}{ttft['p50']:>9.1f}{ttft['p90']:>9.1f}{ttft['p99']:>9.1f}{ttft['p99'] / alone:>7.2f}"
            f"{run['step_ms']:>9.1f}{run['preemptions']:>11}{run['scheduler_us_per_step']:>11.0f}"
        )
    return "\n".join(lines)


def run(argv: Sequence[str]) -> int:
    """Measure and print; return 1 if a storm moves the p99 by the bar or more."""
    parser = argparse.ArgumentParser(prog="python -m expertwire.bench fair", description=__doc__.splitlines()[0])
    for name, default in (("ranks", 2), ("num-seqs", 64), ("chunk", 256), ("requests", 1000)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--rate", type=float, default=20.0, metavar="X", help="requests a second of the good tenant")
    parser.add_argument("--policy", default="fair", help="scheduling policy")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = vars(parser.parse_args(argv))
    file = options.pop("json")
    result = measure(**options)
    print(table(result))
    if file is not None:
        file.write_text(json.dumps({"options": options, **result}, indent=2) + "\n")
    alone = result["alone"]["ttft_ms"]["p99"]
    return int(
        any(
            run["ttft_ms"]["p99"] >= BAR * alone or run["without_a_token"]
            for run in result.values()
            if run is not result["alone"]
        )
    )
