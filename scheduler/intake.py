"""Which requests can be served at all. The others are answered with a `Rejection`."""

from __future__ import annotations

import sys
from collections import deque
from typing import NamedTuple

import numpy as np

from expertwire.scheduler._compiled import blocks as block_loops
from expertwire.scheduler._compiled.blocks import Caches
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import Rejection
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import Request

_PACE_ADMISSIONS = 64


def token_limit(request: Request, config: SchedulerConfig) -> int:
    """Prompt and output tokens at most: `max_tokens` is cut to what `max_model_len` leaves for it."""
    return min(len(request.prompt) + request.params.max_tokens, config.max_model_len)


class Pace:
    """How fast requests have been admitted lately, since some wait: without that it says how seldom they come."""

    def __init__(self) -> None:
        self._admitted_at: deque[float] = deque(maxlen=_PACE_ADMISSIONS)

    def nobody_waits(self) -> None:
        """Begin anew."""
        self._admitted_at.clear()

    def admitted(self, count: int, now: float) -> None:
        """Count some."""
        self._admitted_at.extend([now] * count)

    def wait_s(self, num_ahead: int, now: float) -> float | None:
        """How long a request behind so many others will wait if it goes on like that, in seconds; None: nothing is known."""
        if not num_ahead:
            return 0.0
        if len(self._admitted_at) < _PACE_ADMISSIONS or now <= self._admitted_at[0]:
            return None
        return num_ahead * (now - self._admitted_at[0]) / len(self._admitted_at)


def refusal(request: Request, config: SchedulerConfig, queue: WaitingQueue, pace: Pace, now: float) -> Rejection | None:
    """Why the request is not accepted at this time; None if it is."""
    most, message, retry_after_s = config.max_queued_requests_per_tenant, None, None
    if len(queue) >= config.max_queued_requests:
        message = f"{len(queue)} requests are waiting; allowed are max_queued_requests = {config.max_queued_requests}: try later"
        retry_after_s = pace.wait_s(1, now)
    elif most is not None and (waiting := queue.num_of(request.tenant)) >= most:
        message = (
            f"{waiting} requests of tenant {request.tenant!r} are waiting; allowed are max_queued_requests_per_tenant = {most}: "
            "try later"
        )
        retry_after_s = pace.wait_s(1, now)
    elif request.deadline is not None:
        wait_s, left_s = pace.wait_s(len(queue), now), request.deadline - now
        if left_s <= 0 or (wait_s is not None and wait_s > left_s):
            wait_s = wait_s or 0.0
            message = (
                f"the first token would come in about {wait_s:.3g} s, with {len(queue)} requests waiting; the deadline is in "
                f"{left_s:.3g} s: try later, or with a later deadline"
            )
            retry_after_s = max(wait_s - max(left_s, 0.0), 0.0)
    return None if message is None else Rejection(request.key, "RESOURCE_EXHAUSTED", message, retry_after_s)


class Bound(NamedTuple):
    """How many tokens one request can have computed: those that this cache holds."""

    num_tokens: int
    group: int


def bound(caches: Caches, capacity_G: np.ndarray) -> Bound:
    """Of the caches' bounds the least. `capacity_G`: blocks of each on one rank."""
    bounds = [
        Bound(capacity * size if most > capacity else sys.maxsize, group)
        for group, (capacity, size, most) in enumerate(
            zip(capacity_G.tolist(), caches.size_G.tolist(), caches.most_G.tolist(), strict=True)
        )
    ]
    return min(bounds)


def invalid(request: Request, config: SchedulerConfig, caches: Caches, most: Bound) -> str | None:
    """Why the request, whose `limit` is known, can never be served; None if it can. Its ids are of the vocabulary: fronts see to
    that."""
    length = len(request.prompt)
    assert block_loops.all_below(request.prompt, config.vocab_size), f"request {request.key} has tokens that are none"
    if length == 0:
        return "prompt must have at least 1 token, got 0"
    if length >= config.max_model_len:
        return (
            f"prompt has {length} tokens; allowed are at most {config.max_model_len - 1} "
            f"(max_model_len = {config.max_model_len}, of which one is for the output)"
        )
    if request.limit - 1 > most.num_tokens:  # the last token is never computed
        size, most_blocks = int(caches.size_G[most.group]), int(caches.most_G[most.group])
        return (
            f"prompt ({length} tokens) and max_tokens ({request.limit - length} after max_model_len) need "
            f"{min(-(-(request.limit - 1) // size), most_blocks)} cache blocks; a rank has {most.num_tokens // size}, which is "
            f"enough for {most.num_tokens + 1} tokens in all"
        )
    return None
