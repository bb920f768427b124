"""Correctness of several ranks on one GPU; their times would say nothing about ranks with a GPU each.

All ranks are in this process: their buffers are slices of one tensor, and they run in one stream, first all sends and then
all waits, so that no wait precedes its signal. With graphs, both halves of an exchange are captured for all ranks together.

Never run on a GPU by us. T tokens, K experts a token, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from expertwire.bench.all_to_all.step import Capture, Eager, Exchange, Graphed, Member, check, cuda_graph, echo
from expertwire.comm import symmetric_memory
from expertwire.comm.all_to_all import cost_model
from expertwire.comm.all_to_all.base import AllToAllSpec, Checkable
from expertwire.comm.all_to_all.fp8 import packed
from expertwire.comm.all_to_all.symmetric_buffer import BufferLayout
from expertwire.comm.group import Group


@dataclass(frozen=True)
class _Member:
    """The rank and size of a group, without communication."""

    rank: int
    size: int


def run(
    num_ranks: int,
    tokens: int,
    format: str,
    *,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    steps: int,
    device: str = "cuda",
    capture: Capture = cuda_graph,
) -> Iterator[dict[str, Any]]:
    """Yield a row for steps that are launched eagerly, and one for steps of graphs; each step has other rows and routing.

    Raises:
        AssertionError: a combined row is not the one that was sent.
        RankStalled: a signal has not arrived.
    """
    eager = Eager(_members(num_ranks, tokens, format, num_experts, top_k, hidden_size, device))
    rng = np.random.default_rng([num_ranks, tokens])
    _steps(eager, eager.members, format, num_experts, steps, rng)
    yield {"ranks": num_ranks, "tokens": tokens, "format": format, "graph": False, "steps": steps}
    _steps(Graphed(eager, capture), eager.members, format, num_experts, steps, rng)
    yield {"ranks": num_ranks, "tokens": tokens, "format": format, "graph": True, "steps": steps}


def _members(
    num_ranks: int, tokens: int, format: str, num_experts: int, top_k: int, hidden_size: int, device: str
) -> list[Member]:
    from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll  # needs Triton

    specs = []
    for rank in range(num_ranks):
        spec = AllToAllSpec(
            group=cast(Group, _Member(rank, num_ranks)),
            rank_offsets=(0, *np.cumsum(cost_model.even(num_experts, num_ranks)).tolist()),
            max_tokens=tokens,
            hidden_size=hidden_size,
            top_k=top_k,
            dtype=torch.bfloat16,
        )
        specs.append(packed(spec) if format == "fp8" else spec)
    memories = symmetric_memory.slices(num_ranks, BufferLayout.of(specs[0]).nbytes, device)
    return [
        Member(
            all_to_all=NvlinkGpuAllToAll(spec, memories, num_programs=16),
            x_TD=torch.zeros(tokens, hidden_size, dtype=torch.bfloat16, device=device),
            physical_TK=torch.zeros(tokens, top_k, dtype=torch.int64, device=device),
            num_tokens_P=[tokens] * num_ranks,
        )
        for spec in specs
    ]


def _steps(
    exchange: Exchange,
    members: Sequence[Member],
    format: str,
    num_experts: int,
    steps: int,
    rng: np.random.Generator,
) -> None:
    for _ in range(steps):
        for each in members:
            tokens, top_k = each.physical_TK.shape
            ids_TK = np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
            each.physical_TK.copy_(torch.from_numpy(ids_TK))
            each.x_TD.copy_(torch.from_numpy(rng.standard_normal(tuple(each.x_TD.shape), np.float32)))
        arrived = exchange.dispatch()
        exchange.answer([echo(of_rank, each.x_TD) for of_rank, each in zip(arrived, members, strict=True)])
        combined = exchange.combine()
        for y_TKD, each in zip(combined, members, strict=True):
            if isinstance(each.all_to_all, Checkable):
                each.all_to_all.check()
            check(y_TKD, each.x_TD, format)
