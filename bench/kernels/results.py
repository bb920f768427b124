"""Results of `bench kernels`, in one JSON file that is rewritten after every item, so that a run can be continued.

{"environment": ..., "ceilings": ..., "suites": {suite: {"items": {key: result}, "running": key or
null}}}
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expertwire.bench.kernels.models import Ceilings, Cost, floor_us

NAME = "kernels.json"


class Results:
    """The results file and its contents. One process at a time may write."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self._file = folder / NAME
        self.data = data

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Return the results in a folder.

        Raises:
            ValueError: there are none, or the file is not one of ours.
        """
        file = folder / NAME
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"--resume: there is no {file}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"--resume: {file} is not JSON: {error}") from None
        if not isinstance(data, dict) or "suites" not in data:
            raise ValueError(f"--resume: {file} has no results of this command")
        return cls(folder, data)

    def write(self) -> None:
        """Write the whole file, or nothing if this process dies."""
        new = self._file.with_suffix(".new")
        new.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self._file)

    def suite(self, name: str) -> dict[str, Any]:
        """Return a suite's entry, created if missing."""
        return self.data["suites"].setdefault(name, {"items": {}, "running": None, "since": None, "spent": 0.0})

    def begin(self, part: str, key: str) -> None:
        """Record that an item is about to run, in case the process dies."""
        self.suite(part).update(running=key, since=time.time())
        self.write()

    def finish(self, part: str, key: str, result: Mapping[str, Any]) -> None:
        """Record an item's result."""
        entry = self.suite(part)
        entry["items"][key] = {"seconds": round(time.time() - (entry["since"] or time.time()), 3), **result}
        entry.update(running=None, since=None)
        self.write()

    def fail_running(self, message: str) -> list[str]:
        """Mark items as failed that had begun when their process ended; return their keys."""
        failed = []
        for entry in self.data["suites"].values():
            if entry["running"] is not None:
                entry["items"][entry["running"]] = {"error": message}
                failed.append(entry["running"])
                entry.update(running=None, since=None)
        self.write()
        return failed

    def forget_failures(self) -> None:
        """Remove failed items, so that they run again."""
        for entry in self.data["suites"].values():
            entry["items"] = {key: item for key, item in entry["items"].items() if "error" not in item}
            entry.update(running=None, since=None, spent=0.0)

    def ceilings(self) -> Ceilings | None:
        """Return the measured ceilings; None if there are none."""
        found = self.data.get("ceilings")
        if not found:
            return None
        rates = {name: found[name] for name in ("bf16", "fp8") if name in found}
        return Ceilings(bytes_per_s=found["bytes_per_s"], flops_per_s={"fp8": rates["bf16"], **rates})

    def items(self, *, kind: str | None = None) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Yield suite, key and result; `kind`: only those with this entry, "us", "findings", "classes" or "error"."""
        for suite, entry in self.data["suites"].items():
            for key, item in entry["items"].items():
                if kind is None or kind in item:
                    yield suite, key, item

    def find(self, key: str) -> dict[str, Any] | None:
        """Return a result by its key."""
        return next((item for _, other, item in self.items() if other == key), None)


def figures(item: Mapping[str, Any], ceilings: Ceilings) -> dict[str, dict[str, float]]:
    """Return us, useful TFLOP/s, GB/s of the least bytes, and the floor's share of the time, for each
    call of a timed item.
    """
    cost = Cost(bytes=item["bytes"], flops=item["flops"], rate=item["rate"])
    floor, bound = floor_us(cost, ceilings)
    found = {}
    for name, time_us in item["us"].items():
        if "median" in time_us:
            us = time_us["median"]
            found[name] = {"us": us, "tflops": cost.flops / us / 1e6, "gbs": cost.bytes / us / 1e3, "floor": floor / us}
    for part, share in (("w13", 2 / 3), ("w2", 1 / 3)):
        if part in found:
            found[part] = {"us": found[part]["us"], "tflops": share * cost.flops / found[part]["us"] / 1e6}
    for figure in found.values():
        figure["compute_bound"] = bound == "compute"
    return found


def best_peer(found: Mapping[str, Mapping[str, float]], peers: list[str]) -> tuple[str, float] | None:
    """Return the fastest peer, and its time over ours: above 1 ours is faster."""
    times = {name: found[name]["us"] for name in peers if name in found}
    if not times or "ours" not in found:
        return None
    name = min(times, key=lambda peer: times[peer])
    return name, times[name] / found["ours"]["us"]


def bars(results: Results) -> list[dict[str, Any]]:
    """Return the bars: what is measured, the bar, our figure (None if not measured), and whether it is met."""
    ceilings, rows = results.ceilings(), []

    def row(what: str, bar: float, unit: str, value: float | None, *, at_most: bool = False) -> None:
        met = None if value is None else bool(value <= bar if at_most else value >= bar)
        sign = "<=" if at_most else ">="
        rows.append({"what": what, "bar": f"{sign} {bar:g} {unit}".rstrip(), "value": value, "met": met})

    def figure(key: str, name: str = "tflops", call: str = "ours") -> float | None:
        item = results.find(key)
        if item is None or "us" not in item or ceilings is None:
            return None
        return figures(item, ceilings).get(call, {}).get(name)

    def ratio(numerator: float | None, denominator: float | None) -> float | None:
        return numerator / denominator if numerator and denominator else None

    qwen3 = "qwen3-30b dense EP1 T{}".format
    for tokens, bar in ((4096, 500), (8192, 560)):
        key = qwen3(tokens)
        row(f"bf16 pair, Qwen3-30B, {tokens} tokens", bar, "TFLOP/s", figure(key))
        beside = ratio(figure(key, "us", "grouped_mm"), figure(key, "us"))
        row(f"  beside grouped_mm, its gather and activation, {tokens} tokens", 1.0, "x", beside)
    for tokens, bar in ((1, 55), (8, 75)):
        share = figure(qwen3(tokens), "floor")
        row(f"bf16 pair, Qwen3-30B, {tokens} tokens", bar, "% of the floor", None if share is None else 100 * share)
    floors = [
        100 * share
        for tokens in (2**i for i in range(5, 12))
        if (share := figure(qwen3(tokens), "floor")) is not None and not figure(qwen3(tokens), "compute_bound")
    ]
    row("  the least of 32 to 2048 tokens, where memory bounds", 85, "% of the floor", min(floors, default=None))
    row("fp8 blocks, DeepSeek-V3 EP8, 8192 tokens, products alone", 700, "TFLOP/s", _both_products(results))
    for tokens, bar in ((1, 40), (8, 160)):
        value = figure(f"gpt-oss-120b mxfp4 EP1 T{tokens}", "us")
        row(f"MXFP4 pair, gpt-oss-120b, {tokens} tokens", bar, "us", value, at_most=True)
    share = figure("qwen3-30b decode 64 x 8k", "floor")
    row("paged decode attention, 64 x 8k", 80, "% of bandwidth", None if share is None else 100 * share)
    row("routing and metadata, 256 experts, 128 tokens", 10, "us", figure("route deepseek-v3 T128", "us"), at_most=True)
    return rows


def _both_products(results: Results) -> float | None:
    """Return the TFLOP/s of the two products without what runs between them."""
    item = results.find("deepseek-v3 fp8_block EP8 T8192") or {}
    times = [time_us["median"] for name in ("w13", "w2") if "median" in (time_us := item.get("us", {}).get(name, {}))]
    return item["flops"] / sum(times) / 1e6 if len(times) == 2 else None


def invariance_costs(results: Results) -> dict[str, float]:
    """Return the time of invariant mode over fast mode, where a kernel has both."""
    found = {}
    for _, key, item in results.items(kind="us"):
        times = [item["us"].get(name, {}).get("median") for name in ("ours", "ours, fast")]
        if None not in times:
            found[key] = times[0] / times[1]
    return found


def issue_bars(results: Results) -> list[dict[str, Any]]:
    """Return the bars of a first run on a GPU: what, our figure (None if not measured), its unit, the
    minimum, and its source.
    """
    ceilings, rows = results.ceilings(), []

    def row(
        what: str, key: str, name: str, bar: float, unit: str, source: str, call: str = "ours", scale: float = 1.0
    ) -> None:
        item = results.find(key) or {}
        found = figures(item, ceilings).get(call, {}) if "us" in item and ceilings is not None else {}
        value = found[name] * scale if name in found else None
        rows.append({"what": what, "value": value, "unit": unit, "bar": bar, "source": source})

    for tokens in (4096, 8192):
        row(
            f"grouped GEMM bf16, {tokens} tokens",
            f"qwen3-30b dense EP1 T{tokens}",
            "tflops",
            700,
            "TFLOP/s",
            "kernels.md",
        )
    fp8: dict[str, str | float | None] = {
        "what": "grouped GEMM fp8, 8192 tokens",
        "unit": "TFLOP/s",
        "bar": 1300,
        "source": "kernels.md",
    }
    rows.append({**fp8, "value": _both_products(results)})
    for tokens in (8, 64):
        key = f"qwen3-30b dense EP1 T{tokens}"
        row(f"grouped GEMM bf16, {tokens} tokens", key, "floor", 90, "% of bandwidth", "kernels.md", scale=100)
    key = "qwen3-30b prefill 8k"
    row("prefill attention 8k, fast", key, "tflops", 500, "TFLOP/s", "performance.md", call="ours, fast")
    row("prefill attention 8k, invariant", key, "tflops", 500, "TFLOP/s", "performance.md")
    return rows
