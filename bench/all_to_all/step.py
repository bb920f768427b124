"""One exchange of `bench all-to-all`, of the ranks that this process is: one, or several that take turns in one stream.

Experts answer with the row they were given, so what comes home is known. T tokens, K experts a token, D width, R routed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll, Dispatched
from expertwire.kernels.ops import quantize
from expertwire.kernels.ops.quantize import dequantize


@dataclass(frozen=True, kw_only=True)
class Member:
    """A rank: its all-to-all, its rows [T, D], their physical ids [T, K], and T of every rank."""

    all_to_all: AllToAll
    x_TD: Tensor
    physical_TK: Tensor
    num_tokens_P: Sequence[int]


class Exchange(Protocol):
    """The four phases in two halves; what is between them is not part of an exchange."""

    def dispatch(self) -> list[Dispatched]: ...

    def answer(self, y_RD: Sequence[Tensor]) -> None:
        """What `combine` sends home."""
        ...

    def combine(self) -> list[Tensor]: ...


class Eager:
    """Launched one by one."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._handles: list[Any] = []
        self._answers: Sequence[Tensor] = ()

    def dispatch(self) -> list[Dispatched]:
        self._handles = [
            each.all_to_all.dispatch_send(each.x_TD, each.physical_TK, each.num_tokens_P) for each in self.members
        ]
        pairs = zip(self.members, self._handles, strict=True)
        return [each.all_to_all.dispatch_recv(handle) for each, handle in pairs]

    def answer(self, y_RD: Sequence[Tensor]) -> None:
        self._answers = y_RD

    def combine(self) -> list[Tensor]:
        every = zip(self.members, self._handles, self._answers, strict=True)
        returning = [each.all_to_all.combine_send(handle, y_RD) for each, handle, y_RD in every]
        return [each.all_to_all.combine_recv(handle) for each, handle in zip(self.members, returning, strict=True)]


# Of work, which it does not do: how to do it, and what it returns each time.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def cuda_graph(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A `Capture`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads ask for events meanwhile
        out = work()
    return graph.replay, out


class Graphed:
    """Captured, each half by itself, once all has been compiled; of the inputs that `eager` has."""

    def __init__(self, eager: Eager, capture: Capture = cuda_graph) -> None:
        self._dispatch, self._arrived = capture(eager.dispatch)
        self._answers = [
            each.x_TD.new_zeros(len(arrived.row_index_R), each.x_TD.shape[1])
            for each, arrived in zip(eager.members, self._arrived, strict=True)
        ]
        eager.answer(self._answers)
        self._combine, self._home = capture(eager.combine)

    def dispatch(self) -> list[Dispatched]:
        self._dispatch()
        return self._arrived

    def answer(self, y_RD: Sequence[Tensor]) -> None:
        for kept, given in zip(self._answers, y_RD, strict=True):
            kept.copy_(given)

    def combine(self) -> list[Tensor]:
        self._combine()
        return self._home


def echo(arrived: Dispatched, like: Tensor) -> Tensor:
    """The rows that arrived, as numbers, where `Dispatched` wants the experts' answers."""
    index_R, home_R, count = arrived.row_index_R, arrived.home_R, int(arrived.expert_offsets[-1])
    rows = arrived.x_UD.index_select(0, index_R[:count])
    if rows.dtype == torch.uint8:
        rows = dequantize(quantize.unpack(rows, like.shape[1])).to(like.dtype)
    if home_R is None:
        return rows
    y_RD = like.new_zeros(len(index_R), like.shape[1])
    y_RD[home_R[:count].long()] = rows
    return y_RD


def check(home_TKD: Tensor, x_TD: Tensor, format: str) -> None:
    """Whether what came home of all experts is what they have seen of x.

    Raises:
        AssertionError: it is not.
    """
    answer_TD = dequantize(quantize.reference(x_TD)).to(x_TD.dtype) if format == "fp8" else x_TD
    assert torch.equal(home_TKD, answer_TD[:, None].expand_as(home_TKD)), "a row has not come home as it went"
