"""A picture of a simulation: the work of each rank over time.

Time is cut into equal bins; in each, a rank's row shows the shares of time in which it computed
prefill, decoded, and waited for the slowest rank of its step. White is time without a step.

Arrays are [steps, ranks], [ranks, bins] or one of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = {"prefill": "#e69f00", "decode": "#0072b2", "idle": "#c8c8c8"}
_LABELS: Mapping[str, str] = {"prefill": "prefill", "decode": "decode", "idle": "waiting for the slowest rank"}
_MAX_POINTS = 9000  # of all rows, to bound the file's size
_MAX_TICKS = 40


def timeline(shares: Mapping[str, np.ndarray], starts: np.ndarray, seconds: np.ndarray, title: str) -> Figure:
    """Return a figure of the steps of all ranks.

    Args:
        shares: by kind, as in `COLOURS`: f64 [steps, ranks], of each step's time; they add up to at most 1.
        starts: f64, seconds, ascending.
        seconds: f64, duration of each step.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--timeline needs matplotlib; pip install matplotlib") from None
    num_ranks = shares["idle"].shape[1]
    end = float(starts[-1] + seconds[-1]) if len(starts) else 1.0
    edges = np.linspace(0, end, int(np.clip(_MAX_POINTS // num_ranks, 120, 600)) + 1)
    busy = max(float(seconds.sum()), 1e-9)
    figure = Figure(figsize=(14, 1.5 + float(np.clip(9 / num_ranks, 0.12, 0.8)) * num_ranks), layout="constrained")
    axes = figure.subplots()
    lows = np.zeros((num_ranks, len(edges) - 1))
    means: list[list[str]] = [[] for _ in range(num_ranks)]
    for kind, colour in COLOURS.items():
        binned = _binned(shares[kind], starts, seconds, edges)
        highs = np.minimum(lows + binned, 1.0)
        for rank in range(num_ranks):
            low, high = (rank + 1 - 0.9 * np.append(curve[rank], curve[rank, -1]) for curve in (lows, highs))
            axes.fill_between(edges, low, high, step="post", color=colour, linewidth=0, gid=f"rank-{rank}-{kind}")
            means[rank].append(f"{float((highs[rank] - lows[rank]).mean()):.1%}")
        share = float((shares[kind].mean(axis=1) * seconds).sum()) / busy
        axes.fill_between([], [], [], color=colour, label=f"{_LABELS[kind]} ({share:.1%} of all steps)")
        lows = highs
    ticks = range(0, num_ranks, -(-num_ranks // _MAX_TICKS))
    axes.set(xlim=(0, end), ylim=(num_ranks + 0.05, 0), xlabel="seconds", title=title)
    axes.set_ylabel(", ".join(COLOURS))
    axes.set_yticks([rank + 0.5 for rank in ticks], [f"rank {rank}: {', '.join(means[rank])}" for rank in ticks])
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False)
    return figure


def save(file: Path, figure: Figure) -> None:
    """Write the figure, as SVG or what the file's name ends with.

    Raises:
        OSError: the file cannot be written.
    """
    figure.savefig(file, format=file.suffix[1:] or "svg")


def _binned(shares: np.ndarray, starts: np.ndarray, seconds: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the share of each bin's time, f64 [ranks, bins]: differences of the running total at the bins' edges."""
    if not len(starts):
        return np.zeros((shares.shape[1], len(edges) - 1))
    at = np.stack([starts, starts + seconds], axis=1).reshape(-1)
    totals = np.cumsum(shares * seconds[:, None], axis=0)
    before = np.concatenate([np.zeros_like(totals[:1]), totals[:-1]])
    steps = np.stack([before, totals], axis=1).reshape(-1, shares.shape[1])
    return np.diff([np.interp(edges, at, total) for total in steps.T], axis=1) / np.diff(edges)
