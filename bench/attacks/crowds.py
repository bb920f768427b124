"""Many clients at once who do nothing wrong, or who go away: fairness, disconnects, thousands of streams."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

from expertwire.bench.attacks.attack import Attack, gather_statuses, request, status_of, stubs
from expertwire.bench.attacks.target import Target

_STORM_STREAMS = 200
_STREAMS, _IDLE, _CONNECTIONS = 2_000, 1_000, 25
_MEAN_PATIENCE_S = 0.5


async def run_fair(server: Target, seconds: float) -> dict[str, Any]:
    """Keep 400 long streams of one tenant open."""
    statuses: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def client(stub: Any) -> None:
        while (left := end - time.monotonic()) > 0:
            try:
                statuses[await asyncio.wait_for(status_of(stub.Generate(request(max_tokens=1500))), left)] += 1
            except TimeoutError:
                return

    async with stubs(server.address, 8) as all_stubs:
        await asyncio.gather(*(client(all_stubs[i % 8]) for i in range(400)))
    return {"statuses": dict(statuses)}


async def run_disconnects(server: Target, seconds: float) -> dict[str, Any]:
    """Keep 200 streams open whose clients leave after a random time, some with their connections."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def client(rng: random.Random) -> None:
        while time.monotonic() < end:
            async with stubs(server.address) as (stub,):
                for _ in range(rng.randint(1, 8)):
                    call = stub.Generate(request(max_tokens=rng.randint(1, 1000)))
                    patience = min(rng.expovariate(1 / _MEAN_PATIENCE_S), max(0.01, end - time.monotonic()))
                    try:
                        counts[await asyncio.wait_for(status_of(call), patience)] += 1
                    except TimeoutError:
                        counts["disconnected"] += 1
                    await asyncio.sleep(0.01)

    await asyncio.gather(*(client(random.Random(seed)) for seed in range(_STORM_STREAMS)))
    return {"calls": dict(counts)}


async def run_streams(server: Target, seconds: float) -> dict[str, Any]:
    """Open 2,000 streams and 1,000 silent connections."""
    idle: list[asyncio.StreamWriter] = []
    failed = 0
    try:
        for _ in range(_IDLE):
            try:
                idle.append((await asyncio.open_connection("127.0.0.1", server.port))[1])
            except OSError:
                failed += 1
        async with stubs(server.address, _CONNECTIONS) as all_stubs:
            message = request(max_tokens=64)
            calls = [all_stubs[i % _CONNECTIONS].Generate(message) for i in range(_STREAMS)]
            statuses = await gather_statuses(calls, seconds)
    finally:
        for writer in idle:
            writer.transport.abort()
    return {"statuses": statuses, "idle_connections": len(idle), "idle_refused": failed}


ATTACKS = (
    Attack(
        name="fair",
        about="400 streams of one tenant beside another, --scheduling-policy fair",
        run=run_fair,
        seconds=45.0,
        serve_args=("--scheduling-policy", "fair", "--max-num-seqs", "64"),
    ),
    Attack(
        name="disconnect_storm",
        about=f"{_STORM_STREAMS} streams whose clients leave",
        run=run_disconnects,
        seconds=90.0,
    ),
    Attack(
        name="many_streams",
        about=f"{_STREAMS:,} streams and {_IDLE:,} silent connections at once, --scheduling-policy fair",
        run=run_streams,
        seconds=60.0,
        serve_args=("--scheduling-policy", "fair"),
    ),
)
