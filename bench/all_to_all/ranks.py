"""Ranks of `bench all-to-all`: exchange rows with every backend, check them, and measure the times.

T tokens, K experts a token, D width.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from expertwire.bench.all_to_all import traffic
from expertwire.bench.all_to_all.processes import wait_ranks
from expertwire.bench.all_to_all.step import Eager, Exchange, Graphed, Member, check, echo
from expertwire.comm.all_to_all import backends, cost_model
from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec
from expertwire.comm.group import Group, NcclOptions, SoloGroup, TorchGroup
from expertwire.engine import process

GRAPH_SAFE = ("nvlink",)  # on GPUs
_TIMEOUT_S = 1800.0
_WARM_UP = 3
_COPY_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A backend, its communicator's options, the format of dispatched rows, and whether it runs from a CUDA graph."""

    backend: str
    format: str = "bf16"
    nccl: NcclOptions = field(default_factory=NcclOptions)
    graph: bool = False

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in asdict(self.nccl).items() if value is not None]
        format, graph = [self.format] * (self.format != "bf16"), ["graph"] * self.graph
        return " ".join([self.backend, *options, *format, *graph])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Measurements: `steps` exchanges in each of `runs`, for every candidate and number of tokens a rank."""

    candidates: tuple[Candidate, ...]
    tokens: tuple[int, ...]
    num_experts: int = 256
    top_k: int = 8
    hidden_size: int = 7168
    steps: int = 10
    runs: int = 3
    device: str = "cpu"


def run(setting: Setting, num_ranks: int) -> list[list[dict[str, Any]]]:
    """Return every rank's rows, by rank; a row is a candidate and a number of tokens.

    Raises:
        ValueError: a rank has failed; its error is on the standard error.
    """
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="all-to-all-") as folder:
        try:
            for rank in range(num_ranks):
                children.append(process.start_call(f"{__name__}:rank_main", setting, rank, num_ranks, folder))
            wait_ranks(children, _TIMEOUT_S)
        finally:
            process.stop_all(children, 2.0, grace_s=0.0)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def rank_main(setting: Setting, rank: int, size: int, folder: str) -> None:
    """Run a rank's process."""
    torch.set_num_threads(1)
    device = setting.device
    if device == "cuda":
        device = f"cuda:{rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    rows: list[dict[str, Any]] = []
    copy_gb_s = 0.0
    with torch.inference_mode():
        for index, candidate in enumerate(setting.candidates):
            group = _join(dist.PrefixStore(f"{index}", store), rank, size, setting.device, candidate.nccl)
            copy_gb_s = copy_gb_s or _copy_rate(group, _Clock(device), device)
            measured = [_measure(setting, candidate, tokens, group, device) for tokens in setting.tokens]
            rows += [row | {"copy_gb_s": copy_gb_s} for row in measured]
            group.barrier()
            group.close()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(rows))


def _join(store: dist.Store, rank: int, size: int, device: str, nccl: NcclOptions) -> Group:
    if size == 1:
        return SoloGroup()
    return TorchGroup(
        store=store, rank=rank, size=size, device=device, local_ip="127.0.0.1", timeout_s=_TIMEOUT_S, nccl=nccl
    )


def _measure(setting: Setting, candidate: Candidate, tokens: int, group: Group, device: str) -> dict[str, Any]:
    offsets = (0, *np.cumsum(cost_model.even(setting.num_experts, group.size)).tolist())
    spec = AllToAllSpec(
        group=group,
        rank_offsets=offsets,
        max_tokens=tokens,
        hidden_size=setting.hidden_size,
        top_k=setting.top_k,
        dtype=torch.bfloat16,
    )
    all_to_all = _build(candidate, spec, device)
    rng = np.random.default_rng([tokens, group.rank])
    ids_TK = np.array([rng.permutation(setting.num_experts)[: setting.top_k] for _ in range(tokens)])
    x_TD = torch.from_numpy(rng.standard_normal((tokens, setting.hidden_size), np.float32)).to(device, torch.bfloat16)
    clock = _Clock(device)
    plan = [tokens] * group.size
    physical_TK = torch.from_numpy(ids_TK).to(device)
    member = Member(all_to_all=all_to_all, x_TD=x_TD, physical_TK=physical_TK, num_tokens_P=plan)
    exchange: Exchange = Eager([member])
    for _ in range(_WARM_UP):
        _step(exchange, x_TD, candidate.format, group, clock)
    if candidate.graph:
        exchange = Graphed(Eager([member]))
        _step(exchange, x_TD, candidate.format, group, clock)
    times = [_step(exchange, x_TD, candidate.format, group, clock) for _ in range(setting.runs * setting.steps)]
    rows = (traffic.row_bytes(setting.hidden_size, format) for format in (candidate.format, "bf16"))
    (out, _), (_, back) = (traffic.counted(ids_TK, offsets, group.rank, row) for row in rows)
    return {
        "candidate": str(candidate),
        "backend": candidate.backend,
        "format": candidate.format,
        "nccl": asdict(candidate.nccl),
        "graph": candidate.graph,
        "tokens": tokens,
        "us": times,  # dispatch, combine
        "bytes": [asdict(part) for part in (out, back)],
    }


def _build(candidate: Candidate, spec: AllToAllSpec, device: str) -> AllToAll:
    [made] = backends.make(candidate.backend, spec, device, fp8=candidate.format == "fp8")
    return made


def _step(exchange: Exchange, x_TD: Tensor, format: str, group: Group, clock: _Clock) -> tuple[float, float]:
    """Return µs of dispatch and combine; ranks begin each together.

    Raises:
        AssertionError: combined rows are not those that were sent.
    """
    group.barrier()
    started = clock()
    [arrived] = exchange.dispatch()
    dispatched = clock()
    exchange.answer([echo(arrived, x_TD)])
    group.barrier()
    combining = clock()
    [y_TKD] = exchange.combine()
    ended = clock()
    check(y_TKD, x_TD, format)
    return (dispatched - started) * 1e6, (ended - combining) * 1e6


class _Clock:
    """Seconds, after the device has finished its work."""

    def __init__(self, device: str) -> None:
        self._wait: Callable[[], None] = torch.cuda.synchronize if device != "cpu" else lambda: None

    def __call__(self) -> float:
        self._wait()
        return time.perf_counter()


def _copy_rate(group: Group, clock: _Clock, device: str) -> float:
    """Return GB/s of a plain copy while all ranks copy, the upper bound of this memory."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        group.barrier()
        started = clock()
        target.copy_(source)
        times.append(clock() - started)
    return _COPY_BYTES / min(times) / 1e9
