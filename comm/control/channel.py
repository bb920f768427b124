"""The control channel: named arrays between the controller, the ranks and the frontends.

`SocketChannel` (with `Listener` and `connect`) joins two processes, such as a frontend and the controller.
`ControlHub` and `ControlLink` join the controller and P ranks. Every connection proves a shared token first,
and nothing that arrives is ever unpickled. This package knows no plan and imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from expertwire.comm.control.codec import pack, unpack
from expertwire.comm.control.connections import Listener, connect
from expertwire.comm.control.errors import ChannelClosed, RankError, RankLost, RankTimeout
from expertwire.comm.control.hub import ControlHub, this_node
from expertwire.comm.control.link import ControlLink
from expertwire.comm.control.socket_channel import SocketChannel

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
    "pack",
    "this_node",
    "unpack",
]


class ControlChannel(Protocol):
    """Named arrays to one peer and back, in order."""

    def send(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Send a message without waiting for the peer to read it. Raise `ChannelClosed` at the end."""
        ...

    def recv(self, timeout_s: float | None) -> dict[str, np.ndarray] | None:
        """Return the next message, or None after `timeout_s` seconds (None: wait for ever). Raise `ChannelClosed` at the end."""
        ...

    @property
    def pending(self) -> int:
        """Bytes that wait until the kernel takes them; then `fileno()` is writable, and `flush` sends them."""
        ...

    def flush(self) -> bool:
        """Send what the kernel takes without waiting; return whether that was everything. Raise `ChannelClosed` at the end."""
        ...

    def fileno(self) -> int:
        """Return a descriptor that is readable when `recv(0)` may have something; call that until it returns None."""
        ...

    def close(self) -> None:
        """End the connection. Idempotent."""
        ...
