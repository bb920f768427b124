"""More calls at once than a server can hold."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from expertwire.bench.attacks.attack import Attack, gather_statuses, request, stubs
from expertwire.bench.attacks.target import Target

_CALLS = 6_000
_CONNECTIONS = 60


async def run(server: Target, seconds: float) -> dict[str, Any]:
    """Start 6,000 short requests at once, again and again; return their statuses."""
    statuses: Counter[str] = Counter()
    bursts, end = 0, time.monotonic() + seconds
    message = request(max_tokens=1)
    async with stubs(server.address, _CONNECTIONS) as all_stubs:
        while time.monotonic() < end:
            calls = [all_stubs[i % _CONNECTIONS].Generate(message) for i in range(_CALLS)]
            statuses.update(await gather_statuses(calls, 60))
            bursts += 1
    return {"bursts": bursts, "statuses": dict(statuses)}


ATTACKS = (
    Attack(
        name="bursts",
        about=f"{_CALLS:,} short requests of one tenant at once, --scheduling-policy fair",
        run=run,
        seconds=10.0,
        serve_args=("--scheduling-policy", "fair"),
    ),
)
