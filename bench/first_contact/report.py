"""The short report of `bench first_contact`: a verdict a stage, the worst figures beside their bars, the first error
of each stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from expertwire.bench.first_contact import stage_supervisor
from expertwire.bench.first_contact.stage_record import NOT_RUN

MOST_CHARACTERS = 10_000
_WORST = 3
_MOST_LINE = 150
_MOST_FIGURES = 40
_MOST_KERNELS = 8
_LEAST_TRACEBACK = 300


def summary(results: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the report of all stages as text, of `MOST_CHARACTERS` at most."""
    stages = results["stages"]
    head = [f"first contact, {results['date']}, {_device(results)}"]
    if results["interpreted"]:
        head.append("INTERPRETED ON A CPU, toy sizes: this shows that the command works; there are no times.")
    head += [stage_line(name, stages[name]) if name in stages else f"{name:<20}not run" for name in names]
    head += ["", *_worst_lines(stages)]
    errors = list(_error_blocks(stages))
    details = "\n".join([*_figure_lines(stages), *_fact_lines(stages)])
    text = "\n".join(head)
    room = MOST_CHARACTERS - len(text) - 200
    share = max(_LEAST_TRACEBACK, room * 2 // 3 // max(1, len(errors)))
    tracebacks = "\n".join(f"\n{title}\n{_end(body, share)}" for title, body in errors)[: max(0, room)]
    details = _cut(details, room - len(tracebacks))
    return f"{text}\n{details}\n{tracebacks}"[:MOST_CHARACTERS]


def stage_line(name: str, found: Mapping[str, Any]) -> str:
    """Return a line with a stage's verdict, checks and figures."""
    checks, figures = found["checks"], found["figures"]
    right = sum(check["ok"] for check in checks)
    counts = [f"{right} of {len(checks)} checks right"] if checks else []
    counts += [f"{len(figures)} figures"] if figures else []
    counts += [f"{len(found['errors'])} errors"] if found["errors"] else []
    counts += [found["facts"][NOT_RUN]] if NOT_RUN in found["facts"] else []
    return f"{name:<20}{found['verdict']:<9}{found['seconds']:>6.0f} s  {', '.join(counts)}"[:_MOST_LINE]


def share_of_bar(figure: Mapping[str, Any]) -> float:
    """1 is the bar; below it, it is missed."""
    value, bar = figure["value"], figure["bar"]
    if not value:
        return 0.0
    return bar / value if figure["at_most"] else value / bar


def _device(results: Mapping[str, Any]) -> str:
    facts = results["stages"].get("environment", {}).get("facts", {})
    versions = " ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    name = facts["device"]["name"] if "device" in facts else facts.get("cpu", results["device"])
    return f"{name}, python {facts.get('python', '?')}, {versions}"


def _worst_lines(stages: Mapping[str, Any]) -> Iterator[str]:
    barred = [figure for found in stages.values() for figure in found["figures"] if "bar" in figure]
    ranked = sorted(barred, key=share_of_bar)
    if ranked:
        met = sum(share_of_bar(figure) >= 1 for figure in ranked)
        yield f"bars: {met} of {len(ranked)} met; the worst {min(_WORST, len(ranked))}:"
    for figure in ranked[:_WORST]:
        sign = "<=" if figure["at_most"] else ">="
        wanted = f"{sign} {figure['bar']:g} {figure['unit']} ({figure['source']})"
        yield f"  {figure['figure']}: {_number(figure['value'])} of {wanted}, {100 * share_of_bar(figure):.0f}%"


def _figure_lines(stages: Mapping[str, Any]) -> Iterator[str]:
    figures = [figure for found in stages.values() for figure in found["figures"]]
    if figures:
        yield "\nfigures:"
    for figure in figures[:_MOST_FIGURES]:
        yield f"  {figure['figure']}: {_number(figure['value'])} {figure['unit']}"
    if len(figures) > _MOST_FIGURES:
        yield f"  ... and {len(figures) - _MOST_FIGURES} more in first_contact.json"


def _fact_lines(stages: Mapping[str, Any]) -> Iterator[str]:
    for found in stages.values():
        for name, value in found["facts"].items():
            if name.startswith("trace of") and "kernels" in value:
                counts = f"{value['launches_per_step']:.0f} launches, {value['kernels_per_step']:.0f} kernels"
                yield f"\n{name}, of a step: {counts},"
                yield f"  {value['busy_us_per_step']:.0f} us in them and {value['gap_us_per_step']:.0f} us between them"
                for kernel in value["kernels"][:_MOST_KERNELS]:
                    share, number = 100 * kernel["share"], kernel["per_step"]
                    yield f"  {share:>4.0f}% {number:>5.0f} x {kernel['us']:.1f} us  {kernel['name'][:60]}"
            elif name.startswith("kernels/"):
                yield f"\n{name}: {value}"


def _error_blocks(stages: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a title and a text for each stage that has not passed: its first error or wrong check, or its last output."""
    for name, found in stages.items():
        if found["verdict"] in ("passed", NOT_RUN):
            continue
        wrong = [check for check in found["checks"] if not check["ok"]]
        if wrong:
            yield f"{name}: {len(wrong)} wrong, the first is {wrong[0]['check']}:", wrong[0]["says"]
        if found["errors"]:
            first = found["errors"][0]
            output = found["output"] if stage_supervisor.ENDED in first["traceback"] else ""
            yield f"{name}: {found['verdict']}, first in {first['error']}:", output + "\n" + first["traceback"]
        elif not wrong:
            yield f"{name}: {found['verdict']}; its output ends so:", found["output"]


def _end(text: str, most: int) -> str:
    """Return the last characters of a text, `most` of them at most, from the beginning of a line on."""
    text = text.strip()
    if len(text) <= most:
        return text
    return "..." + text[-most:].partition("\n")[2]


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return text[: max(0, most)].rpartition("\n")[0] + "\n  ... the rest is in first_contact.json"


def _number(value: float | None) -> str:
    if value is None:
        return "not a number"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
