"""Confidence of an output, by the log-probabilities of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def lowest_window(logprobs: Sequence[float], window: int) -> float:
    """Return the lowest mean of `window` consecutive log-probabilities; the mean of all if they are fewer, and 0.0 of none."""
    if len(logprobs) <= window:
        return sum(logprobs) / len(logprobs) if logprobs else 0.0
    sums = list(accumulate(logprobs, initial=0.0))
    return min((after - before) / window for before, after in zip(sums, sums[window:], strict=False))
