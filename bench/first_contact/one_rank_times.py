"""Measure one rank's engine: decode, prefill and mixed steps, host time, and a short profiler trace."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from expertwire.bench.first_contact.one_rank import OneRank, Step, prompts, request

_SKIPPED = 4  # the first steps of a kind, in which caches and clocks are cold
_SHOWN_KERNELS, _SHOWN_GAPS = 15, 5
_LAUNCHES = ("LaunchKernel", "GraphLaunch")


def decode(rank: OneRank, batch: int, context: int, num_steps: int) -> list[Step]:
    """Return the steps in which all of `batch` requests decode, each behind a prompt of `context` tokens."""
    _submit(rank, batch, context, num_steps + _SKIPPED + 1)
    steps = [step for step in rank.run()[1] if step.tokens == step.sequences == batch]
    return steps[min(_SKIPPED, len(steps) - 1) :]


def prefill(rank: OneRank, length: int, number: int) -> list[Step]:
    """Return the steps of `number` prompts of `length` tokens, one a step."""
    found = []
    for _ in range(number + 1):
        _submit(rank, 1, length, 1)
        found += [step for step in rank.run()[1] if step.tokens == length]
    return found[1:] if number else found


def mixed(rank: OneRank, batch: int, context: int, chunk: int, number: int) -> list[Step]:
    """Return the steps in which a prompt of `chunk` tokens is computed beside `batch` requests that decode."""
    chunks = -(-batch * context // rank.sizes.max_num_batched_tokens)
    _submit(rank, batch, context, number * 4 + chunks + 2 * _SKIPPED)
    rank.run(chunks + _SKIPPED)
    found: list[Step] = []
    for i in range(number):
        rank.submit([request(10_000 + i, prompts(rank.config.vocab_size, [chunk], seed=9 + i)[0], max_tokens=1)])
        found += [step for step in rank.run(3)[1] if step.tokens > step.sequences]
    rank.run()
    return found


def _submit(rank: OneRank, batch: int, context: int, num: int) -> None:
    drawn = prompts(rank.config.vocab_size, [context] * batch)
    rank.submit(request(key, ids, max_tokens=num) for key, ids in enumerate(drawn))


def tokens_per_s(steps: Sequence[Step]) -> float:
    """Times of consecutive steps."""
    return sum(step.tokens for step in steps[1:]) / (steps[-1].done_s - steps[0].done_s)


def medians(steps: Sequence[Step]) -> dict[str, float]:
    """us of a step on the device and on the host."""
    return {name: statistics.median(getattr(step, name) for step in steps) for name in ("device_us", "host_us")}


def trace(rank: OneRank, batch: int, context: int, num_steps: int) -> dict[str, Any]:
    """`summary` of some decode steps."""
    _submit(rank, batch, context, num_steps + 3 * _SKIPPED)
    rank.run(-(-batch * context // rank.sizes.max_num_batched_tokens) + _SKIPPED)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        steps = rank.run(num_steps)[1]
    with tempfile.TemporaryDirectory(prefix="trace-") as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    rank.run()
    return summary(events, len(steps))


def summary(events: Sequence[Mapping[str, Any]], num_steps: int) -> dict[str, Any]:
    """Return the time of a trace in Chrome's format by kernel and by gap, in us.

    Args:
        events: the trace's; those with "ph" "X" have a name, a category, a start "ts" and a duration "dur".
        num_steps: that it has.

    Returns:
        JSON values: of a step, launches by the host, kernels, time in kernels and between them; the kernels that take the most
        time, each with its share of the time in kernels; the largest gaps, with the kernels around each.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    on_device = sorted(
        (event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")),
        key=lambda event: event["ts"],
    )
    launches = sum(
        any(name in event["name"] for name in _LAUNCHES) for event in complete if "cuda" in event.get("cat", "")
    )
    by_name: dict[str, list[float]] = {}
    gaps, end, last = [], None, ""
    for event in on_device:
        by_name.setdefault(event["name"], []).append(event["dur"])
        if end is not None and event["ts"] > end:
            gaps.append((event["ts"] - end, last, event["name"]))
        if end is None or event["ts"] + event["dur"] > end:
            end, last = event["ts"] + event["dur"], event["name"]
    busy = sum(map(sum, by_name.values()))
    ranked = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_SHOWN_KERNELS]
    return {
        "steps": num_steps,
        "launches_per_step": launches / max(1, num_steps),
        "kernels_per_step": len(on_device) / max(1, num_steps),
        "busy_us_per_step": busy / max(1, num_steps),
        "gap_us_per_step": sum(gap for gap, _, _ in gaps) / max(1, num_steps),
        "kernels": [
            {
                "name": name[:80],
                "share": sum(us) / busy,
                "us": statistics.mean(us),
                "per_step": len(us) / max(1, num_steps),
            }
            for name, us in ranked
        ],
        "gaps": [
            {"us": gap, "after": after[:60], "before": before[:60]}
            for gap, after, before in sorted(gaps)[::-1][:_SHOWN_GAPS]
        ],
    }
