"""Attacks of one client on another: what it can do, and what it can learn.

`VICTIM` and `STRANGER` are the metadata with which the two call: who they are, on a server that knows both.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc

from expertwire.bench.attacks.attack import Attack, authorization, request, stubs
from expertwire.bench.attacks.target import Target
from expertwire.deploy.proto import expertwire_v1_pb2 as pb

VICTIM, STRANGER = authorization("victim"), authorization("attacker")
_TENANTS = Path(__file__).with_name("tenants.toml")
_ID = "the-victim's-id"
_LENGTH = 200  # tokens of the request that the stranger tries to end
_SECRET = "Call me Ishmael. Some years ago, never mind how long precisely. " * 8


async def run(server: Target, seconds: float) -> dict[str, Any]:
    """Try it; return what works."""
    async with stubs(server.address, 2) as (victim, stranger), asyncio.timeout(seconds):
        return {
            "id_revealed": await _id_revealed(victim, stranger),
            "abort_works": await _abort_works(victim, stranger),
            "tenant_believed": await _tenant_believed(stranger),
            "cached_prefix_seen": await _cached_prefix_seen(victim, stranger),
        }


async def _id_revealed(victim: Any, stranger: Any) -> bool:
    """Return whether the stranger learns that an id is in use."""
    message = request(max_tokens=1000, tenant="")
    message.request_id = _ID
    call = victim.Generate(message, metadata=VICTIM)
    await call.read()
    try:
        message.sampling_params.max_tokens = 1
        await stranger.Generate(message, metadata=STRANGER).read()
    except grpc.aio.AioRpcError as error:
        return error.code() == grpc.StatusCode.ALREADY_EXISTS
    finally:
        call.cancel()
        await asyncio.sleep(0.5)
    return False


async def _abort_works(victim: Any, stranger: Any) -> bool:
    """Return whether the stranger's `Abort` ends the victim's request."""
    message = request(max_tokens=_LENGTH, tenant="")
    message.request_id = _ID
    call = victim.Generate(message, metadata=VICTIM)
    await call.read()
    with contextlib.suppress(grpc.aio.AioRpcError):
        await stranger.Abort(pb.AbortRequest(request_id=_ID), metadata=STRANGER)
    tokens, reason = 0, 0
    while (answer := await call.read()) is not grpc.aio.EOF:
        for chunk in answer.chunks:
            tokens += len(chunk.token_ids)
            reason = chunk.finish_reason or reason
    return reason == pb.FINISH_REASON_ABORT and tokens < _LENGTH


async def _tenant_believed(stranger: Any) -> bool:
    """Return whether a call passes for one of a tenant that it only names."""
    try:
        await stranger.Generate(request(max_tokens=1, tenant="somebody-else"), metadata=STRANGER).read()
    except grpc.aio.AioRpcError:
        return False
    return True


async def _cached_prefix_seen(victim: Any, stranger: Any) -> bool:
    """Return whether the stranger, who names no tenant, learns what the victim, who names none either, has sent."""
    cached = 0
    for stub, metadata in ((victim, VICTIM), (stranger, STRANGER)):
        async for answer in stub.Generate(request(_SECRET, max_tokens=1, tenant=""), metadata=metadata):
            cached = answer.usage.cached_prompt_tokens
    return cached > 0


ATTACKS = (
    Attack(
        name="strangers",
        about="ids, aborts, tenants and cached prefixes of another client",
        run=run,
        serve_args=("--tenants", str(_TENANTS)),
        seconds=15.0,
        joins=False,
    ),
)
