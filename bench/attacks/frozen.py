"""A process that stops without dying (SIGSTOP): a rank, the controller, a front."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import time
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.server import Server

_POLL_S = 0.05
_ANSWER_S = 0.5  # for a health check; one that takes longer has noticed nothing
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


async def run(server: Server, seconds: float, *, role: str) -> dict[str, Any]:
    """Freeze a process; return how long it took until the server knew, and how it showed."""
    victims = server.with_role(role)
    if not victims:
        return {"noticed_s": None, "how": f"there is no {role}"}
    victim = victims[-1]
    began = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    try:
        while (how := await _noticed(server.address, victim)) is None:
            if time.monotonic() > began + seconds:
                return {"noticed_s": None, "how": f"not within {seconds:g} s"}
            await asyncio.sleep(_POLL_S)
        return {"noticed_s": round(time.monotonic() - began, 2), "how": how}
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGCONT)


async def _noticed(address: str, victim: psutil.Process) -> str | None:
    """Return how it shows that the server knows, or None."""
    if not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE:
        return "killed"
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # whose methods are made when it is
        try:
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return "refused" if error.code() == grpc.StatusCode.UNAVAILABLE else None
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if name == "SERVING" else name


ATTACKS = tuple(
    Attack(
        name=f"frozen_{role}",
        about=f"a frozen {role}",
        run=functools.partial(run, role=role),
        seconds=30.0,
        joins=False,
    )
    for role in ("rank", "controller", "front")
)
