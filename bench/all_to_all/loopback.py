"""One GPU as one rank of many: times of the kernels of `comm.all_to_all.nvlink_gpu` without NVLink.

The symmetric buffers of all ranks are on this GPU. The other ranks have sent their rows once, and their signals have an epoch
that is never reached, so that the rank runs its four phases alone, from a CUDA graph; the profiler has the time of each
kernel. The time of the bytes on NVLink is missing: figures for NVL72 add it, modelled.

T tokens, K experts a token, D width, P ranks, R routed rows at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from expertwire.bench.all_to_all.model import MACHINES, experts_of
from expertwire.bench.all_to_all.traffic import Traffic, counted, row_bytes
from expertwire.comm import symmetric_memory
from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.fp8 import packed
from expertwire.comm.all_to_all.symmetric_buffer import SIGNAL_WORDS, BufferLayout, Region
from expertwire.comm.group import Group

RANKS = (8, 64, 72)
TOKENS = (1, 32, 128, 1024, 4096)
PROGRAMS = (16, 32, 64)  # besides one on every multiprocessor
FORMATS = ("bf16", "fp8")  # of dispatched rows; fp8 is quantised by the send kernel
# Kernels; few tokens are planned as they are sent, and waited for as they are indexed.
PARTS = {
    "plan": ("dispatch_plan",),
    "send": ("dispatch_send", "low_latency_send"),
    "wait": ("wait_for_signals",),
    "index": ("dispatch_count", "dispatch_index", "low_latency_receive"),
    "combine": ("combine_send",),
}
_FOR_EVER = 1 << 40  # an epoch that is never reached
_REPLAYS = 50


@dataclass(frozen=True)
class _Member:
    """The rank and size of a group, without communication."""

    rank: int
    size: int


class Loopback:
    """Rank 0 of `num_ranks`, each with `tokens` tokens of uniform routing, and the buffers of all.

    Args:
        num_programs: programs that move rows.
        format: one of `FORMATS`.
    """

    def __init__(
        self,
        num_ranks: int,
        tokens: int,
        *,
        experts_P: Sequence[int],
        top_k: int,
        hidden_size: int,
        device: str,
        num_programs: int,
        format: str = "bf16",
    ) -> None:
        from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll  # needs Triton

        self.experts_P, self.top_k, self._plan = experts_P, top_k, [tokens] * num_ranks
        self._device, self._shape, self._format = device, (tokens, hidden_size), format
        specs = [self._spec(rank, num_ranks, tokens) for rank in range(num_ranks)]
        layout = BufferLayout.of(specs[0])
        self.memories = symmetric_memory.slices(num_ranks, layout.nbytes, device)
        for rank in range(1, num_ranks):
            other = NvlinkGpuAllToAll(specs[rank], self.memories, num_programs=num_programs)
            other.dispatch_send(*self.inputs(rank), self._plan)
        for region in (layout.dispatch_signals, layout.combine_signals):
            _signals(self.memories[0], region)[1:, 0] = _FOR_EVER
        self.rank = NvlinkGpuAllToAll(specs[0], self.memories, num_programs=num_programs)
        self._x_TD, self._physical_TK = self.inputs(0)
        e = experts_P[0]
        self.y_RD = torch.zeros(num_ranks * tokens * min(top_k, e), hidden_size, dtype=torch.bfloat16, device=device)

    def inputs(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return x [T, D] and physical ids [T, K] of a rank."""
        rng = np.random.default_rng([rank, *self._shape])
        ids = np.array([rng.permutation(sum(self.experts_P))[: self.top_k] for _ in range(self._shape[0])])
        x_TD = torch.from_numpy(rng.standard_normal(self._shape, np.float32))
        return x_TD.to(self._device, torch.bfloat16), torch.from_numpy(ids).to(self._device)

    def step(self) -> Tensor:
        """Run the four phases with `y_RD` as expert outputs; return the combined rows."""
        handle = self.rank.dispatch_send(self._x_TD, self._physical_TK, self._plan)
        self.rank.dispatch_recv(handle)
        return self.rank.combine_recv(self.rank.combine_send(handle, self.y_RD))

    def traffic(self) -> tuple[Traffic, Traffic]:
        """Return the bytes that dispatch and combine move with this routing."""
        ids_TK = self._physical_TK.cpu().numpy()
        rows = (row_bytes(self._shape[1], format) for format in (self._format, "bf16"))
        (out, _), (_, back) = (counted(ids_TK, self._offsets(), 0, row) for row in rows)
        return out, back

    def _offsets(self) -> tuple[int, ...]:
        return (0, *np.cumsum(self.experts_P).tolist())

    def _spec(self, rank: int, num_ranks: int, tokens: int) -> AllToAllSpec:
        spec = AllToAllSpec(
            group=cast(Group, _Member(rank, num_ranks)),
            rank_offsets=self._offsets(),
            max_tokens=tokens,
            hidden_size=self._shape[1],
            top_k=self.top_k,
            dtype=torch.bfloat16,
        )
        return packed(spec) if self._format == "fp8" else spec


