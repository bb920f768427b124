"""The model's report of `bench all-to-all` as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the text of a report of `all_to_all.model`."""
    machine, shape = report["machine"], report["shape"]
    yield (
        f"{machine['name']}: {machine['line_gb_s']:g} GB/s a GPU and direction on paper, {machine['peak_gb_s']:g} at best shown; "
        f"{shape['hidden_size']} numbers a row, {shape['top_k']} experts a token. Nothing here is a measurement of ours."
    )
    yield ""
    yield "Bounds, uniform routing: us for the bytes alone, on paper / at best shown (our combine: one row per token and expert)"
    yield from _table(("EP", "experts", "ranks/token", "duplicates", "tokens", *_PARTS.values()), _bound_rows(report))
    yield ""
    yield "A model of TensorRT-LLM's one-sided kernel (theirs, not ours), fitted to its published EP 8 and EP 16 rows, bf16:"
    for phase, part in report["kernel_model"].items():
        yield from _fit_lines(phase, part)
    yield ""
    yield "Modelled and published: us of dispatch and combine; bound on paper with the fewest bytes any method needs; ratio"
    yield "(published on GPUs with the same NVLink; the ratio where the bound is a microsecond or more)"
    titles = ("tokens", "EP", "GPU", "format", "routing", "dispatch", "combine", "bound", "ratio", "kind", "library")
    yield from _table(titles, _beside_rows(report))
    yield ""
    yield "Published as bandwidth only, GB/s by their own definitions:"
    yield from _table(("EP", "GPU", "format", "dispatch", "combine", "library", "definition"), _rate_rows(report))
    yield ""
    yield "Sources:"
    entries = [*report["beside"], *report["published_rates"]]
    yield from (f"  {source}" for source in dict.fromkeys(entry["source"] for entry in entries if "source" in entry))


_PARTS = {
    "dispatch_fp8": "dispatch fp8",
    "dispatch_bf16": "dispatch bf16",
    "combine_rows": "our combine",
    "combine_reduced": "pre-reduced",
}


def _bound_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    for entry in report["bounds"]:
        yield [
            str(entry["num_ranks"]),
            str(entry["num_experts"]),
            f"{entry['ranks_per_token']:.2f}",
            f"{entry['duplicate_probability']:.0%}",
            str(entry["num_tokens"]),
            *(f"{entry['parts'][name]['line_us']:.1f} / {entry['parts'][name]['peak_us']:.1f}" for name in _PARTS),
        ]


def _fit_lines(phase: str, part: dict[str, Any]) -> Iterator[str]:
    model = part["parameters"]
    yield (
        f"  {phase}: max({model['floor_us']:.1f}, {model['start_us']:.1f} + wire bytes at {model['rate_gb_s']:.0f} GB/s, "
        f"{model['slowing']:.1%} slower each time the ranks double) us"
    )
    yield f"    fitted rows: {_errors(part['fitted'])}"
    for name, errors in part["held_out"].items():
        verdict = "within" if errors["median"] <= errors["bar"] else "BEYOND"
        yield f"    not fitted, {name}: {_errors(errors)}; {verdict} {errors['bar']:.0%}"
        yield "      " + ", ".join(
            f"EP{row['num_ranks']} T{row['num_tokens']} {row['error']:+.0%}" for row in errors["rows"]
        )


def _errors(errors: dict[str, Any]) -> str:
    return f"median error {errors['median']:.1%}, worst {errors['worst']:+.1%} of {len(errors['rows'])}"


def _beside_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    order = sorted(report["beside"], key=lambda e: (e["num_tokens"], e["num_ranks"], e["hardware"], e["format"]))
    for entry in order:
        yield [
            str(entry["num_tokens"]),
            str(entry["num_ranks"]),
            entry["hardware"] or "-",
            entry["format"] or "-",
            entry["routing"],
            *(_number(us) for us in entry["us"]),
            " / ".join(_number(bound) for bound in entry["bound_us"]),
            " / ".join(_number(ratio) for ratio in entry["ratio"]),
            entry["kind"],
            entry["library"],
        ]


def _rate_rows(report: dict[str, Any]) -> Iterator[list[str]]:
    for rate in report["published_rates"]:
        yield [
            str(rate["num_ranks"]),
            rate["hardware"],
            rate["dispatch_format"],
            _number(rate["dispatch_gb_s"]),
            _number(rate["combine_gb_s"]),
            rate["library"],
            rate["definition"],
        ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _table(titles: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    """Yield rows with columns as wide as their widest entry; the last is not padded."""
    cells = [list(titles), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles) - 1)]
    for row in cells:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=False)]
        yield "  " + "  ".join([*padded, row[-1]])


def measured(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the text of the figures of `all_to_all.run.measure`."""
    machine, setting = figures["machine"], figures["setting"]
    yield f"{machine['name']}: {machine['label']}"
    yield (
        f"{setting['hidden_size']} numbers a row, {setting['top_k']} of {setting['num_experts']} experts, "
        f"{setting['routing']} routing; median of {setting['runs']} runs of {setting['steps']} steps, slowest rank"
    )
    if figures["checked"]:
        yield "Several ranks on one GPU: correctness only, no times. Steps in which every combined row was the one sent:"
        yield from _table(("ranks", "tokens", "format", "steps", "launched"), _checked_rows(figures["checked"]))
    if not figures["rows"]:
        return
    titles = (
        "ranks",
        "tokens",
        "phase",
        "p50 us",
        "p99 us",
        "unique",
        "sent",
        "wire GB/s",
        "bound us",
        "ratio",
        "backend",
    )
    yield from _table(titles, _measured_rows(figures["rows"]))


def _checked_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        numbers = [str(row[name]) for name in ("ranks", "tokens", "format", "steps")]
        yield [*numbers, "from graphs" if row["graph"] else "one by one"]


def _measured_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in sorted(rows, key=lambda row: (row["ranks"], row["tokens"])):
        for phase in ("dispatch", "combine"):
            part = row[phase]
            yield [
                str(row["ranks"]),
                str(row["tokens"]),
                phase,
                _number(part["p50_us"]),
                _number(part["p99_us"]),
                *(f"{part['gb_s'][name]:.2f}" for name in ("unique", "sent", "wire")),
                _number(part["bound_us"]),
                _number(part["ratio"]),
                row["candidate"],
            ]


def loopback(figures: dict[str, Any]) -> Iterator[str]:
    """Yield the text of the figures of `all_to_all.loopback.run`."""
    machine = figures["machine"]
    yield (
        f"{machine['device']}, {machine['multiprocessors']} multiprocessors, one rank of several: us of a graph's kernels, "
        "without a wire; NVL72 is modelled: these plus the bytes at the best rate shown"
    )
    titles = (
        "ranks",
        "tokens",
        "format",
        "programs",
        *_LOOPBACK,
        "graph",
        "send GB/s",
        "a program",
        "NVL72 dispatch",
        "combine",
    )
    yield from _table(titles, _loopback_rows(figures["rows"]))


_LOOPBACK = ("plan", "send", "wait", "index", "combine")


def _loopback_rows(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        yield [
            *(str(row[name]) for name in ("ranks", "tokens", "format", "programs")),
            *(_number(row["us"][part]) for part in _LOOPBACK),
            _number(row["graph_us"]),
            _number(row["send_gb_s"]),
            f"{row['send_gb_s_per_program']:.1f}",
            *(_number(row["modelled_nvl72_us"][phase]) for phase in ("dispatch", "combine")),
        ]
