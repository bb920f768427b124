"""The suites of `bench kernels`: their items, how these are compiled beforehand, and how they run."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from expertwire.bench.kernels import attention as kernels_attention
from expertwire.bench.kernels import (
    bits,
    checks_caches,
    checks_layer_ops,
    experts,
    gated_delta_rule,
    layer_ops,
    mamba2,
    recurrent,
    selective_scan,
)
from expertwire.bench.kernels import checks as kernels_checks
from expertwire.bench.kernels.measure import Bits, Check, Item, TensorRng, last_line, measure_ceilings, run_item
from expertwire.bench.kernels.results import Results
from expertwire.kernels.gpu.device import Device, describe

# Seconds of a full and of a quick run.
SECONDS: Mapping[str, tuple[float, float]] = {
    "experts-qwen3": (50, 18),
    "attention": (40, 10),
    "check-experts": (40, 12),
    "experts-deepseek": (60, 15),
    "check-attention": (25, 8),
    "bits": (30, 10),
    "routing": (8, 4),
    "check-layer-ops": (30, 8),
    "experts-gpt-oss": (40, 10),
    "sampling": (12, 5),
    "latent": (15, 5),
    "layer-ops": (40, 8),
    "recurrent": (25, 8),
    "experts-more": (105, 5),
}


def items(name: str, quick: bool, tiny: bool) -> list[Item]:
    """Return the items of a suite, the most important first."""
    if name.startswith("experts-"):
        return experts.items(name, quick)
    match name:
        case "check-experts":
            return kernels_checks.expert_items(quick, tiny)
        case "check-attention":
            return kernels_checks.attention_items(quick, tiny)
        case "check-layer-ops":
            rooms = checks_layer_ops.items, mamba2.check_items, gated_delta_rule.check_items, selective_scan.check_items
            return [item for room in (*rooms, checks_caches.items) for item in room(quick, tiny)]
        case "bits":
            return bits.items(quick, tiny) + mamba2.bits_items()
        case "attention":
            return kernels_attention.items(quick)
        case "latent":
            return kernels_attention.latent_items(quick)
        case "routing":
            return layer_ops.routing_items(quick)
        case "sampling":
            return layer_ops.sampling_items(quick)
        case "recurrent":
            return recurrent.items(quick)
    assert name == "layer-ops", name
    return layer_ops.other_items(quick)


def to_compile(results: Results, names: list[str], quick: bool) -> list[tuple[str, int]]:
    """Return suite and index of every item without a result whose kernels can be compiled beforehand.

    The suites alternate: neighbours in a suite often need the same kernel, and processes should not
    compile it at the same time.
    """
    every = [(place, name, item) for name in names for place, item in enumerate(items(name, quick, False))]
    wanted = [
        (place, name) for place, name, item in every if warms(item) and item.key not in results.suite(name)["items"]
    ]
    return [(name, place) for place, name in sorted(wanted, key=lambda task: task[0])]


def missing(results: Results, names: list[str], quick: bool, tiny: bool) -> dict[str, list[str]]:
    """Return the items without a result, by suite."""
    found = {}
    for name in names:
        done = results.suite(name)["items"]
        if absent := [item.key for item in items(name, quick, tiny) if item.key not in done]:
            found[name] = absent
    return found


def warms(item: Item) -> bool:
    """Return whether an item can launch its kernels without running them."""
    return not isinstance(item, Check) or item.warm is not None


@contextmanager
def compiling_only(loaded: bool = True) -> Iterator[None]:
    """Let launches of Triton kernels compile only. `loaded`: also load the binary, which needs the device."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if loaded and kernel is not None:
            kernel._init_handles()
        return kernel

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch


def warm(item: Item, gpu: Device) -> None:
    """Call everything of ours that an item launches, on tensors without storage."""
    rng = TensorRng.of("meta", gpu, torch.bfloat16, 0, item.key)
    if isinstance(item, Bits):
        item.run(rng)
    elif isinstance(item, Check):
        assert item.warm is not None, item.key
        item.warm(rng)
    else:
        work = item.prepare(rng)
        for name, calls in work.calls.items():
            if name not in work.peers:
                calls[0]()


def compile_item(name: str, place: int, quick: bool) -> str | None:
    """Compile an item's kernels, in a process of its own; return the error, if any."""
    item = items(name, quick, False)[place]
    try:
        with compiling_only():
            warm(item, describe("cuda"))
    except Exception as error:  # noqa: BLE001 - the item will fail again, and say so
        return f"{item.key}: {last_line(error)}"
    return None


def compile_all(tasks: list[tuple[str, int]], quick: bool, processes: int, until: float) -> tuple[list[str], int]:
    """Return error messages and the number of items compiled; the others compile when they run."""
    failures, done = [], 0
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    futures = [pool.submit(compile_item, name, place, quick) for name, place in tasks]
    try:
        for future in as_completed(futures, timeout=max(1.0, until - time.time())):
            message = future.result()
            done += 1
            if message is not None:
                failures.append(message)
    except (TimeoutError, BrokenProcessPool) as error:
        failures.append(f"{len(tasks) - done} items were not compiled beforehand: {last_line(error)}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return failures, done


def run_suites(results: Results, names: list[str], quick: bool, device: str, deadline: float) -> None:
    """Run the items without a result, as far as the time allows."""
    tiny = device == "cpu"
    gpu = Device(arch=90, num_sms=2) if tiny else describe(device)
    dtype = torch.float32 if tiny else torch.bfloat16
    if not tiny and "ceilings" not in results.data:
        results.data["ceilings"] = measure_ceilings(quick)
        results.write()
    for name in names:
        if time.time() >= deadline:
            break
        run_suite(results, name, items(name, quick, tiny), gpu, dtype, device, SECONDS[name][quick], deadline)


def run_suite(
    results: Results,
    name: str,
    suite_items: list[Item],
    gpu: Device,
    dtype: torch.dtype,
    device: str,
    seconds: float,
    deadline: float,
) -> None:
    """Run a suite's items one after another, as far as its time allows."""
    entry = results.suite(name)
    for item in suite_items:
        if item.key in entry["items"]:
            continue
        if time.time() >= deadline or (device != "cpu" and entry["spent"] >= seconds):
            break
        began = time.time()
        results.begin(name, item.key)
        try:
            result = run_item(item, TensorRng.of(device, gpu, dtype, results.data["seed"], item.key))
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is its result
            result = {"error": last_line(error), "traceback": "".join(traceback.format_exception(error))[-2000:]}
        alive = device == "cpu" or _settle()
        entry["spent"] += time.time() - began
        results.finish(name, item.key, result)
        print(f"  {name}: {item.key}: {_summary(result)}", flush=True)
        if not alive:
            sys.exit(3)
    results.write()


def _settle() -> bool:
    """Free memory for the next item; return False if this process can no longer use the device."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _summary(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    if "us" in result:
        return ", ".join(f"{call} {time['median']:.1f} us" for call, time in result["us"].items() if "median" in time)
    return "ok" if result["ok"] else "not equal" if "classes" in result else "WRONG"
