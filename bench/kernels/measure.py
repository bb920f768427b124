"""Items of `bench kernels`, random inputs for them, and their time in CUDA graphs.

An item can be prepared on a device, or on "meta", where tensors have no storage and its kernels are
compiled but not run.
"""

from __future__ import annotations

import math
import statistics
import traceback
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from expertwire.bench.kernels.models import Cost
from expertwire.kernels.gpu.device import Device

ROTATED_BYTES = 256e6  # between two uses of the same weights: several times the L2 cache
MAX_REPLICAS = 64
_DRAWN_AT_ONCE = 1 << 26  # numbers
LEAST_REPLAYS, MOST_REPLAYS, REPLAYS_MS = 5, 50, 25.0

Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class TensorRng:
    """Random tensors on a device; `generator` is None on "meta"."""

    device: str
    gpu: Device
    dtype: torch.dtype  # of activations and dense weights
    generator: torch.Generator | None

    @classmethod
    def of(cls, device: str, gpu: Device, dtype: torch.dtype, seed: int, key: str) -> TensorRng:
        """Return an item's own generator: its numbers do not depend on what ran before it."""
        generator = None
        if device != "meta":
            generator = torch.Generator(device).manual_seed(seed ^ zlib.crc32(key.encode()))
        return cls(device=device, gpu=gpu, dtype=dtype, generator=generator)

    @property
    def is_meta(self) -> bool:
        return self.generator is None

    @property
    def tiny(self) -> bool:
        """Return whether kernels are interpreted, where only tiny shapes finish in time."""
        return self.device == "cpu"

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers; fp8 and other dtypes without generators are rounded from bf16, a chunk at a time."""
        dtype = dtype or self.dtype
        if self.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        if dtype.itemsize > 1:
            drawn = torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device)
            return drawn if scale == 1.0 else drawn.mul_(scale)
        out = torch.empty(shape, dtype=dtype, device=self.device)
        for part in out.view(-1).split(_DRAWN_AT_ONCE):
            part.copy_(torch.randn(part.shape, generator=self.generator, device=self.device).mul_(scale))
        return out

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Return integers in [low, high)."""
        if self.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Return fp32 numbers in [low, high)."""
        if self.is_meta:
            return torch.empty(shape, device="meta")
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def fixed(self, values: Sequence[int], dtype: torch.dtype = torch.int32) -> Tensor:
        """Return these integers as a tensor on the device."""
        return torch.tensor(values, dtype=dtype).to(self.device)


@dataclass(frozen=True, kw_only=True)
class TimedCalls:
    """Calls to time, by implementation: replicas with weights and routing of their own, run one after the other.

    peers: names in `calls` that are not ours; they may fail or be absent. labels: values for the
    results file.
    """

    calls: Mapping[str, Sequence[Call]]
    cost: Cost
    peers: frozenset[str] = frozenset()
    labels: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timed:
    """An item that is timed."""

    key: str
    prepare: Callable[[TensorRng], TimedCalls]


@dataclass(frozen=True)
class Check:
    """An item that is compared with a reference; `run` returns findings: name -> (found, allowed).

    It passes if every value found is at most the one allowed. `warm` launches, on "meta", the
    kernels that take long to compile.
    """

    key: str
    run: Callable[[TensorRng], Mapping[str, tuple[float, float]]]
    warm: Callable[[TensorRng], object] | None = None


@dataclass(frozen=True)
class Bits:
    """An item that computes the same rows in several ways; `run` returns name of the rows -> way -> the rows."""

    key: str
    run: Callable[[TensorRng], Mapping[str, Mapping[str, Tensor]]]


Item = Timed | Check | Bits


def replicas(bytes_each: float, *, least: int = 4) -> int:
    """Return how many calls to run in turn so that caches cannot hold what they read."""
    return int(min(MAX_REPLICAS, max(least, -(-ROTATED_BYTES // max(bytes_each, 1.0)))))


def copies(bytes_each: float) -> int:
    """Return how many copies of weights of this size to rotate."""
    return int(min(MAX_REPLICAS, max(1, -(-ROTATED_BYTES // max(bytes_each, 1.0)))))


def run_item(item: Item, rng: TensorRng) -> dict[str, Any]:
    """Return an item's result as JSON values."""
    if isinstance(item, Check):
        findings = item.run(rng)
        assert findings, f"{item.key} has compared nothing"
        listed = {name: [found if math.isfinite(found) else None, most] for name, (found, most) in findings.items()}
        return {"findings": listed, "ok": all(is_fine(finding) for finding in listed.values())}
    if isinstance(item, Bits):
        found = {name: equal_bits(ways) for name, ways in item.run(rng).items()}
        assert found, f"{item.key} has compared nothing"
        return {"classes": found, "ok": all(len(classes) == 1 for classes in found.values())}
    work = item.prepare(rng)
    return {
        "us": _times(work),
        "bytes": work.cost.bytes,
        "flops": work.cost.flops,
        "rate": work.cost.rate,
        "peers": sorted(work.peers),
        **work.labels,
    }


