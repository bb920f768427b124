"""The study's plot: accuracy against tokens by bin and pooled, votes, and the cascade's quality against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertwire.bench.test_time.statistics import Runs

Points = Sequence[tuple[float, float]]
TICKS = (20, 50, 100, 200, 500, 1000)
HARD = ("SUM-5", "SUM-7", "COUNTDOWN-5")


def draw(
    path: Path,
    measured: Mapping[str, Mapping[str, Runs]],
    curves: Mapping[str, Points],
    fronts: Mapping[str, Points],
    tiers: Mapping[str, Any],
) -> None:
    """Write the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, name in zip(axes, HARD, strict=False):
        _bin(axis, name, measured[name])
    _votes(axes[3], measured["SUM-4"])
    _pooled(axes[4], measured, curves)
    _cascade(axes[5], fronts, tiers)
    figure.savefig(path, dpi=90)


def _bin(axis: Any, name: str, runs: Mapping[str, Runs]) -> None:
    """Strategies with the exact verifier in one bin."""
    for family, label, style in (
        ("best-of-", "best-of-n", "o-"),
        ("beam", "beam", "s--"),
        ("probe", "probe, then beam", "d"),
        ("checked greedy", "greedy probe, then beam", "x-"),
        ("step retries", "step retries", "^-"),
    ):
        points = sorted(_point(run) for each, run in runs.items() if each.startswith(family))
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label)
    axis.plot(*_point(runs["greedy"]), "k*", markersize=10, label="greedy")
    _finish(axis, f"{name}, exact verifier", "tokens a problem")


def _votes(axis: Any, runs: Mapping[str, Runs]) -> None:
    """Strategies without a verifier."""
    points = sorted(_point(run) for each, run in runs.items() if each.startswith("majority"))
    axis.plot(*zip(*points, strict=True), "o-", label="majority of n")
    for name, run in runs.items():
        if name.startswith(("adaptive", "confidence", "first")):
            axis.plot(*_point(run), "s", label=name)
    axis.plot(*_point(runs["greedy"]), "k*", markersize=10, label="greedy")
    _finish(axis, "SUM-4, votes", "tokens a problem")


def _pooled(axis: Any, measured: Mapping[str, Mapping[str, Runs]], curves: Mapping[str, Points]) -> None:
    """Choices by bin, made on one fold and shown on the other."""
    pooled = {name: runs for name, runs in measured.items() if name != "SUM-3"}
    for n in (1, 2, 4, 8, 16):
        runs = [each[f"best-of-{n}"] for each in pooled.values()]
        axis.plot(*_point(Runs.joined(runs)), "ko", label="best-of-n everywhere" if n == 1 else None)
    for name, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), "-", label=f"chosen by bin: {name}")
    _finish(axis, "SUM-4..8 and COUNTDOWN-3..5, out of sample", "tokens a problem")


def _cascade(axis: Any, fronts: Mapping[str, Points], tiers: Mapping[str, Any]) -> None:
    """Quality against cost, of policies chosen on the other fold."""
    for (name, points), style in zip(fronts.items(), ("o-", "s-", "^-", "d-"), strict=True):
        axis.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=name)
    low, high = tiers["large"]["interval"]
    axis.axhspan(low, high, color="0.9", label="large alone, 95 %")
    axis.plot(1.0, tiers["large"]["accuracy"], "k*", markersize=10)
    axis.plot(tiers["small_alone_cost"], tiers["small"]["accuracy"], "kv", label="small alone")
    _finish(axis, "cascade on SUM-3..7, out of sample", "cost (large alone = 1)", logarithmic=False)


def _point(run: Runs) -> tuple[float, float]:
    return float(run.tokens.mean()), float(run.right.mean())


def _finish(axis: Any, title: str, label: str, *, logarithmic: bool = True) -> None:
    if logarithmic:
        axis.set_xscale("log")
        axis.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axis.set_xticks([], minor=True)
    axis.set(title=title, xlabel=label, ylabel="accuracy")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
