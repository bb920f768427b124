"""Streams that nobody reads: their outputs have to wait somewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import grpc

from expertwire.bench.attacks.attack import Attack, request, stubs
from expertwire.bench.attacks.large_text import text_of
from expertwire.bench.attacks.raw_http2 import MAX_WINDOW, RawConnection
from expertwire.bench.attacks.target import Target

GENERATE = "/expertwire.v1.Inference/Generate"
_CONNECTION_STREAMS = 50
_TEXT_MB = 24


async def _send_text(address: str) -> str:
    async with stubs(address) as (stub,):
        try:
            await stub.Generate(request(text_of(_TEXT_MB), max_tokens=1)).read()
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


async def run_with_text(server: Target, seconds: float) -> dict[str, Any]:
    """128 streams of four outputs with 64 log-probabilities, of which none is read, and 24 MB of text."""
    message = request(n=4, logprobs=64, max_tokens=1500)
    end = time.monotonic() + seconds
    connections = [await RawConnection(window=0).connect("127.0.0.1", server.port) for _ in range(4)]
    try:
        for connection in connections:
            for _ in range(128 // len(connections)):
                await connection.call(GENERATE, message)
        await asyncio.sleep(3)
        status = await asyncio.wait_for(_send_text(server.address), max(1.0, end - time.monotonic()) + 60)
        await asyncio.sleep(max(0.0, end - time.monotonic()))
    finally:
        for connection in connections:
            await connection.close()
    return {"text": status, "refused": sum(c.received["RST_STREAM"] for c in connections)}


async def run_memory(server: Target, seconds: float) -> dict[str, Any]:
    """100 streams of 3,600 tokens with five log-probabilities, on connections with a closed window."""
    message = request(n=2, logprobs=5, max_tokens=1800)
    connections = []
    try:
        for _ in range(100 // _CONNECTION_STREAMS):
            connections.append(await RawConnection(window=0).connect("127.0.0.1", server.port))
            for _ in range(_CONNECTION_STREAMS):
                await connections[-1].call(GENERATE, message)
        await asyncio.sleep(seconds)
        refused = sum(connection.received["RST_STREAM"] for connection in connections)
        closed = sum(connection.closed for connection in connections)
    finally:
        for connection in connections:
            await connection.close()
    return {"refused": refused, "closed_connections": closed}


async def run_clients(server: Target, seconds: float) -> dict[str, Any]:
    """50 clients with ten streams each; they open the largest window and do not read their sockets."""
    message = request(n=1, logprobs=20, max_tokens=1800)
    clients, refused = [], 0
    try:
        for _ in range(50):
            with contextlib.suppress(OSError):
                clients.append(await RawConnection(window=MAX_WINDOW, reads=False).connect("127.0.0.1", server.port))
                for _ in range(10):
                    await clients[-1].call(GENERATE, message)
                continue
            refused += 1
        await asyncio.sleep(seconds)
    finally:
        for client in clients:
            await client.close()
    return {"clients": len(clients), "refused_connections": refused}


ATTACKS = (
    Attack(
        name="unread_and_text",
        about="128 unread streams, n = 4, 64 log-probabilities, and 24 MB of text",
        run=run_with_text,
        seconds=30.0,
    ),
    Attack(
        name="unread_streams",
        about="100 unread streams of 3,600 tokens with 5 log-probabilities",
        run=run_memory,
        seconds=45.0,
    ),
    Attack(
        name="unread_clients",
        about="50 clients that read nothing, 10 streams each, 20 log-probabilities",
        run=run_clients,
        seconds=45.0,
    ),
)
