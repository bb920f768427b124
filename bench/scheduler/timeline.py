"""A picture of a simulation: what each rank did, from left to right. SVG, written directly.

Time is cut into equal bins; in each, a rank's row shows the shares of time in which it computed prompts, decoded, and waited for
the slowest rank of its step. What is left white is time without a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

COLOURS: Mapping[str, str] = {"prefill": "#e69f00", "decode": "#0072b2", "idle": "#c8c8c8"}
_WIDTH, _LEFT, _TOP, _BOTTOM = 1200, 70, 56, 44
_MAX_POINTS = 9000  # of all rows, so that a picture of many ranks stays small


def timeline(shares: Mapping[str, np.ndarray], start_N: np.ndarray, seconds_N: np.ndarray, title: str) -> str:
    """An SVG picture of N steps on P ranks.

    Args:
        shares: by kind, as in `COLOURS`: f64 [N, P], of each step's time; they add up to at most 1.
        start_N: f64, seconds, ascending.
        seconds_N: f64, how long each step took.
    """
    num_ranks = shares["idle"].shape[1]
    end = float(start_N[-1] + seconds_N[-1]) if len(start_N) else 1.0
    bins = int(np.clip(_MAX_POINTS // num_ranks, 120, 600))
    binned = {kind: _binned(share, start_N, seconds_N, np.linspace(0, end, bins + 1)) for kind, share in shares.items()}
    row = float(np.clip(700 / num_ranks, 9, 60))
    height = _TOP + row * num_ranks + _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height:.0f}" fill="white"/>',
        f'<text x="{_LEFT}" y="20" font-size="15">{_escaped(title)}</text>',
        *_legend(shares, seconds_N),
        *(_row(binned, rank, _TOP + row * rank, row, num_ranks) for rank in range(num_ranks)),
        *_axis(end, _TOP + row * num_ranks),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def save(file: Path, picture: str) -> None:
    """Write it.

    Raises:
        OSError: the file cannot be written.
    """
    file.write_text(picture, encoding="utf-8")


def _binned(share_NP: np.ndarray, start_N: np.ndarray, seconds_N: np.ndarray, edges_B1: np.ndarray) -> np.ndarray:
    """f64 [P, B], the share of each bin's time: differences of the running total, read off at the bins' edges."""
    at = np.stack([start_N, start_N + seconds_N], axis=1).reshape(-1)
    total_P = []
    for share_N in share_NP.T:
        total = np.cumsum(share_N * seconds_N)
        before = np.concatenate([[0.0], total[:-1]]) if len(total) else total
        total_P.append(
            np.interp(edges_B1, at, np.stack([before, total], axis=1).reshape(-1)) if len(at) else edges_B1 * 0
        )
    return np.diff(np.stack(total_P), axis=1) / np.diff(edges_B1)


def _row(binned: Mapping[str, np.ndarray], rank: int, top: float, row: float, num_ranks: int) -> str:
    """One rank: the kinds' shares stacked, the first at the bottom."""
    every = -(-num_ranks // 40)
    height = row - (1 if row < 12 else 4)
    parts = [f'<g id="rank-{rank}">']
    if rank % every == 0:
        parts.append(f'<text x="{_LEFT - 6}" y="{top + row / 2 + 4:.1f}" text-anchor="end">rank {rank}</text>')
    low_B = np.zeros(binned["idle"].shape[1])
    for kind in COLOURS:
        high_B = np.minimum(low_B + binned[kind][rank], 1.0)
        path = _area(top + height * (1 - high_B), top + height * (1 - low_B))
        mean = float((high_B - low_B).mean())
        parts.append(f'<path d="{path}" fill="{COLOURS[kind]}"><title>rank {rank}: {kind} {mean:.1%}</title></path>')
        low_B = high_B
    return "".join(parts) + "</g>"


def _area(upper_B: np.ndarray, lower_B: np.ndarray) -> str:
    """The outline between two step curves."""
    edges = np.linspace(_LEFT, _WIDTH - 20, len(upper_B) + 1)
    there = "".join(f"V{y:.1f}H{x:.1f}" for x, y in zip(edges[1:], upper_B, strict=True))
    back = "".join(f"V{y:.1f}H{x:.1f}" for x, y in zip(edges[-2::-1], lower_B[::-1], strict=True))
    return f"M{edges[0]:.1f},{lower_B[0]:.1f}{there}{back}Z"


def _legend(shares: Mapping[str, np.ndarray], seconds_N: np.ndarray) -> list[str]:
    texts = {"prefill": "computing prompts", "decode": "decoding", "idle": "waiting for the slowest rank"}
    busy = max(float(seconds_N.sum()), 1e-9)
    parts = []
    for place, (kind, colour) in enumerate(COLOURS.items()):
        x = _LEFT + 240 * place
        share = float((shares[kind].mean(axis=1) * seconds_N).sum()) / busy
        parts.append(f'<rect x="{x}" y="30" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="42">{texts[kind]} ({share:.1%} of all steps)</text>')
    return parts


def _axis(end: float, top: float) -> list[str]:
    """Seconds, in some 8 ticks at 1, 2 or 5 times a power of ten."""
    rough = end / 8
    power = 10.0 ** np.floor(np.log10(rough))
    tick = float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough))
    scale = (_WIDTH - 20 - _LEFT) / end
    parts = [f'<path d="M{_LEFT},{top:.1f}H{_WIDTH - 20}" stroke="black"/>']
    for number in range(int(end / tick) + 1):
        x = _LEFT + number * tick * scale
        parts.append(f'<path d="M{x:.1f},{top:.1f}v5" stroke="black"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + 19:.1f}" text-anchor="middle">{number * tick:g}</text>')
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{top + 36:.1f}" text-anchor="middle">seconds</text>')
    return parts


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
