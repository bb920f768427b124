"""Text far longer than the model can take."""

from __future__ import annotations

import functools
import time
from typing import Any

import grpc

from expertwire.bench.attacks.attack import Attack, request, stubs
from expertwire.bench.attacks.target import Target

_PIECE = "Once upon a time there was a text that had no end. "


def text_of(size_mb: float) -> str:
    """Return so many megabytes of words."""
    return _PIECE * int(size_mb * 1e6 / len(_PIECE))


async def run(server: Target, seconds: float, *, size_mb: float) -> dict[str, Any]:
    """Send such texts one after another; return the answers and how long they took."""
    statuses: dict[str, int] = {}
    longest_s, end = 0.0, time.monotonic() + seconds
    message = request(text_of(size_mb), max_tokens=1)
    async with stubs(server.address) as (stub,):
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                await stub.Generate(message, timeout=max(seconds, 120)).read()
                status = "OK"
            except grpc.aio.AioRpcError as error:
                status = error.code().name
            statuses[status] = statuses.get(status, 0) + 1
            longest_s = max(longest_s, time.monotonic() - began)
    return {"statuses": statuses, "longest_answer_s": round(longest_s, 1)}


ATTACKS = tuple(
    Attack(
        name=f"large_text_{size_mb}mb",
        about=f"texts of {size_mb} MB, one after another",
        run=functools.partial(run, size_mb=size_mb),
        seconds=5.0,
    )
    for size_mb in (1, 4, 60)
)
