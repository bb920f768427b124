"""Bounds, published figures and a model of the fastest published kernel: `expertwire bench all-to-all --model nvl72`.

*Bounds* are arithmetic on bytes (`bench.all_to_all.traffic`), *published* figures are others'
(`bench.all_to_all.published`), and *modelled* ones come from a model of TensorRT-LLM's one-sided kernel, fitted to its
table at EP 8 and 16 and compared with EP 32 and 64 and narrower formats. None is a measurement of ours.

P ranks, T tokens a rank, K experts a token.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from expertwire.bench.all_to_all import published, traffic
from expertwire.bench.all_to_all.published import HIDDEN_SIZE, TOP_K, Row
from expertwire.bench.all_to_all.traffic import Traffic
from expertwire.comm.all_to_all import cost_model

Phase = Literal["dispatch", "combine"]
PHASES: tuple[Phase, ...] = ("dispatch", "combine")
BAR = 0.15  # largest median error of the model where it was not fitted
FLOOR_TOKENS = 32  # up to here the published times do not depend on the tokens
SIGNALS_US = 7.0  # write and await signals: 3.7 to 6.8 us between 8 GPUs (NCCL's contrib/custom_algos/alltoall)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """NVLink rates of a machine, GB/s of one GPU in one direction: nominal, and the best published.

    Args:
        ep_sizes: group sizes to report.
    """

    ep_sizes: tuple[int, ...]
    line_gb_s: float
    peak_gb_s: float


MACHINES = {
    "nvl72": Machine(ep_sizes=(8, 16, 32, 36, 64, 72), line_gb_s=900, peak_gb_s=770),
    "nvl36": Machine(ep_sizes=(8, 16, 32, 36), line_gb_s=900, peak_gb_s=770),
    "hgx8": Machine(ep_sizes=(2, 4, 8), line_gb_s=450, peak_gb_s=370),  # of H100 or H200
}
LINE_GB_S = {"H100": 450, "H200": 450, "B200": 900, "GB200": 900}


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """max(floor, start + wire * (1 + slowing * log2(P / 8)) / rate) in µs: bound by latency or by bandwidth."""

    floor_us: float
    start_us: float
    rate_gb_s: float
    slowing: float  # per doubling of the ranks

    def __call__(self, wire: float, num_ranks: int) -> float:
        return max(
            self.floor_us, self.start_us + wire * (1 + self.slowing * math.log2(num_ranks / 8)) / self.rate_gb_s / 1e3
        )


def fit(points: Sequence[tuple[int, int, float, float]]) -> KernelTime:
    """Fit (tokens, ranks, wire bytes, µs): geometric mean for the floor, least squares of relative errors for the rest."""
    floor = statistics.geometric_mean(us for tokens, _, _, us in points if tokens <= FLOOR_TOKENS)
    large = [point for point in points if point[0] > FLOOR_TOKENS]
    terms = [(1.0, wire / 1e3, wire / 1e3 * math.log2(ranks / 8)) for _, ranks, wire, _ in large]
    us = np.array([us for *_, us in large])
    (start, inverse, slower), *_ = np.linalg.lstsq(np.array(terms) / us[:, None], np.ones(len(us)), rcond=None)
    return KernelTime(
        floor_us=floor, start_us=float(start), rate_gb_s=float(1 / inverse), slowing=float(slower / inverse)
    )


def wire_of(row: Row, phase: Phase) -> float:
    """Return the fewest bytes that a published measurement had to move: deduplicated, and reduced before they return."""
    return _traffic(row, phase).wire


def _traffic(row: Row, phase: Phase) -> Traffic:
    # The "perfect router" of TensorRT-LLM's benchmark sends a token to as many ranks as possible.
    most = min(row.num_ranks, TOP_K)
    copies = most if row.perfect else cost_model.distinct_ranks(experts_of(row.num_ranks), TOP_K)
    format = row.dispatch_format if phase == "dispatch" else row.combine_format
    return traffic.expected(row.num_tokens, traffic.row_bytes(HIDDEN_SIZE, format), copies, row.num_ranks)


def experts_of(num_ranks: int) -> list[int]:
    """Return the experts of each rank: 256 in all, or more to make them even (288 for 72 ranks)."""
    return [-(-256 // num_ranks)] * num_ranks


def time_of(row: Row, phase: Phase) -> float | None:
    return row.dispatch_us if phase == "dispatch" else row.combine_us


def fit_published(phase: Phase) -> KernelTime:
    """Return the model of TensorRT-LLM's kernel, from its EP 8 and EP 16 rows."""
    rows = [row for row in published.one_sided() if row.num_ranks <= 16]
    times = [(row, time_of(row, phase)) for row in rows]
    return fit([(row.num_tokens, row.num_ranks, wire_of(row, phase), us) for row, us in times if us is not None])


def residuals(model: KernelTime, rows: Iterable[Row], phase: Phase) -> list[tuple[Row, float, float]]:
    """Return each row with a time of this phase, the modelled time, and the relative error."""
    found = []
    for row in rows:
        if (us := time_of(row, phase)) is not None:
            predicted = model(wire_of(row, phase), row.num_ranks)
            found.append((row, predicted, predicted / us - 1))
    return found


def held_out() -> dict[str, Callable[[], Iterator[Row]]]:
    """Return the published rows that the model was not fitted to."""
    return {
        "EP 32 and 64, bf16": lambda: (row for row in published.one_sided() if row.num_ranks > 16),
        "dispatch of mxfp8 and nvfp4, and the combine of the same runs": published.one_sided_narrow,
    }


