"""A process that stops without dying (SIGSTOP): a rank, the controller, a front."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import statistics
import time
from collections import Counter
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.target import Target

_TIMES = 20
_LIMIT_S = 30.0  # to notice it, and to serve again
_POLL_S = 0.05
_ANSWER_S = 0.5  # for a health check; one that takes longer has noticed nothing
_MIN_AGE_S = 6.0  # of a process; a server whose fronts end one after another within 5 s of their start gives up
_PHASES_S = 1.0  # of beats and checks, over which the freezes are spread
_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


async def run(server: Target, seconds: float, *, role: str) -> dict[str, Any]:
    """Freeze a process 20 times; return how long it took until the server knew, and how it showed.

    Between the freezes the server has time to serve again. It ends early when `seconds` are over, or when something has not
    been noticed or got over within 30 s.
    """
    each_s: list[float] = []
    ways: Counter[str] = Counter()
    end, ended = time.monotonic() + seconds, "all"
    for number in range(_TIMES):
        if time.monotonic() > end:
            ended = f"the {seconds:g} s were over"
            break
        victim = await _victim(server, role)
        await asyncio.sleep(_PHASES_S * number / _TIMES)
        took_s, how = await _freeze(server, victim) if victim else (None, f"no {role} that serves")
        if took_s is None:
            ended = how
            break
        each_s.append(took_s)
        ways[how] += 1
    worst = {"max_s": max(each_s), "median_s": round(statistics.median(each_s), 2)} if each_s else {}
    return {"noticed": len(each_s), **worst, "how": dict(ways), "ended": ended, "each_s": each_s}


async def _freeze(server: Target, victim: psutil.Process) -> tuple[float | None, str]:
    """Freeze a process until the server knows; return the seconds and how it showed."""
    began = time.monotonic()
    victim.send_signal(signal.SIGSTOP)
    try:
        while (how := await _noticed(server.address, victim)) is None:
            if time.monotonic() > began + _LIMIT_S:
                return None, f"not noticed within {_LIMIT_S:g} s"
            await asyncio.sleep(_POLL_S)
        return round(time.monotonic() - began, 2), how
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGCONT)


async def _victim(server: Target, role: str) -> psutil.Process | None:
    """Wait until the server serves; return a process to freeze."""
    end = time.monotonic() + _LIMIT_S
    while time.monotonic() < end:
        found = [
            process for process in server.with_role(role) if not _has_ended(process) and _age_s(process) > _MIN_AGE_S
        ]
        if found and await _health(server.address) == "SERVING":
            return found[-1]
        await asyncio.sleep(_POLL_S)
    return None


async def _noticed(address: str, victim: psutil.Process) -> str | None:
    """Return how it shows that the server knows, or None."""
    if _has_ended(victim):
        return "killed"
    status = await _health(address)
    return None if status in ("SERVING", "silent") else status


def _age_s(process: psutil.Process) -> float:
    return time.time() - process.create_time()


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _health(address: str) -> str:
    """Return what a new connection's health check says, "refused", or "silent"."""
    async with grpc.aio.insecure_channel(address, options=_OPTIONS) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # whose methods are made when it is
        try:
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            return "refused" if error.code() == grpc.StatusCode.UNAVAILABLE else "silent"
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


ATTACKS = tuple(
    Attack(
        name=f"frozen_{role}",
        about=f"a frozen {role}, {_TIMES} times",
        run=functools.partial(run, role=role),
        seconds=300.0,
        joins=False,
    )
    for role in ("rank", "controller", "front")
)
