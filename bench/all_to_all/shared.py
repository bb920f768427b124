"""Several ranks on one GPU: whether every row arrives and comes home, and no times, which would say nothing of a GPU for each.

All are this process: their arenas are slices of one tensor, and they take turns in one stream, first all send and then all wait,
so that none waits for what is behind it. With graphs, both halves of an exchange are captured for all of them together.

Never run on a GPU by us.
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
class _Place:
    """All that an all-to-all over each other's memory asks of its group."""

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
    """A row for steps that are launched one by one, and one for those of graphs; each step has other rows and other routing.

    Raises:
        AssertionError: a row has not come home as it went.
        RankStalled: one has not arrived.
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
    from expertwire.comm.all_to_all.nvlink_gpu import NvlinkGpuAllToAll  # Triton is of no use elsewhere

    specs = []
    for rank in range(num_ranks):
        spec = AllToAllSpec(
            group=cast(Group, _Place(rank, num_ranks)),
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
        home = exchange.combine()
        for home_TKD, each in zip(home, members, strict=True):
            if isinstance(each.all_to_all, Checkable):
                each.all_to_all.check()
            check(home_TKD, each.x_TD, format)
