"""A picture of a simulation: the work of each rank over time.

Time is cut into equal bins; in each, a rank's row shows the shares of time in which it computed
prefill, decoded, and waited for the slowest rank of its step. White is time without a step.

N steps, P ranks, B bins.
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


def timeline(shares: Mapping[str, np.ndarray], start_N: np.ndarray, seconds_N: np.ndarray, title: str) -> Figure:
    """Return a figure of N steps on P ranks.

    Args:
        shares: by kind, as in `COLOURS`: f64 [N, P], of each step's time; they add up to at most 1.
        start_N: f64, seconds, ascending.
        seconds_N: f64, duration of each step.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--timeline needs matplotlib; pip install matplotlib") from None
    num_ranks = shares["idle"].shape[1]
    end = float(start_N[-1] + seconds_N[-1]) if len(start_N) else 1.0
    edges_B1 = np.linspace(0, end, int(np.clip(_MAX_POINTS // num_ranks, 120, 600)) + 1)
    busy = max(float(seconds_N.sum()), 1e-9)
    figure = Figure(figsize=(14, 1.5 + float(np.clip(9 / num_ranks, 0.12, 0.8)) * num_ranks), layout="constrained")
    axes = figure.subplots()
    low_PB = np.zeros((num_ranks, len(edges_B1) - 1))
    means: list[list[str]] = [[] for _ in range(num_ranks)]
    for kind, colour in COLOURS.items():
        share_PB = _binned(shares[kind], start_N, seconds_N, edges_B1)
        high_PB = np.minimum(low_PB + share_PB, 1.0)
        for rank in range(num_ranks):
            low_B, high_B = (
                rank + 1 - 0.9 * np.append(curve_PB[rank], curve_PB[rank, -1]) for curve_PB in (low_PB, high_PB)
            )
            axes.fill_between(
                edges_B1, low_B, high_B, step="post", color=colour, linewidth=0, gid=f"rank-{rank}-{kind}"
            )
            means[rank].append(f"{float((high_PB[rank] - low_PB[rank]).mean()):.1%}")
        share = float((shares[kind].mean(axis=1) * seconds_N).sum()) / busy
        axes.fill_between([], [], [], color=colour, label=f"{_LABELS[kind]} ({share:.1%} of all steps)")
        low_PB = high_PB
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


def _binned(share_NP: np.ndarray, start_N: np.ndarray, seconds_N: np.ndarray, edges_B1: np.ndarray) -> np.ndarray:
    """Return the share of each bin's time, f64 [P, B]: differences of the running total at the bins' edges."""
    if not len(start_N):
        return np.zeros((share_NP.shape[1], len(edges_B1) - 1))
    at = np.stack([start_N, start_N + seconds_N], axis=1).reshape(-1)
    total_NP = np.cumsum(share_NP * seconds_N[:, None], axis=0)
    before_NP = np.concatenate([np.zeros_like(total_NP[:1]), total_NP[:-1]])
    steps = np.stack([before_NP, total_NP], axis=1).reshape(-1, share_NP.shape[1])
    return np.diff([np.interp(edges_B1, at, total) for total in steps.T], axis=1) / np.diff(edges_B1)
