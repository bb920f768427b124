"""Tables of `bench kernels`: a long one for a file, and a short one that ends the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from expertwire.bench.kernels.measure import is_fine
from expertwire.bench.kernels.models import Ceilings
from expertwire.bench.kernels.results import Results, bars, best_peer, figures, invariance_costs

SHOWN_TOKENS = (1, 8, 64, 512, 4096, 8192)
MOST_CHARACTERS = 11_500  # of the short table
MOST_LINES = 12  # of a list of failures


def short_table(results: Results) -> str:
    """Return the short table, the bars last."""
    lines, ceilings = [*_head(results), *_check_lines(results)], results.ceilings()
    if ceilings is not None:
        lines += [*_expert_lines(results, ceilings), *_cost_lines(results), *_other_lines(results, ceilings)]
    lines += _bit_lines(results)
    tail = "\n".join([*_left_out_lines(results), *_bar_lines(results)])
    text = "\n".join(lines)
    budget = MOST_CHARACTERS - len(tail) - 80
    if len(text) > budget:
        text = text[:budget].rsplit("\n", 1)[0] + "\n... the rest is in report.txt"
    return f"{text}\n{tail}"


def long_table(results: Results) -> str:
    """Return the long table: every call of every item."""
    ceilings, lines = results.ceilings(), [*_head(results), ""]
    lines.append(f"{'item':<44}{'call':<16}{'us':>10}{'slowest':>10}{'TFLOP/s':>9}{'GB/s':>8}{'floor':>7}")
    for _, key, item in results.items(kind="us"):
        if "not compared" in item:
            lines.append(f"{key:<44}not compared with {item['not compared']}")
        found = {} if ceilings is None else figures(item, ceilings)
        for call, time_us in item["us"].items():
            if "error" in time_us:
                lines.append(f"{key:<44}{call:<16}{time_us['error']}")
                continue
            row = found.get(call, {"us": time_us["median"]})
            rates = f"{row.get('tflops', 0.0):>9.1f}{row.get('gbs', 0.0):>8.0f}{_percent(row.get('floor')):>7}"
            lines.append(f"{key:<44}{call:<16}{row['us']:>10.1f}{time_us['slowest']:>10.1f}{rates}")
    lines += ["", *_finding_lines(results), "", short_table(results)]
    return "\n".join(lines)


def _head(results: Results) -> list[str]:
    data = results.data
    environment, found = data["environment"], data.get("ceilings")
    versions = " ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [f"{environment['gpu']}, {versions}, {data['date']}, seed {data['seed']}, {data.get('seconds', 0):.0f} s"]
    if found:
        rates = ", ".join(
            f"{name} product {found[name] / 1e12:.0f} TFLOP/s" for name in ("bf16", "fp8") if name in found
        )
        lines.append(f"measured ceilings: copy {found['bytes_per_s'] / 1e12:.2f} TB/s (read and written), {rates}")
    compiled = data.get("compiled")
    if compiled:
        lines.append(
            f"compiled beforehand: {compiled['items']} items in {compiled['seconds']:.0f} s by {compiled['processes']} processes"
        )
        lines += [f"  does not compile: {message}" for message in compiled["failures"][:MOST_LINES]]
    return lines


def _check_lines(results: Results) -> Iterator[str]:
    checks = list(results.items(kind="findings"))
    wrong = [(key, item) for _, key, item in checks if not item["ok"]]
    if checks:
        yield f"\ncorrectness: {len(checks) - len(wrong)} of {len(checks)} checks passed"
    for key, item in wrong[:MOST_LINES]:
        bad = (
            f"{name} {_number(found)} > {most:g}"
            for name, (found, most) in item["findings"].items()
            if not is_fine((found, most))
        )
        yield f"  WRONG {key}: {', '.join(bad)}"[:160]
    if len(wrong) > MOST_LINES:
        yield f"  ... and {len(wrong) - MOST_LINES} more"


def _finding_lines(results: Results) -> Iterator[str]:
    for _, key, item in results.items(kind="findings"):
        found = ", ".join(f"{name} {_number(value)}" for name, (value, _) in item["findings"].items())
        yield f"{'ok   ' if item['ok'] else 'WRONG'} {key}: {found}"


def _bit_lines(results: Results) -> Iterator[str]:
    items = list(results.items(kind="classes"))
    if items:
        yield "\nequal bits (classes of what gave the same):"
    for _, key, item in items:
        names: dict[str, list[str]] = {}
        for name, classes in item["classes"].items():
            verdict = (
                "all equal: " + ", ".join(classes[0]) if len(classes) == 1 else " | ".join(map(", ".join, classes))
            )
            names.setdefault(verdict, []).append(name)
        for verdict, alike in names.items():
            mark = "  " if verdict.startswith("all equal") else "!="
            yield f"  {mark} {key}, {' and '.join(alike)}: {verdict}"[:200]


def _expert_lines(results: Results, ceilings: Ceilings) -> Iterator[str]:
    """Yield a line a series: us, share of the floor, and the best peer's time over ours."""
    series: dict[str, dict[int, dict[str, Any]]] = {}
    for suite, key, item in results.items(kind="us"):
        if suite.startswith("experts-"):
            series.setdefault(key.rpartition(" T")[0], {})[item["tokens"]] = item
    if series:
        yield (
            f"\nexperts: us | share of the floor | best peer's time over ours\n  {'tokens of each rank':<26}"
            + "".join(f"{tokens:>19}" for tokens in SHOWN_TOKENS)
        )
    for name, by_tokens in series.items():
        cells = (_cell(by_tokens.get(tokens), ceilings) for tokens in SHOWN_TOKENS)
        yield f"  {name:<26}" + "".join(f"{cell:>19}" for cell in cells)


