"""Requests with strategies whose cost is in what clients choose: patterns of answers, and windows of confidence."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from expertwire.bench.attacks.attack import Attack, request, status_of, stubs
from expertwire.bench.attacks.target import Target
from expertwire.deploy.proto import expertwire_v1_pb2 as pb

_BRANCHES, _TOKENS = 256, 500
_MATCHES_EACH_CHARACTER = "((a)|(b)|(c)|(d)|(e)|(f))*~~|."
_MANY_CLASSES = r"\pL" * 1_365  # as long as a text of a strategy may be
_STRATEGIES = (
    pb.Strategy(majority_vote={"n": _BRANCHES, "answer": {"regex": {"pattern": _MATCHES_EACH_CHARACTER}}}),
    pb.Strategy(
        confidence_pruning={"n": _BRANCHES, "warm_up": 1, "window": _TOKENS // 2, "answer": {"whole_text": {}}}
    ),
    pb.Strategy(majority_vote={"n": 1, "answer": {"regex": {"pattern": _MANY_CLASSES}}}),
)


async def run(server: Target, seconds: float) -> dict[str, Any]:
    """Make requests with such strategies, one of each after another; return their statuses."""
    statuses: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def client(stub: Any, strategy: pb.Strategy) -> None:
        message = request(max_tokens=_TOKENS)
        message.strategy.CopyFrom(strategy)
        while (left := end - time.monotonic()) > 0:
            try:
                statuses[await asyncio.wait_for(status_of(stub.Generate(message)), left)] += 1
            except TimeoutError:
                return

    async with stubs(server.address, len(_STRATEGIES)) as all_stubs:
        await asyncio.gather(*(client(stub, each) for stub, each in zip(all_stubs, _STRATEGIES, strict=True)))
    return {"statuses": dict(statuses)}


ATTACKS = (
    Attack(
        name="costly_strategies",
        about=f"votes of {_BRANCHES} outputs with costly patterns and windows, no model",
        run=run,
        seconds=30.0,
        serve_args=("--load-format", "mock", "--mock-step-time", "0.02", "--max-num-seqs", "512"),
        joins=False,
    ),
)
