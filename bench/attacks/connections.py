"""Connections that do nothing, and messages that never end."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Any

from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.raw_http2 import RawConnection
from expertwire.bench.attacks.target import Target
from expertwire.bench.attacks.unread_streams import GENERATE

_HALF_SENT = 40
_ANNOUNCED_BYTES, _SENT_BYTES = 32 << 20, 16 << 20
_IDLE = 1_500


async def run_half_sent(server: Target, seconds: float) -> dict[str, Any]:
    """Announce 40 messages of 32 MiB, each on its connection, and send half of each."""
    prefix = struct.pack(">BI", 0, _ANNOUNCED_BYTES)
    connections: list[RawConnection] = []

    async def send() -> None:
        connection = await RawConnection().connect("127.0.0.1", server.port)
        connections.append(connection)
        stream = connection.start_call(GENERATE)
        with contextlib.suppress(OSError):
            await connection.send(stream, prefix + bytes(_SENT_BYTES), end=False)

    tasks = [asyncio.create_task(send()) for _ in range(_HALF_SENT)]
    try:
        await asyncio.sleep(seconds)
        ended = sum(c.closed or c.received["RST_STREAM"] or c.received["HEADERS"] for c in connections)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in connections:
            await connection.close()
    return {"messages": len(connections), "ended_by_server": int(ended)}


async def run_idle(server: Target, seconds: float) -> dict[str, Any]:
    """Open more TCP connections than the server has descriptors, and say nothing."""
    sockets: list[asyncio.StreamWriter] = []
    readers: list[asyncio.StreamReader] = []
    try:
        for _ in range(_IDLE):
            with contextlib.suppress(OSError, TimeoutError):
                reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", server.port), 0.5)
                readers.append(reader)
                sockets.append(writer)
        await asyncio.sleep(seconds)
        closed = sum(reader.at_eof() or reader.exception() is not None for reader in readers)
    finally:
        for writer in sockets:
            writer.transport.abort()
    return {"connections": len(sockets), "closed_by_server": closed}


ATTACKS = (
    Attack(
        name="half_sent",
        about=f"{_HALF_SENT} messages of 32 MiB of which half is sent",
        run=run_half_sent,
    ),
    Attack(
        name="idle_connections",
        about=f"{_IDLE:,} silent connections, with 1,024 descriptors a process",
        run=run_idle,
        descriptors=1024,
    ),
)