def _cell(item: dict[str, Any] | None, ceilings: Ceilings) -> str:
    if item is None:
        return "-"
    found = figures(item, ceilings)
    peer = best_peer(found, item["peers"])
    return f"{_us(found['ours']['us'])} {_percent(found['ours']['floor'])}" + (f" {peer[1]:.2f}x" if peer else "")


def _other_lines(results: Results, ceilings: Ceilings) -> Iterator[str]:
    lines = []
    for suite, key, item in results.items(kind="us"):
        if not suite.startswith("experts-"):
            lines.append(f"{key}: {_cell(item, ceilings)}")
    if lines:
        yield "\nthe rest: us | share of the floor | best peer's time over ours"
    for i in range(0, len(lines), 3):
        yield "  " + "".join(f"{line:<48}" for line in lines[i : i + 3]).rstrip()


def _cost_lines(results: Results) -> Iterator[str]:
    costs = invariance_costs(results)
    if costs:
        yield "\ninvariant over fast: " + ", ".join(
            f"{key} {cost:.2f}x" for key, cost in list(costs.items())[:MOST_LINES]
        )


def _left_out_lines(results: Results) -> Iterator[str]:
    failed = [(key, item["error"]) for _, key, item in results.items(kind="error")]
    if failed:
        yield f"\nfailed: {len(failed)}"
    for key, message in failed[:MOST_LINES]:
        yield f"  {key}: {message}"[:180]
    for suite, keys in results.data.get("not_reached", {}).items():
        yield f"not reached in time: {suite}: {len(keys)} items, from {keys[0]!r} on"


def _bar_lines(results: Results) -> Iterator[str]:
    yield f"\n{'bar (invariant mode)':<66}{'wanted':<24}{'ours':>10}"
    for row in bars(results):
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[row["met"]]
        yield f"{row['what']:<66}{row['bar']:<24}{value:>10}  {verdict}"
    yield "engine decode and its gaps: not of kernels; `expertwire bench throughput` measures the engine"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2g}"
