"""Roofline plot of `bench kernels`: FLOP a byte against TFLOP/s, both logarithmic.

A point is an expert layer at a number of tokens, or a step of attention. The lines are the ceilings that were
measured on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from expertwire.bench.kernels.models import Ceilings
from expertwire.bench.kernels.results import Results, figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """`intensity`: FLOP a byte; `rate`: FLOP/s."""

    intensity: float
    rate: float


def points(results: Results, ceilings: Ceilings) -> dict[str, list[Point]]:
    """Return the points of our experts and attentions, by series."""
    found: dict[str, list[Point]] = {}
    for _, key, item in results.items(kind="us"):
        ours = figures(item, ceilings).get("ours")
        if ours and "model" in item and item["flops"]:
            series = key.rpartition(" T")[0] if "tokens" in item else f"attention {item['model']}"
            found.setdefault(series, []).append(Point(item["flops"] / item["bytes"], ours["tflops"] * 1e12))
    return {name: sorted(series, key=lambda point: point.intensity) for name, series in found.items()}


def roofline(series: Mapping[str, list[Point]], ceilings: Ceilings, title: str) -> Figure:
    """Return the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8))
    axes = figure.add_subplot()
    ridges = {name: rate / ceilings.bytes_per_s for name, rate in ceilings.flops_per_s.items()}
    intensities = [point.intensity for found in series.values() for point in found] + list(ridges.values())
    left, right = min(intensities) / 2, max(intensities) * 4
    for name, rate in ceilings.flops_per_s.items():
        line = [left * ceilings.bytes_per_s / 1e12, rate / 1e12, rate / 1e12]
        axes.loglog([left, ridges[name], right], line, color="black", linewidth=1)
        axes.annotate(f"{name} {rate / 1e12:.0f} TFLOP/s", (right, rate / 1e12), ha="right", va="bottom")
    colors = mpl.color_sequences["tab20"]
    for number, (name, found) in enumerate(series.items()):
        # Steps of attention are of different kinds, which no line connects.
        style = {"linestyle": "none" if name.startswith("attention") else "-", "color": colors[number % len(colors)]}
        hollow = {"markerfacecolor": "white"} if number >= len(colors) else {}
        rates = [point.rate / 1e12 for point in found]
        axes.loglog([p.intensity for p in found], rates, marker="o", alpha=0.7, label=name, **style, **hollow)
    axes.set(xlabel="useful FLOP a byte that has to be moved", ylabel="TFLOP/s", title=title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    return figure


def save_roofline(folder: Path, series: Mapping[str, list[Point]], ceilings: Ceilings, title: str) -> bool:
    """Write roofline.svg and roofline.png; return False if matplotlib is not installed.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        figure = roofline(series, ceilings, title)
    except ImportError:
        return False
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"roofline.{suffix}", dpi=110, bbox_inches="tight")
    return True
