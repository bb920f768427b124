"""The roofline plot of `bench kernels`: FLOP a byte against TFLOP/s, both logarithmic. SVG, written directly; PNG by matplotlib.

A point is a number of tokens of an expert layer, or a step of attention; the line above is what the device was measured to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expertwire.bench.kernels.models import Ceilings
from expertwire.bench.kernels.results import Results, figures

COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#999999", "#f0e442", "#332288", "#882255",
    "#44aa99", "#117733", "#ddcc77", "#aa4499", "#88ccee", "#661100",
)  # fmt: skip
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1100, 700, 70, 270, 40, 50


@dataclass(frozen=True)
class Point:
    """`intensity`: FLOP of a byte; `rate`: FLOP/s."""

    intensity: float
    rate: float
    label: str


def points(results: Results, ceilings: Ceilings) -> dict[str, list[Point]]:
    """Of our experts and attentions, by series."""
    found: dict[str, list[Point]] = {}
    for _, key, item in results.items(kind="us"):
        ours = figures(item, ceilings).get("ours")
        if ours and "model" in item and item["flops"]:
            series = key.rpartition(" T")[0] if "tokens" in item else f"attention {item['model']}"
            point = Point(item["flops"] / item["bytes"], ours["tflops"] * 1e12, f"{key}: {ours['us']:.1f} us")
            found.setdefault(series, []).append(point)
    return {name: sorted(series, key=lambda point: point.intensity) for name, series in found.items()}


def roofline_svg(series: Mapping[str, list[Point]], ceilings: Ceilings, title: str) -> str:
    """The picture."""
    x_range, y_range = _ranges(series, ceilings)

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * _share(value, x_range)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * _share(value, y_range)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{_escaped(title)}</text>',
    ]
    for exponent in range(math.ceil(math.log10(x_range[0])), math.floor(math.log10(x_range[1])) + 1):
        at = x(10.0**exponent)
        parts.append(f'<path d="M{at:.1f},{_TOP}V{_HEIGHT - _BOTTOM}" stroke="#dddddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{10.0**exponent:g}</text>')
    for exponent in range(math.ceil(math.log10(y_range[0])), math.floor(math.log10(y_range[1])) + 1):
        at = y(10.0**exponent)
        parts.append(f'<path d="M{_LEFT},{at:.1f}H{_WIDTH - _RIGHT}" stroke="#dddddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0 ** (exponent - 12):g}</text>')
    for name, rate in ceilings.flops_per_s.items():
        ridge = rate / ceilings.bytes_per_s
        left = max(x_range[0], y_range[0] / ceilings.bytes_per_s)
        path = f"M{x(left):.1f},{y(left * ceilings.bytes_per_s):.1f}L{x(ridge):.1f},{y(rate):.1f}H{x(x_range[1]):.1f}"
        parts.append(f'<path d="{path}" fill="none" stroke="black" stroke-width="1.5"/>')
        label = f"{name} {rate / 1e12:.0f} TFLOP/s, {ceilings.bytes_per_s / 1e12:.2f} TB/s"
        parts.append(f'<text x="{x(x_range[1]) - 4:.1f}" y="{y(rate) - 5:.1f}" text-anchor="end">{label}</text>')
    for number, (name, found) in enumerate(series.items()):
        colour, row = COLOURS[number % len(COLOURS)], _TOP + 16 * number
        # The second time round the colours, points are hollow.
        look = f'r="4" stroke="{colour}" fill="{colour if number < len(COLOURS) else "white"}"'
        if not _steps(name):
            line = " ".join(f"{x(point.intensity):.1f},{y(point.rate):.1f}" for point in found)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        for p in found:
            place = f'cx="{x(p.intensity):.1f}" cy="{y(p.rate):.1f}"'
            parts.append(f"<circle {place} {look}><title>{_escaped(p.label)}</title></circle>")
        parts.append(f'<circle cx="{_WIDTH - _RIGHT + 16}" cy="{row + 6}" {look}/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 26}" y="{row + 10}">{_escaped(name)}</text>')
    middle, low = (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12
    parts.append(
        f'<text x="{middle:.0f}" y="{low}" text-anchor="middle">useful FLOP a byte that has to be moved</text>'
    )
    parts.append(f'<text x="16" y="{_HEIGHT / 2:.0f}" transform="rotate(-90 16 {_HEIGHT / 2:.0f})">TFLOP/s</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def save_png(file: Path, series: Mapping[str, list[Point]], ceilings: Ceilings, title: str) -> bool:
    """The same by matplotlib; False if it is not installed.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 8))
    axes = figure.add_subplot()
    x_range, _ = _ranges(series, ceilings)
    for name, rate in ceilings.flops_per_s.items():
        at = [x_range[0], rate / ceilings.bytes_per_s, x_range[1]]
        axes.loglog(at, [min(rate, value * ceilings.bytes_per_s) / 1e12 for value in at], color="black", linewidth=1)
        axes.annotate(name, (at[2], rate / 1e12))
    for number, (name, found) in enumerate(series.items()):
        rates = [point.rate / 1e12 for point in found]
        hollow = {"markerfacecolor": "white"} if number >= len(COLOURS) else {}
        look = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "label": name, "alpha": 0.7, **hollow}
        axes.loglog([p.intensity for p in found], rates, linestyle="none" if _steps(name) else "-", **look)
    axes.set(xlabel="useful FLOP a byte that has to be moved", ylabel="TFLOP/s", title=title)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=110, bbox_inches="tight")
    return True


def _steps(series: str) -> bool:
    """Whether its points are steps of different kinds, which no line connects."""
    return series.startswith("attention")


def _ranges(series: Mapping[str, list[Point]], ceilings: Ceilings) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of both axes, with room around all points and the ridges."""
    every = [point for found in series.values() for point in found]
    ridges = [rate / ceilings.bytes_per_s for rate in ceilings.flops_per_s.values()]
    xs, ys = [p.intensity for p in every] + ridges, [p.rate for p in every] + list(ceilings.flops_per_s.values())
    return (min(xs) / 2, max(xs) * 4), (min(ys) / 2, max(ys) * 2)


def _share(value: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return math.log(value / low) / math.log(high / low)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
