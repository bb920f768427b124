"""The groups of a front in its event loop: requests with a strategy, over the frontend that plain requests use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from expertwire.engine.frontend.api import RequestError, RequestFailed, RequestOptions
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.groups import Groups
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.base import Strategy

MAX_GROUPS = 1024  # that run at once; what the loop does at each deadline takes time in their number
_RETRY_S = 1.0
T = TypeVar("T")


class GroupLoop:
    """Runs groups within the event loop of the caller.

    Args:
        frontend: used by the loop's thread only.
        on_sent: called when the frontend may have something to send, or may have failed.
    """

    def __init__(self, frontend: Frontend, on_sent: Callable[[], None]) -> None:
        self._groups = Groups(frontend, aside=self._compute)
        # One thread: each group computes one thing at a time in it, so groups take turns.
        self._computing, self._is_stopped = ThreadPoolExecutor(1, "strategies"), False
        self._on_sent = on_sent
        self._num_open = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = 0.0  # when it goes off, by `time.monotonic`
        self._descriptor = self._groups.fileno()
        self._loop.add_reader(self._descriptor, self._deliver)

    def start(
        self,
        tokens: np.ndarray,
        params: SamplingParams,
        options: RequestOptions,
        strategy: Strategy,
        prompt: str | None,
        *,
        streams: bool,
    ) -> GroupRun:
        """Start a group, which counts until `closed`; arguments and errors as those of `Groups.start`.

        Raises:
            RequestFailed: too many groups run.
        """
        if self._num_open >= MAX_GROUPS:
            text = f"{self._num_open} requests with a strategy run; at most {MAX_GROUPS} may in each of the server's processes"
            raise RequestFailed(RequestError("RESOURCE_EXHAUSTED", text, _RETRY_S))
        run = self._groups.start(tokens, params, options, strategy, prompt=prompt, streams=streams)
        self._num_open += 1
        self._settle()
        return run

    def closed(self) -> None:
        """Take note that a group which was started has ended and is forgotten."""
        self._num_open -= 1

    def handle(self, request: OpenRequest) -> bool:
        """Take in a request's news; return whether it belongs to a group. `settle` follows."""
        return self._groups.handle(request)

    def settle(self) -> None:
        """Wait for the deadlines that the groups have now."""
        deadline_s = self._groups.deadline_s
        if deadline_s is None or (self._timer is not None and self._timer_s == deadline_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = deadline_s
        self._timer = self._loop.call_later(max(0.0, deadline_s - time.monotonic()), self._expire)

    def stop(self) -> None:
        """Abort all groups, and stop. Idempotent."""
        self._loop.remove_reader(self._descriptor)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._groups.close()
        self._is_stopped = True
        self._computing.shutdown(wait=False, cancel_futures=True)

    def _compute(self, call: Callable[[], T], then: Callable[[Future[T]], None]) -> None:
        """Compute something beside the loop, and give `then` the outcome."""

        def done(future: Future[T]) -> None:
            if not self._is_stopped:
                self._loop.call_soon_threadsafe(self._computed, then, future)

        self._computing.submit(call).add_done_callback(done)

    def _computed(self, then: Callable[[Future[T]], None], future: Future[T]) -> None:
        if not self._is_stopped:
            then(future)
            self._settle()

    def _expire(self) -> None:
        self._timer = None
        self._deliver()

    def _deliver(self) -> None:
        """Take in what verifiers have answered, and what is late."""
        self._groups.deliver()
        self._settle()

    def _settle(self) -> None:
        self.settle()
        self._on_sent()
