"""HTTP/2 frames by hand (RFC 9113), for clients that no gRPC library would be."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections import Counter
from typing import Any, Self

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_KINDS = ("DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH", "PING", "GOAWAY", "WINDOW_UPDATE")
_DATA, _HEADERS, _, _RST_STREAM, _SETTINGS, _, _PING, _GOAWAY, _WINDOW_UPDATE = range(9)
_END_STREAM = _ACK = 0x1
_END_HEADERS = 0x4
_INITIAL_WINDOW_SIZE = 4  # a setting
_DEFAULT_WINDOW = 65_535
_FRAME_BYTES = 16_384
MAX_WINDOW = 2**31 - 1


def frame(kind: int, flags: int, stream: int, payload: bytes | memoryview) -> bytes:
    """Return a frame."""
    return b"".join((struct.pack(">I", len(payload))[1:], struct.pack(">BBI", kind, flags, stream), payload))


def grpc_message(message: Any) -> bytes:
    """Return a protobuf message with gRPC's prefix: not compressed, length."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


class RawConnection:
    """A connection whose windows are its own to choose.

    Args:
        window: what the server may send on a stream before it is asked for more, which it never is; 0 lets it send nothing.
        reads: whether to read the socket, and so to answer PINGs.

    Attributes:
        received: number of frames by kind, of those that were read.
    """

    def __init__(self, *, window: int = _DEFAULT_WINDOW, reads: bool = True) -> None:
        self.received: Counter[str] = Counter()
        self._window, self._reads = window, reads
        self._next_stream = 1
        self._credit = {0: _DEFAULT_WINDOW}  # what we may send, by stream
        self._initial_credit = _DEFAULT_WINDOW
        self._news = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def connect(self, host: str, port: int) -> Self:
        """Connect and send the preface."""
        reader, self._writer = await asyncio.open_connection(host, port, limit=1 << 16)
        if not self._reads:
            self._writer.transport.pause_reading()  # type: ignore[attr-defined]
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, self._window)
        more = struct.pack(">I", MAX_WINDOW - _DEFAULT_WINDOW)
        self._writer.write(_PREFACE + frame(_SETTINGS, 0, 0, settings) + frame(_WINDOW_UPDATE, 0, 0, more))
        if self._reads:
            self._task = asyncio.create_task(self._read(reader))
        return self

    def start_call(self, path: str, host: str = "localhost") -> int:
        """Send the headers of a call; return its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._credit[stream] = self._initial_credit
        fields = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", host), ("te", "trailers"))
        block = b"".join(_literal(name, value) for name, value in (*fields, ("content-type", "application/grpc")))
        self._write(frame(_HEADERS, _END_HEADERS, stream, block))
        return stream

    async def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Send data, as the server's windows let us."""
        left = memoryview(data)  # whose slices are no copies
        while left:
            allowed = min(self._credit[0], self._credit[stream], _FRAME_BYTES)
            if allowed <= 0:
                self._news.clear()
                await self._news.wait()
                continue
            part, left = left[:allowed], left[allowed:]
            self._credit[0] -= len(part)
            self._credit[stream] -= len(part)
            self._write(frame(_DATA, _END_STREAM if end and not left else 0, stream, part))
            assert self._writer is not None, "not connected"
            await self._writer.drain()

    async def call(self, path: str, message: Any) -> None:
        """Send a call and read no answer."""
        await self.send(self.start_call(path), grpc_message(message))

    @property
    def closed(self) -> bool:
        """Return whether the server has closed the connection, as far as we read."""
        return self._task is not None and self._task.done()

    async def close(self) -> None:
        """Close the connection at once."""
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._writer:
            self._writer.transport.abort()

    def _write(self, data: bytes) -> None:
        assert self._writer is not None, "not connected"
        if not self._writer.is_closing():
            self._writer.write(data)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(9)
                kind, flags, stream = struct.unpack(">BBI", head[3:])
                payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
                self.received[_KINDS[kind] if kind < len(_KINDS) else str(kind)] += 1
                self._handle(kind, flags, stream, payload)

    def _handle(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _PING and not flags & _ACK:
            self._write(frame(_PING, _ACK, 0, payload))
        elif kind == _SETTINGS and not flags & _ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == _INITIAL_WINDOW_SIZE:
                    for other in self._credit.keys() - {0}:
                        self._credit[other] += value - self._initial_credit
                    self._initial_credit = value
            self._write(frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _WINDOW_UPDATE and stream in self._credit:
            self._credit[stream] += struct.unpack(">I", payload)[0]
        self._news.set()


def _literal(name: str, value: str) -> bytes:
    """Return a header field, neither indexed nor compressed (RFC 7541 6.2.2)."""
    return b"\0" + b"".join(_length(len(text)) + text.encode() for text in (name, value))


def _length(value: int) -> bytes:
    """Return an integer with a prefix of seven bits (RFC 7541 5.1)."""
    if value < 127:
        return bytes([value])
    value, digits = value - 127, [127]
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])
