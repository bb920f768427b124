"""Requests whose cost is in what they ask of the front: stop strings and log-probabilities of many outputs."""

from __future__ import annotations

import functools
from typing import Any

from expertwire.bench.attacks.attack import Attack, gather_statuses, request, stubs
from expertwire.bench.attacks.target import Target
from expertwire.scheduler.sampling_params import MAX_STOP


def stop_strings(count: int = MAX_STOP) -> list[str]:
    """Return different strings that do not occur in English text."""
    return [f"~{i:05d}~" for i in range(count)]


async def run(server: Target, seconds: float, *, streams: int, **params: Any) -> dict[str, Any]:
    """Open streams with such requests and read them; return their statuses."""
    message = request(stop=stop_strings(), max_tokens=400, **params)
    async with stubs(server.address, 1 + streams // 32) as all_stubs:
        calls = [all_stubs[i % len(all_stubs)].Generate(message) for i in range(streams)]
        return {"statuses": await gather_statuses(calls, seconds)}


ATTACKS = (
    Attack(
        name="stop_strings_256",
        about=f"one request with n = 256 and {MAX_STOP:,} stop strings",
        run=functools.partial(run, streams=1, n=256),
        seconds=30.0,
    ),
    Attack(
        name="stop_strings_128",
        about=f"128 streams, n = 4, 64 log-probabilities, {MAX_STOP:,} stop strings",
        run=functools.partial(run, streams=128, n=4, logprobs=64),
        seconds=45.0,
    ),
)
