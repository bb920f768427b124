"""An all-to-all on a CUDA stream of its own, beside the computation of another micro-batch.

A send waits for what the caller has computed so far; what the caller computes after a receive waits for it. Memory that
the inner all-to-all allocates on the stream is reused from the next send on, which waits for the caller's last use.

Never run on a GPU by us. Letters as in `comm.all_to_all.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll, Checkable, Dispatched, Handle


@dataclass(frozen=True, kw_only=True)
class _Handle(Handle):
    inner: Handle
    kept: tuple[Tensor | None, ...]  # until they have been read; their memory would return to the caller's stream


class StreamAllToAll:
    """An all-to-all whose phases run on `stream`.

    Args:
        inner: takes device tensors and waits for nothing on the host.
        stream: of this micro-batch alone: sends of another one must not wait behind its receives.
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

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        assert isinstance(handle, _Handle), handle
        with torch.cuda.stream(self._stream):
            arrived = self._inner.dispatch_recv(handle.inner)
        torch.cuda.current_stream().wait_stream(self._stream)
        return arrived

    def combine_send(self, handle: Handle, y_RD: Tensor) -> _Handle:
        assert isinstance(handle, _Handle), handle
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            inner = self._inner.combine_send(handle.inner, y_RD)
        return _Handle(inner=inner, kept=(y_RD,))

    def combine_recv(self, handle: Handle) -> Tensor:
        assert isinstance(handle, _Handle), handle
        with torch.cuda.stream(self._stream):
            y_TKD = self._inner.combine_recv(handle.inner)
        torch.cuda.current_stream().wait_stream(self._stream)
        return y_TKD

    def check(self) -> None:
        """See `Checkable`."""
        if isinstance(self._inner, Checkable):
            self._inner.check()


def on_stream(inner: AllToAll) -> StreamAllToAll:
    """Return `inner` on a new stream of high priority, because late rows keep the other ranks waiting."""
    return StreamAllToAll(inner, torch.cuda.Stream(priority=-1))
