"""The control channel: named arrays between the controller, the ranks and the fronts. Knows no plan, imports no torch.

`SocketChannel` (with `listen` and `connect`) joins two processes, for instance a front and the controller. `ControlHub` and
`ControlLink` join the controller and P ranks: shared memory within a node, TCP across. Everyone proves a shared token first;
nothing that arrives is ever unpickled. A message is a set of named arrays (`pack`, `unpack`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from expertwire.comm.control.hub import ControlHub, this_node
from expertwire.comm.control.link import ControlLink
from expertwire.comm.control.socket_channel import Listener, SocketChannel, connect, listen
from expertwire.comm.control.wire import ChannelClosed, RankError, RankLost, RankTimeout, pack, unpack

__all__ = [
    "ChannelClosed",
    "ControlChannel",
    "ControlHub",
    "ControlLink",
    "Listener",
    "RankError",
    "RankLost",
    "RankTimeout",
    "SocketChannel",
    "connect",
    "listen",
    "pack",
    "this_node",
    "unpack",
]


class ControlChannel(Protocol):
    """Named arrays to one peer and back, in order."""

    def send(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Send a message without waiting for the peer to read it. Raises `ChannelClosed`."""
        ...

    def recv(self, timeout_s: float | None) -> dict[str, np.ndarray] | None:
        """The next message; None after `timeout_s` seconds (None: wait for ever). Raises `ChannelClosed` at the end."""
        ...

    def fileno(self) -> int:
        """Readable when `recv(0)` may have something; call that until it returns None, then select() again."""
        ...

    def close(self) -> None:
        """End the connection. Idempotent."""
        ...