def report(name: str) -> dict[str, Any]:
    """Return the whole report, for JSON.

    Raises:
        ValueError: no such machine.
    """
    if name not in MACHINES:
        raise ValueError(f"--model must be one of {', '.join(MACHINES)}, got {name!r}")
    models = {phase: fit_published(phase) for phase in PHASES}
    return {
        "machine": {"name": name, **asdict(MACHINES[name])},
        "shape": {"hidden_size": HIDDEN_SIZE, "top_k": TOP_K},
        "bounds": list(_bounds(MACHINES[name])),
        "kernel_model": {phase: _fit_report(model, phase) for phase, model in models.items()},
        "beside": [*_modelled(MACHINES[name], models), *_published(MACHINES[name], models)],
        "published_rates": [
            asdict(rate) for rate in published.rates() if LINE_GB_S[rate.hardware] == MACHINES[name].line_gb_s
        ],
    }


def _bounds(machine: Machine) -> Iterator[dict[str, Any]]:
    """Yield, for uniform routing and each number of ranks, copies a token, and bounds at line rate and at the best rate."""
    bf16, fp8 = (traffic.row_bytes(HIDDEN_SIZE, name) for name in ("bf16", "fp8"))
    for ranks in machine.ep_sizes:
        copies = cost_model.distinct_ranks(experts_of(ranks), TOP_K)
        for tokens in (128, 4096):
            parts = {
                "dispatch_fp8": traffic.expected(tokens, fp8, copies, ranks),
                "dispatch_bf16": traffic.expected(tokens, bf16, copies, ranks),
                "combine_rows": traffic.expected(tokens, bf16, TOP_K, ranks),
                "combine_reduced": traffic.expected(tokens, bf16, copies, ranks),
            }
            yield {
                "num_ranks": ranks,
                "num_experts": sum(experts_of(ranks)),
                "num_tokens": tokens,
                "ranks_per_token": copies,
                "duplicate_probability": cost_model.duplicate_probability(copies, TOP_K),
                "parts": {
                    name: {
                        **asdict(part),
                        "line_us": part.bound_us(machine.line_gb_s),
                        "peak_us": part.bound_us(machine.peak_gb_s),
                    }
                    for name, part in parts.items()
                },
            }


def _fit_report(model: KernelTime, phase: Phase) -> dict[str, Any]:
    fitted = residuals(model, (row for row in published.one_sided() if row.num_ranks <= 16), phase)
    unseen = {name: residuals(model, rows(), phase) for name, rows in held_out().items()}
    return {
        "parameters": asdict(model),
        "fitted": _errors(fitted),
        "held_out": {name: {**_errors(rows), "bar": BAR} for name, rows in unseen.items()},
    }


def _errors(rows: list[tuple[Row, float, float]]) -> dict[str, Any]:
    return {
        "median": statistics.median(abs(error) for _, _, error in rows),
        "worst": max((error for _, _, error in rows), key=abs),
        "rows": [
            {"num_ranks": row.num_ranks, "num_tokens": row.num_tokens, "format": row.dispatch_format, "error": error}
            for row, _, error in rows
        ],
    }


def _modelled(machine: Machine, models: dict[Phase, KernelTime]) -> Iterator[dict[str, Any]]:
    """Yield the time of their kernel and the lower bound of ours, with a perfect router and bf16."""
    for ranks in (ranks for ranks in machine.ep_sizes if ranks >= 8):
        for tokens in (1, 32, 128, 512, 2048):
            row = Row(
                library="", hardware="", num_ranks=ranks, num_tokens=tokens, dispatch_us=0, combine_us=None,
                dispatch_format="bf16", perfect=True,
            )  # fmt: skip
            if machine.line_gb_s == LINE_GB_S["GB200"]:
                times = {phase: models[phase](wire_of(row, phase), ranks) for phase in PHASES}
                yield _entry(row, "model of TensorRT-LLM one-sided", "modelled", times, machine.line_gb_s)
            # With a perfect router a token's K rows come from K ranks, so our combine moves what theirs does.
            times = {phase: SIGNALS_US + _traffic(row, phase).bound_us(machine.peak_gb_s) for phase in PHASES}
            yield _entry(
                row, f"ours at the least: {SIGNALS_US:g} us of signals + wire", "modelled", times, machine.line_gb_s
            )


def _published(machine: Machine, models: dict[Phase, KernelTime]) -> Iterator[dict[str, Any]]:
    """Yield published rows of GPUs with the same NVLink, or of GPUs not stated."""
    for row in (*published.one_sided(), *published.one_sided_narrow(), *published.others()):
        if LINE_GB_S.get(row.hardware, machine.line_gb_s) != machine.line_gb_s:
            continue
        times = {phase: time_of(row, phase) for phase in PHASES}
        entry = _entry(row, row.library, row.kind, times, LINE_GB_S.get(row.hardware))
        if row.library == "TensorRT-LLM one-sided":
            entry["model_us"] = [models[phase](wire_of(row, phase), row.num_ranks) for phase in PHASES]
        yield {**entry, "source": row.source}


def _entry(row: Row, library: str, kind: str, times: dict[Phase, Any], line_gb_s: float | None) -> dict[str, Any]:
    bounds = [_traffic(row, phase).bound_us(line_gb_s) if line_gb_s else None for phase in PHASES]
    return {
        "library": library,
        "kind": kind,
        "hardware": row.hardware,
        "num_ranks": row.num_ranks,
        "num_tokens": row.num_tokens,
        "format": row.dispatch_format,
        "routing": "perfect" if row.perfect else "uniform",
        "us": [times[phase] for phase in PHASES],
        "bound_us": bounds,
        "ratio": [
            times[phase] / bound if bound and bound >= 1 and times[phase] else None
            for phase, bound in zip(PHASES, bounds, strict=True)
        ],
    }