def _signals(memory: Tensor, region: Region) -> Tensor:
    """Return i64 [P, signal]."""
    return memory[region.offset : region.offset + region.nbytes].view(torch.int64).view(-1, SIGNAL_WORDS)


def run(hidden_size: int, top_k: int = 8) -> dict[str, Any]:
    """Measure every format, number of ranks, tokens and programs.

    Raises:
        ValueError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError("--loopback measures a GPU's kernels, and there is no CUDA device here")
    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    rows = [
        row
        for ranks in RANKS
        for tokens in TOKENS
        for format in FORMATS
        for programs in (*PROGRAMS, num_sms)
        for row in _row(ranks, tokens, format, programs, hidden_size, top_k)
    ]
    return {"machine": {"device": torch.cuda.get_device_name(), "multiprocessors": num_sms}, "rows": rows}


def _row(ranks: int, tokens: int, format: str, programs: int, hidden_size: int, top_k: int) -> Iterator[dict[str, Any]]:
    """Yield one row, or none if the buffers do not fit."""
    experts_P = experts_of(ranks)
    if needed_bytes(ranks, tokens, hidden_size, top_k, experts_P[0]) > 0.9 * torch.cuda.mem_get_info()[0]:
        return
    loopback = Loopback(
        ranks,
        tokens,
        experts_P=experts_P,
        top_k=top_k,
        hidden_size=hidden_size,
        device="cuda",
        num_programs=programs,
        format=format,
    )
    with torch.inference_mode():
        for _ in range(3):
            loopback.step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loopback.step()
        measured = figures(loopback, *_timed(graph), programs)
        yield {"ranks": ranks, "tokens": tokens, "format": format, "programs": programs, **measured}
    loopback.rank.check()


def needed_bytes(ranks: int, tokens: int, hidden_size: int, top_k: int, experts: int) -> int:
    """Return about the bytes of all buffers and of the experts' rows."""
    row = hidden_size * 2
    return ranks * row * (ranks * tokens + tokens * top_k) + row * ranks * tokens * min(top_k, experts)


def _timed(graph: torch.cuda.CUDAGraph) -> tuple[float, dict[str, float]]:
    """Return µs of a replay, and of each kernel within it by name."""
    graph.replay()
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    for _ in range(_REPLAYS):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    kernels = {event.key: event.device_time_total / _REPLAYS for event in profile.key_averages()}
    return started.elapsed_time(ended) * 1e3 / _REPLAYS, kernels


def figures(loopback: Loopback, total_us: float, kernels: dict[str, float], programs: int) -> dict[str, Any]:
    """Return µs of the parts, rates, and modelled times on NVL72, which add the time of the bytes on NVLink.

    Raises:
        ValueError: the profiler has seen no kernel of a part.
    """
    us = {part: sum(kernels.get(f"{name}_kernel", 0.0) for name in names) for part, names in PARTS.items()}
    if missing := [part for part, spent in us.items() if not spent and part != "plan"]:
        raise ValueError(f"the profiler has seen no kernel of {', '.join(missing)}; it has seen {', '.join(kernels)}")
    out, back = loopback.traffic()
    # A wait in each phase, unless dispatch's is part of another kernel.
    wait, peak = us["wait"] / (2 if us["plan"] else 1), MACHINES["nvl72"].peak_gb_s
    return {
        "us": us,
        "graph_us": total_us,
        "send_gb_s": out.sent / us["send"] / 1e3,
        "send_gb_s_per_program": out.sent / us["send"] / 1e3 / programs,
        "combine_gb_s_per_program": back.sent / us["combine"] / 1e3 / programs,
        "modelled_nvl72_us": {
            "dispatch": sum(us.values()) - us["combine"] - wait + out.bound_us(peak),
            "combine": us["combine"] + wait + back.bound_us(peak),
        },
    }
