"""Which requests can be served at all. The others are answered with a `Rejection`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from expertwire.scheduler import block_loops, row_loops
from expertwire.scheduler.block_loops import Caches
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import Request

_PACE_ADMISSIONS = 64


@dataclass(frozen=True)
class Rejection:
    """The answer to a request that is not accepted.

    Args:
        key: of the request.
        code: name of a gRPC status. INVALID_ARGUMENT: never possible; RESOURCE_EXHAUSTED: try again later.
        message: names the field, its value and what is allowed.
        retry_after_s: RESOURCE_EXHAUSTED: when to try again, in seconds; None if nothing is known.
    """

    key: int
    code: str
    message: str
    retry_after_s: float | None = None


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

    def refuse(message: str, retry_after_s: float | None) -> Rejection:
        return Rejection(request.key, "RESOURCE_EXHAUSTED", message, retry_after_s)

    wait_s = pace.wait_s(len(queue), now)
    if len(queue) >= config.max_waiting:
        return refuse(
            f"{len(queue)} requests are waiting; allowed are max_waiting = {config.max_waiting}: try later",
            pace.wait_s(1, now),
        )
    most = config.max_waiting_per_tenant
    if most is not None and (waiting := queue.num_of(request.tenant)) >= most:
        return refuse(
            f"{waiting} requests of tenant {request.tenant!r} are waiting; allowed are max_waiting_per_tenant = {most}: "
            "try later",
            pace.wait_s(1, now),
        )
    if request.deadline is None:
        return None
    left_s = request.deadline - now
    if left_s <= 0 or (wait_s is not None and wait_s > left_s):
        wait_s = wait_s or 0.0
        return refuse(
            f"the first token would come in about {wait_s:.3g} s, with {len(queue)} requests waiting; the deadline is in "
            f"{left_s:.3g} s: try later, or with a later deadline",
            max(wait_s - max(left_s, 0.0), 0.0),
        )
    return None


def invalid(request: Request, config: SchedulerConfig, caches: Caches, capacity_G: np.ndarray) -> str | None:
    """Why the request can never be served; None if it can. `capacity_G`: blocks of each cache on one rank."""
    length, params = len(request.prompt), request.params
    if length == 0:
        return "prompt must have at least 1 token, got 0"
    if length >= config.max_model_len:
        return (
            f"prompt has {length} tokens; allowed are at most {config.max_model_len - 1} "
            f"(max_model_len = {config.max_model_len}, of which one is for the output)"
        )
    if not block_loops.all_below(request.prompt, config.vocab_size):
        wrong = int(np.flatnonzero((request.prompt < 0) | (request.prompt >= config.vocab_size))[0])
        return f"prompt[{wrong}] names token {request.prompt[wrong]}; allowed are 0 to {config.vocab_size - 1}"
    for field, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        for token in ids or ():
            if not 0 <= token < config.vocab_size:
                return f"{field} names token {token}; allowed are 0 to {config.vocab_size - 1}"
    for field, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and count > config.vocab_size:
            return f"{field} is {count}; allowed are at most {config.vocab_size}, the size of the vocabulary"
    limit = token_limit(request, config)  # the last token is never computed
    if (group := row_loops.too_large(caches, limit - 1, capacity_G)) >= 0:
        needed, capacity = -(-(limit - 1) // caches.size_G[group]), capacity_G[group]
        return (
            f"prompt ({length} tokens) and max_tokens ({limit - length} after max_model_len) need "
            f"{min(needed, caches.most_G[group])} cache blocks; a rank has {capacity}, which is enough for "
            f"{capacity * caches.size_G[group] + 1} tokens in all"
        )
    return None
