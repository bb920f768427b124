"""A prompt of more than twice the bytes that the kernel takes at once, on an idle engine."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from expertwire.bench.attacks.attack import Attack, request, stubs
from expertwire.bench.attacks.models import LONG_ARGS
from expertwire.bench.attacks.target import Target

_PROMPT_TOKENS = 120_000
_HOLD_S = 15.0  # after which the client gives up


async def run(server: Target, seconds: float) -> dict[str, Any]:
    """Send long prompts one after another; return how many were answered and after how long."""
    answered_s: list[float] = []
    sent, end = 0, time.monotonic() + seconds
    message = request([3 + i % 90 for i in range(_PROMPT_TOKENS)], max_tokens=1)
    async with stubs(server.address) as (stub,):
        while time.monotonic() < end:
            message.cache_salt = str(sent)
            began, sent = time.monotonic(), sent + 1
            call = stub.Generate(message)
            try:
                await asyncio.wait_for(call.read(), _HOLD_S)
                answered_s.append(round(time.monotonic() - began, 1))
            except TimeoutError:
                pass
            call.cancel()
            await asyncio.sleep(2)
    return {"prompts": sent, "answered_s": answered_s}


ATTACKS = (
    Attack(
        name="lost_wakeup",
        about=f"prompts of {_PROMPT_TOKENS:,} tokens on an idle engine",
        run=run,
        model="long",
        serve_args=LONG_ARGS,
        seconds=30.0,
        good_interval_s=1.5,
    ),
)
