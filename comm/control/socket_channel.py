"""Control channels over connected sockets: both directions carry frames, u64 length (little endian), then a message of that many
bytes. `comm.control.connections` makes them.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from expertwire.comm.control.codec import pack, unpack
from expertwire.comm.control.errors import ChannelClosed

_LENGTH = struct.Struct("<Q")
_CHUNK_BYTES = 1 << 18
_LONGEST_POLL_S = 3600.0  # poll() takes at most 24 days
MAX_PENDING_BYTES = 64 << 20


class SocketChannel:
    """Named arrays over a connected stream socket.

    Only `recv` and `drain` block: what the kernel does not take at once waits in an outgoing buffer, which every
    later `send`, `recv` and `flush` tries to empty. A select() loop watches `fileno()` for reading (and for
    writing while `pending` is not 0, then calls `flush`), and calls `recv(0)` until it returns None, because
    data that was read ahead is not visible to select(). One thread may send while another receives.

    Args:
        sock: a connected socket, which `close` closes.
        max_pending: bytes that may wait in the outgoing buffer; None: no limit, as the caller sees to it.
    """

    def __init__(self, sock: socket.socket, *, max_pending: int | None = MAX_PENDING_BYTES) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._max_pending = max_pending
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._num_pending = 0  # bytes in `_outgoing`
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def send(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Send a message, or queue it.

        Raises:
            ChannelClosed: the peer is gone, or has left more than `max_pending` bytes unread.
        """
        self.send_frame(pack(arrays))

    def recv(self, timeout_s: float | None) -> dict[str, np.ndarray] | None:
        """Return the next message, or None when there is none after `timeout_s` seconds (None: wait for ever).

        Raises:
            ChannelClosed: the connection has ended and everything received has been returned, or the peer sent no valid message.
        """
        frame = self.recv_frame(timeout_s)
        try:
            return None if frame is None else unpack(frame)
        except ValueError as error:
            self.close()
            raise ChannelClosed(str(error)) from error

    def fileno(self) -> int:
        """Return the socket's file descriptor, -1 after `close`."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the connection; data that the kernel has not taken by now is lost. Idempotent."""
        with contextlib.suppress(ChannelClosed):
            self.flush()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._sock.close()

    @property
    def pending(self) -> int:
        """Bytes that wait in the outgoing buffer."""
        return self._num_pending

    @property
    def local_ip(self) -> str:
        """This host's address as the peer sees it; 127.0.0.1 on a unix socket."""
        return "127.0.0.1" if self._sock.family == socket.AF_UNIX else self._sock.getsockname()[0]

    def send_frame(self, message: bytes | bytearray) -> None:
        """Send a packed message, or queue it. Raise as `send`."""
        frame = [_LENGTH.pack(len(message)), message]
        with self._lock:
            if self._outgoing:
                self._flush()
            if self._outgoing and self._max_pending is not None and self.pending > self._max_pending:
                raise ChannelClosed(f"the peer stopped reading: {self.pending >> 20} MiB wait to be sent")
            sent = 0 if self._outgoing else self._write(frame)
            for part in frame:
                if sent < len(part):
                    # A copy, because the caller may reuse its buffer.
                    self._outgoing.append(memoryview(bytes(memoryview(part)[sent:])))
                    self._num_pending += len(part) - sent
                sent = max(0, sent - len(part))

    def recv_frame(self, timeout_s: float | None) -> bytearray | None:
        """Return the next packed message, or None after `timeout_s`. Raise as `recv`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._flush_quietly()
        while (frame := self._take_frame()) is None:
            if self._read():
                continue
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                return None
            self._wait(remaining)
        return frame

    def ready_frames(self) -> list[bytearray]:
        """Return all packed messages that are complete after one read, without waiting. If there is none, raise as `recv`."""
        frames = self._take_frames()
        try:
            self._read()
        except ChannelClosed:
            if not frames:
                raise
        return frames + self._take_frames()

    def flush(self) -> bool:
        """Try to empty the outgoing buffer without waiting; return whether it is empty. Raise as `send`."""
        with self._lock:
            self._flush()
            return not self._outgoing

    def drain(self, timeout_s: float) -> None:
        """Wait until the kernel has taken everything.

        Raises:
            ChannelClosed: as `send`, or the peer read nothing for `timeout_s` seconds.
        """
        if not self._outgoing or self.flush():
            return
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        while not self.flush():
            if not poller.poll(timeout_s * 1000):
                raise ChannelClosed(f"the peer read nothing for {timeout_s:.0f} s")

    def _take_frame(self) -> bytearray | None:
        if len(self._incoming) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._incoming)
        end = _LENGTH.size + length
        if len(self._incoming) < end:
            return None
        frame = self._incoming[_LENGTH.size : end]
        del self._incoming[:end]
        return frame

    def _take_frames(self) -> list[bytearray]:
        frames = []
        while (frame := self._take_frame()) is not None:
            frames.append(frame)
        return frames

    def _read(self) -> bool:
        """Read once; return whether there was anything."""
        try:
            data = self._sock.recv(_CHUNK_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise ChannelClosed(f"connection lost: {error.strerror or error}") from error
        if not data:
            raise ChannelClosed("the peer closed the connection")
        self._incoming += data
        return True

    def _write(self, parts: Sequence[bytes | bytearray | memoryview]) -> int:
        try:
            return self._sock.sendmsg(parts)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise ChannelClosed(f"connection lost: {error.strerror or error}") from error

    def _flush(self) -> None:
        while self._outgoing:
            sent = self._write([self._outgoing[0]])
            self._num_pending -= sent
            if sent < len(self._outgoing[0]):
                self._outgoing[0] = self._outgoing[0][sent:]
                return
            self._outgoing.popleft()

    def _wait(self, timeout_s: float | None) -> None:
        self._poll.modify(self._sock, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        self._poll.poll(None if timeout_s is None else min(timeout_s, _LONGEST_POLL_S) * 1000)
        self._flush_quietly()

    def _flush_quietly(self) -> None:
        try:
            self.flush()
        except ChannelClosed:
            # Messages that the peer sent before it ended are still to be read; the reads will find the end.
            self._outgoing.clear()
            self._num_pending = 0