def is_fine(finding: Sequence[float | None]) -> bool:
    """Return whether what was found is at most what is allowed; None stands for NaN or infinity."""
    found, allowed = finding
    return found is not None and allowed is not None and found <= allowed


def equal_bits(ways: Mapping[str, Tensor]) -> list[list[str]]:
    """Return names in classes of bitwise equal tensors; the first class is that of the first name."""
    found: list[tuple[Tensor, list[str]]] = []
    for name, result in ways.items():
        for other, names in found:
            if same_bits(result, other):
                names.append(name)
                break
        else:
            found.append((result, [name]))
    return [names for _, names in found]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors are bitwise equal; NaN, which no kernel may leave behind, equals nothing."""
    if a.shape != b.shape or a.dtype != b.dtype or bool(a.isnan().any()):
        return False
    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def _times(work: TimedCalls) -> dict[str, Any]:
    """Return the microseconds of each call; a peer's failure is its result."""
    times: dict[str, Any] = {}
    for name, calls in work.calls.items():
        try:
            times[name] = median_us(calls)
        except Exception as error:  # a peer's failure is a result
            if name not in work.peers:
                raise
            times[name] = {"error": last_line(error)}
            torch.cuda.synchronize()
    return times


def last_line(error: BaseException) -> str:
    """Return an error's message in one line."""
    lines = [line for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def median_us(calls: Sequence[Call]) -> dict[str, Any]:
    """Return microseconds a call: median, fastest and slowest of several replays of a graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    replay = _captured(calls)
    first_ms = _replay_ms(replay, 1)[0]
    times = _replay_ms(replay, num_replays(first_ms))
    us = [1e3 * ms / len(calls) for ms in times]
    return {
        "median": statistics.median(us),
        "fastest": min(us),
        "slowest": max(us),
        "replays": len(us),
        "replicas": len(calls),
    }


def num_replays(first_ms: float) -> int:
    """Return enough replays for a median within a bounded time."""
    return int(min(MOST_REPLAYS, max(LEAST_REPLAYS, REPLAYS_MS / max(first_ms, 1e-3))))


def _captured(calls: Sequence[Call]) -> Call:
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for call in calls:
            call()
    recorded.replay()
    return recorded.replay


def _replay_ms(replay: Call, number: int) -> list[float]:
    """Return the time of each replay on the device's clock."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    torch.cuda.synchronize()
    for begin, end in events:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def measure_ceilings(quick: bool) -> dict[str, float]:
    """Measure bytes/s of a copy on the device, read and written, and FLOP/s of products of 8192 x 8192 matrices."""
    size = (2 if quick else 4) * 2**30
    found = {"bytes_per_s": 2e6 * size / _copy_us(size)}
    n = 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    found["bf16"] = 2e6 * n**3 / median_us([lambda: a @ b.T] * 4)["median"]
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        a8, b8 = (m.to(torch.float8_e4m3fn) for m in (a, b))
        product = [lambda: torch._scaled_mm(a8, b8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)] * 4
        found["fp8"] = 2e6 * n**3 / median_us(product)["median"]
    return found


def _copy_us(size: int) -> float:
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    return median_us([lambda: target.copy_(source)])["median"]
