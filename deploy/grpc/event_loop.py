"""The event loop of a process that serves gRPC."""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVarTuple

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

_Ts = TypeVarTuple("_Ts")
_MOST_BYTES = 4096  # more than the pair of sockets holds


class GrpcEventLoop(asyncio.SelectorEventLoop):
    """An event loop that hands over gRPC's events without delay.

    A thread of grpc.aio writes one byte to a pair of sockets for each event, and waits while these are full, with about 280
    bytes. The loop's callback handles all events and reads one byte. So every round that handles several events leaves bytes
    behind, each of which costs a round without events. While the sockets are full of them there is one event a round, and what
    takes three events takes a thousand rounds. Here the bytes of all events that the callback is about to handle are read first.
    """

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*_Ts], Any], *args: *_Ts) -> None:
        """Call `callback` whenever there is something to read, as the base class does."""
        if _handles_grpc_events(callback):
            assert isinstance(fd, socket.socket), f"grpc.aio reads its wake-ups from {fd!r}"
            super().add_reader(fd, _take_wake_ups, fd, functools.partial(callback, *args))
        else:
            super().add_reader(fd, callback, *args)


def _handles_grpc_events(callback: Callable[..., Any]) -> bool:
    method = callback.func if isinstance(callback, functools.partial) else callback
    return type(getattr(method, "__self__", None)).__name__ == "PollerCompletionQueue"


def _take_wake_ups(events: socket.socket, callback: Callable[[], Any]) -> None:
    """Read the bytes that stand for events but for one, which the callback reads before it handles all of them."""
    if (num := len(events.recv(_MOST_BYTES, socket.MSG_PEEK))) > 1:
        events.recv(num - 1)
    callback()
