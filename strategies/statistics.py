"""Intervals of 95 %, for calibrations and replays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(mean: float, count: float) -> Interval:
    """Return Wilson's interval of a share that was `mean` among `count` (which may be an effective number)."""
    if count <= 0:
        return Interval(math.nan, 0.0, 1.0)
    z2 = Z_95**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def bootstrap(
    statistic: Callable[[np.ndarray], float], count: int, *, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return a statistic's value and its percentile interval.

    Args:
        statistic: of the things with these indices; indices repeat in resamples.
        count: things.
        num_resamples: draws.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(0, count, count)) for _ in range(num_resamples)]
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(float(statistic(np.arange(count))), float(low), float(high))
