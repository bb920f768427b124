"""One exchange of `bench all-to-all`, of the one or several ranks in this process.

Experts return the rows they are given, so that the result of a combine is known. T tokens, K experts a token, D model width,
R routed rows, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll, Dispatched, Handle
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
    """The four phases in two halves; the experts' work between them is not part of an exchange."""

    def dispatch(self) -> list[Dispatched]: ...

    def answer(self, y_RD: Sequence[Tensor]) -> None:
        """Set the expert outputs that `combine` sends."""
        ...

    def combine(self) -> list[Tensor]: ...


class Eager:
    """An exchange whose kernels are launched one by one."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._handles: list[Handle] = []
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
        handles = [each.all_to_all.combine_send(handle, y_RD) for each, handle, y_RD in every]
        return [each.all_to_all.combine_recv(handle) for each, handle in zip(self.members, handles, strict=True)]


# Takes work and returns a function that does it, and the work's result, which is the same object each time.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def cuda_graph(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Capture `work` in a CUDA graph; a `Capture`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads ask for events meanwhile
        out = work()
    return graph.replay, out


class Graphed:
    """An exchange whose halves are captured, each in a graph, with the inputs of `eager`; after compilation."""

    def __init__(self, eager: Eager, capture: Capture = cuda_graph) -> None:
        self._dispatch, self._arrived = capture(eager.dispatch)
        self._answers = [
            each.x_TD.new_zeros(len(arrived.row_index_R), each.x_TD.shape[1])
            for each, arrived in zip(eager.members, self._arrived, strict=True)
        ]
        eager.answer(self._answers)
        self._combine, self._combined = capture(eager.combine)

    def dispatch(self) -> list[Dispatched]:
        self._dispatch()
        return self._arrived

    def answer(self, y_RD: Sequence[Tensor]) -> None:
        for answer, new in zip(self._answers, y_RD, strict=True):
            answer.copy_(new)

    def combine(self) -> list[Tensor]:
        self._combine()
        return self._combined


def echo(arrived: Dispatched, like: Tensor) -> Tensor:
    """Return the rows that arrived, dequantised, in the order of expert outputs that `Dispatched` asks for."""
    index_R, home_R, count = arrived.row_index_R, arrived.home_R, int(arrived.expert_offsets[-1])
    rows = arrived.x_UD.index_select(0, index_R[:count])
    if rows.dtype == torch.uint8:
        rows = dequantize(quantize.unpack(rows, like.shape[1])).to(like.dtype)
    if home_R is None:
        return rows
    y_RD = like.new_zeros(len(index_R), like.shape[1])
    y_RD[home_R[:count].long()] = rows
    return y_RD


def check(y_TKD: Tensor, x_TD: Tensor, format: str) -> None:
    """Check that every expert's row is x as the experts saw it.

    Raises:
        AssertionError: a row differs.
    """
    answer_TD = dequantize(quantize.reference(x_TD)).to(x_TD.dtype) if format == "fp8" else x_TD
    assert torch.equal(y_TKD, answer_TD[:, None].expand_as(y_TKD)), "a combined row is not the one that was sent"
