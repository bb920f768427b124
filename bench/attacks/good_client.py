"""A client that does nothing wrong, in a process of its own: short requests, health checks and new connections.

`GoodClient` is its handle. The process writes one line of JSON for each line that it reads: its figures since the last one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertwire.bench.attacks.attack import authorization
from expertwire.deploy.grpc.event_loop import GrpcEventLoop
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc

_TIMEOUT_S = 300.0  # of a request; longer than any attack
_HEALTH_TIMEOUT_S = 60.0
_HEALTH_INTERVAL_S = 0.25
_CONNECT_INTERVAL_S = 1.0
_AFTER_FAILURE_S = 0.1
_TOKENS = 8  # of a request
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]


@dataclass
class _Waits:
    """Waits of one kind: those that have ended, by how, and the one that has not."""

    counts: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0
    since: float | None = None
    message: str = ""  # of the first that failed

    def longest_ms(self, now: float) -> float:
        pending = 0.0 if self.since is None else now - self.since
        return round(1e3 * max(self.longest_s, pending), 1)

    def step(self) -> None:
        """End a wait and begin the next."""
        now = time.monotonic()
        if self.since is not None:
            self.longest_s = max(self.longest_s, now - self.since)
        self.since = now

    def end(self, how: str, message: str = "") -> None:
        """End a wait."""
        self.step()
        self.since = None
        self.counts[how] += 1
        self.message = self.message or message

    def clear(self, now: float) -> None:
        """Begin anew; what waits now has waited from now on."""
        self.counts.clear()
        self.longest_s, self.message = 0.0, ""
        if self.since is not None:
            self.since = now


@dataclass
class _Client:
    address: str
    interval_s: float
    requests: _Waits = field(default_factory=_Waits)
    health: _Waits = field(default_factory=_Waits)
    connections: _Waits = field(default_factory=_Waits)
    first_tokens_ms: list[float] = field(default_factory=list)

    def report(self) -> None:
        """Write the figures since the last report."""
        now, firsts = time.monotonic(), self.first_tokens_ms
        figures: dict[str, Any] = {
            name: {"counts": dict(waits.counts), "longest_ms": waits.longest_ms(now), "message": waits.message}
            for name, waits in (("requests", self.requests), ("health", self.health), ("connections", self.connections))
        }
        if len(firsts) > 1:
            figures["first_token_ms"] = {
                "median": round(statistics.median(firsts), 1),
                "p99": round(statistics.quantiles(firsts, n=100, method="inclusive")[98], 1),
            }
        print(json.dumps(figures), flush=True)
        for waits in (self.requests, self.health, self.connections):
            waits.clear(now)
        firsts.clear()

    async def run(self) -> None:
        """Call the server for ever."""
        async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            stub, health = pb_grpc.InferenceStub(channel), health_pb2_grpc.HealthStub(channel)
            await asyncio.gather(
                _repeat(self.requests, self.interval_s, lambda: self._generate(stub)),
                _repeat(self.health, _HEALTH_INTERVAL_S, lambda: _check(health)),
                _repeat(self.connections, _CONNECT_INTERVAL_S, self._connect),
            )

    async def _generate(self, stub: pb_grpc.InferenceStub) -> str:
        request = pb.GenerateRequest(text="Once upon a time", tenant="good")
        request.sampling_params.MergeFrom(pb.SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True))
        began, tokens = time.monotonic(), 0
        async for message in stub.Generate(request, timeout=_TIMEOUT_S, metadata=authorization("good")):
            self.requests.step()
            if tokens == 0:
                self.first_tokens_ms.append(1e3 * (time.monotonic() - began))
            tokens += sum(len(chunk.token_ids) for chunk in message.chunks)
        return "OK" if tokens == _TOKENS else f"{tokens} tokens"

    async def _connect(self) -> str:
        async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            return await _check(health_pb2_grpc.HealthStub(channel))


async def _check(health: Any) -> str:  # a `HealthStub`, whose methods are made when it is
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_TIMEOUT_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def _repeat(waits: _Waits, interval_s: float, call: Callable[[], Awaitable[str]]) -> None:
    while True:
        waits.step()
        try:
            waits.end(await call())
        except grpc.aio.AioRpcError as error:
            waits.end(error.code().name, error.details() or "")
            await asyncio.sleep(_AFTER_FAILURE_S)
        await asyncio.sleep(interval_s)


class GoodClient:
    """A handle of the process."""

    def __init__(self, address: str, interval_s: float) -> None:
        command = [sys.executable, "-m", "expertwire.bench.attacks.good_client", address, str(interval_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    async def take(self) -> dict[str, Any]:
        """Return the figures since the last call."""
        return await asyncio.to_thread(self._take)

    def _take(self) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


async def _main(address: str, interval_s: float) -> None:
    client, loop, end = _Client(address, interval_s), asyncio.get_running_loop(), asyncio.Event()

    def listen() -> None:
        for _ in sys.stdin:
            loop.call_soon_threadsafe(client.report)
        loop.call_soon_threadsafe(end.set)

    threading.Thread(target=listen, daemon=True).start()
    task = asyncio.create_task(client.run())
    ended = asyncio.create_task(end.wait())
    await asyncio.wait([task, ended], return_when=asyncio.FIRST_COMPLETED)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=GrpcEventLoop) as runner:
        runner.run(_main(sys.argv[1], float(sys.argv[2])))
