"""A checkpoint with an embedding that is not a number: what a prompt with that token is answered, and other prompts."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import grpc

from expertwire.bench.attacks.attack import Attack, request, stubs
from expertwire.bench.attacks.models import NAN_TOKEN
from expertwire.bench.attacks.target import Target


async def run(server: Target, seconds: float) -> dict[str, Any]:
    """Send prompts with the token; return how they end and what they say."""
    statuses: Counter[str] = Counter()
    tokens = wrong = 0
    end = time.monotonic() + seconds
    message = request([5, NAN_TOKEN, 7, 9], max_tokens=8, logprobs=1, temperature=0)
    async with stubs(server.address) as (stub,):
        while time.monotonic() < end:
            try:
                async for answer in stub.Generate(message):
                    for chunk in answer.chunks:
                        tokens += len(chunk.token_ids)
                        wrong += sum(math.isnan(entry.tokens[0].logprob) for entry in chunk.logprobs)
                statuses["OK"] += 1
            except grpc.aio.AioRpcError as error:
                statuses[error.code().name] += 1
    return {"statuses": dict(statuses), "tokens": tokens, "tokens_with_nan": wrong}


ATTACKS = (
    Attack(
        name="not_a_number",
        about="prompts with a token whose embedding is NaN",
        run=run,
        model="nan",
        seconds=5.0,
        joins=False,
    ),
)
