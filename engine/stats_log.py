"""A line about the engine's load for its operator, every few seconds in which it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

INTERVAL_S = 10.0
_IDLE_S = 1.0  # a pause between steps after which the rates of the interval would say nothing


class StatsLog:
    """Writes rates and gauges every `INTERVAL_S` seconds while steps follow each other.

    Args:
        write: called with the line.
        clock: seconds.
    """

    def __init__(self, write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._since_s = self._last_s = -float("inf")
        self._computed = self._sampled = 0

    def step(self, totals: Mapping[str, int], gauges: Callable[[], Mapping[str, Any]]) -> None:
        """Note that a step has ended.

        Args:
            totals: the controller's counters, of which "tokens_computed" and "tokens_sampled" are used.
            gauges: returns `Scheduler.stats`; called for a line only.
        """
        now_s, last_s = self._clock(), self._last_s
        self._last_s = now_s
        computed, sampled = totals["tokens_computed"], totals["tokens_sampled"]
        if now_s - last_s <= _IDLE_S:
            if (seconds := now_s - self._since_s) < INTERVAL_S:
                return
            decoded = sampled - self._sampled
            prefilled = max(0, computed - self._computed - decoded)  # a decoded token is computed in the step after it
            rates = f"prefill {prefilled / seconds:,.1f} tokens/s, decode {decoded / seconds:,.1f} tokens/s"
            self._write(f"{rates}, {_gauges(gauges())}")
        self._since_s, self._computed, self._sampled = now_s, computed, sampled


def _gauges(values: Mapping[str, Any]) -> str:
    used = max(sum(values["blocks_used"][name]) / (n * len(values["running"])) for name, n in values["blocks"].items())
    hits = values["cached_tokens"] / max(1, values["prompt_tokens"])
    return (
        f"running {values['num_running']}, waiting {values['num_waiting']}, held {values['held']}, "
        f"KV cache {used:.1%}, prefix cache hits {hits:.1%}"
    )
