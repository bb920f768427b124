"""`Attack`, what every attack defines, and helpers to call a server."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import grpc

from expertwire.bench.attacks.target import Target
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc

Model = Literal["demo", "long", "nan"]  # see `models.folder_of`


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack on a server of its own.

    Args:
        name: by which it is chosen.
        about: what it does, in some words.
        run: attacks for about the given number of seconds; returns what it has seen.
        seconds: how long, unless the command says otherwise.
        model: what the server serves.
        serve_args: further options of `expertwire serve`.
        descriptors: limit of descriptors of a process of the server; None keeps this machine's.
        good_interval_s: seconds between the requests of the good client.
        joins: whether it takes part when all attack at once.
    """

    name: str
    about: str
    run: Callable[[Target, float], Awaitable[Mapping[str, Any]]]
    seconds: float = 20.0
    model: Model = "demo"
    serve_args: Sequence[str] = ()
    descriptors: int | None = None
    good_interval_s: float = 0.05
    joins: bool = True


def request(prompt: str | Sequence[int] = "Once upon a time", *, tenant: str = "attacker", **params: Any) -> Any:
    """Return a `GenerateRequest`; `params` are fields of `SamplingParams`."""
    message = pb.GenerateRequest(tenant=tenant, sampling_params=pb.SamplingParams(ignore_eos=True, **params))
    if isinstance(prompt, str):
        message.text = prompt
    else:
        message.token_ids.ids.extend(prompt)
    return message


def authorization(tenant: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata with which a tenant of tenants.toml calls; servers without tenants ignore it."""
    return (("authorization", f"Bearer {tenant}"),)


@contextlib.asynccontextmanager
async def stubs(address: str, count: int = 1) -> AsyncIterator[list[pb_grpc.InferenceStub]]:
    """Yield stubs, each on a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 500)]
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(count)]
    try:
        yield [pb_grpc.InferenceStub(channel) for channel in channels]
    finally:
        for channel in channels:
            await channel.close()


async def status_of(call: Any) -> str:
    """Read a stream to its end; return the name of its status."""
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except asyncio.CancelledError:
        call.cancel()
        raise
    return "OK"


async def gather_statuses(calls: Sequence[Any], timeout_s: float) -> dict[str, int]:
    """Read all streams; return how many ended with each status. Those still open after `timeout_s` are cancelled."""
    tasks = [asyncio.ensure_future(status_of(call)) for call in calls]
    done, left = await asyncio.wait(tasks, timeout=max(0.1, timeout_s))
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    counts = Counter(task.result() for task in done)
    if left:
        counts["open"] = len(left)
    return dict(counts)
