"""An all-to-all whose kernels run on a CUDA stream of their own, beside the computation of another part of the step.

What is sent waits for what the caller has computed so far; what is received is waited for by what it computes next. What the
inner all-to-all allocates there is the stream's again once the caller has let go of it, and used anew from the next `send` on,
which waits for the caller's last use.

Never run on a GPU by us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll, Dispatched, Watched


@dataclass(frozen=True, kw_only=True)
class _Handle:
    inner: Any
    kept: tuple[Tensor | None, ...]  # until they have been read, or their memory would be the caller's again


class StreamAllToAll:
    """See the module.

    Args:
        inner: whose phases take device tensors and wait for nothing on the host.
        stream: that nothing else uses, nor another part of the step: nothing would wait between one's receiving and another's.
    """

    def __init__(self, inner: AllToAll, stream: torch.cuda.Stream) -> None:
        self._inner, self._stream = inner, stream

    @property
    def graph_safe(self) -> bool:
        return self._inner.graph_safe

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _Handle:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            inner = self._inner.dispatch_send(x_TD, physical_TK, num_tokens_P, num_valid)
        return _Handle(inner=inner, kept=(x_TD, physical_TK, num_valid))

    def dispatch_recv(self, handle: _Handle) -> Dispatched:
        with torch.cuda.stream(self._stream):
            arrived = self._inner.dispatch_recv(handle.inner)
        torch.cuda.current_stream().wait_stream(self._stream)
        return arrived

    def combine_send(self, handle: _Handle, y_RD: Tensor) -> _Handle:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            inner = self._inner.combine_send(handle.inner, y_RD)
        return _Handle(inner=inner, kept=(y_RD,))

    def combine_recv(self, handle: _Handle) -> Tensor:
        with torch.cuda.stream(self._stream):
            home_TKD = self._inner.combine_recv(handle.inner)
        torch.cuda.current_stream().wait_stream(self._stream)
        return home_TKD

    def check(self) -> None:
        """See `Watched`."""
        if isinstance(self._inner, Watched):
            self._inner.check()


def on_stream(inner: AllToAll) -> StreamAllToAll:
    """With a new stream, of high priority: what travels late keeps the other ranks waiting."""
    return StreamAllToAll(inner, torch.cuda.Stream(priority=-1))
