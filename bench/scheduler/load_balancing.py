"""`expertwire bench schedule --load-balancing`: compare rules of DP load balancing on all traces.

P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expertwire.bench.scheduler.traces import TRACES
from expertwire.scheduler.load_balancing import LeastLoaded, LoadBalancing

LOADS: Mapping[str, float] = {"light": 4.0, "medium": 12.0, "heavy": 24.0}  # requests a second and rank
LONG_SHARE = 1 / 3  # of these rates for `long-context`, whose prompts are longer on average
SECONDS = 20.0  # of arrivals
MAX_REQUESTS = 4000  # of one run, so that on many ranks it is a burst


class RoundRobin:
    """The rank with the fewest admissions so far: ranks in turn, while all have room."""

    credit = None

    def load(self, num_tokens: np.ndarray, num_computed: np.ndarray, num_left: np.ndarray) -> np.ndarray:
        return np.ones_like(num_tokens)

    def load_P(self, running_P: np.ndarray, admitted_P: np.ndarray) -> np.ndarray:
        return admitted_P


class LeastRequests:
    """The rank that runs the fewest requests."""

    credit = None

    def load(self, num_tokens: np.ndarray, num_computed: np.ndarray, num_left: np.ndarray) -> np.ndarray:
        return np.ones_like(num_tokens)

    def load_P(self, running_P: np.ndarray, admitted_P: np.ndarray) -> np.ndarray:
        return running_P


RULES: Mapping[str, Callable[[], LoadBalancing]] = {
    "least-loaded": LeastLoaded,
    "least-requests": LeastRequests,
    "round-robin": RoundRobin,
}


def compare(
    num_ranks: Sequence[int],
    run: Callable[[str, int, int, float, LoadBalancing], dict[str, Any]],
    traces: Sequence[str] = tuple(TRACES),
) -> dict[str, Any]:
    """Return the reports of all runs.

    Args:
        num_ranks: to compare on.
        run: makes a report of: trace, ranks, requests, requests a second, rule.
        traces: of `TRACES`.
    """
    rows = []
    for ranks in num_ranks:
        for trace in traces:
            for load, rank_rate in LOADS.items():
                rate = rank_rate * ranks * (LONG_SHARE if trace == "long-context" else 1.0)
                requests = min(round(rate * SECONDS), MAX_REQUESTS)
                for name, make in RULES.items():
                    report = run(trace, ranks, requests, rate, make())
                    del report["host_us_per_step"]  # a measured time, and everything else can be repeated
                    rows.append({"trace": trace, "load": load, "rate": rate, "rule": name} | report)
    return {"runs": rows}


def table(result: dict[str, Any]) -> str:
    """Return the comparison as text."""
    lines = [
        f"{'ranks trace        load   rule     ':<41}{'hits':>7}{'/oracle':>9}{'goodput':>9}{'tokens/s':>10}{'TTFT p99':>10}"
        f"{'TPOT p50':>10}{'p99':>7}{'step':>7}{'tokens':>8}{'/least':>8}{'KV':>6}{'wait':>7}"
    ]
    for row in result["runs"]:
        prefix, balance, good, ttft, tpot = (
            row[name] for name in ("prefix", "balance", "goodput", "ttft_ms", "tpot_ms")
        )
        oracle = prefix["spread_oracle_tokens"]
        share = f"{prefix['cached_tokens'] / oracle:.1%}" if oracle else "-"
        lines.append(
            f"{row['ranks']:<6}{row['trace']:<13}{row['load']:<7}{row['rule']:<15}"
            f"{prefix['cached_tokens'] / prefix['prompt_tokens']:>7.1%}{share:>9}{good['share']:>9.1%}"
            f"{good['tokens_per_s']:>10,.0f}{ttft['p99']:>10.0f}{tpot['p50']:>10.1f}{tpot['p99']:>7.1f}"
            f"{row['step_ms']['mean']:>7.2f}"
            f"{balance['tokens_max_over_mean']:>8.2f}{balance['tokens_max_over_least']:>8.2f}"
            f"{balance['blocks_max_over_mean']:>6.2f}{balance['idle_share']:>7.1%}"
        )
    return "\n".join(lines)
