"""The overload manager: what clients together may hold of a front. Beyond it calls end RESOURCE_EXHAUSTED, before they are read.

Connections and calls of one connection are limited by gRPC itself (`Limits.options`), which has no call to answer there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator

from expertwire.deploy.grpc.config import Limits
from expertwire.engine.frontend.api import RequestError, RequestFailed

_RETRY_S = 1.0
_SLOW_S = 0.1  # a message that has not arrived within this time is slow
_MAX_SLOW, _MAX_SLOW_OF_CLIENT = 32, 16
_MAX_STREAMING, _MAX_STREAMING_OF_CLIENT = 64, 32


class Overload:
    """Count of the calls and the slow messages of a front.

    Attributes:
        num_calls: calls that run.
    """

    def __init__(self, limits: Limits) -> None:
        self.num_calls = 0
        self._limits = limits
        self._streaming: Counter[str] = Counter()  # calls whose clients stream, by client
        self._slow: Counter[str] = Counter()  # messages that arrive slowly, by client

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Count a call.

        Raises:
            RequestFailed: there are too many.
        """
        if self.num_calls >= self._limits.max_calls:
            text = f"the server has {self.num_calls} calls; max_calls allows {self._limits.max_calls} in each of its processes"
            raise RequestFailed(RequestError("RESOURCE_EXHAUSTED", text, _RETRY_S))
        self.num_calls += 1
        try:
            yield
        finally:
            self.num_calls -= 1

    @contextlib.contextmanager
    def streaming(self, client: str) -> Iterator[None]:
        """Count a call whose client sends messages when it likes: one that has arrived in part takes memory for any time.

        Raises:
            RequestFailed: there are too many, or too many of this client.
        """
        if self._streaming.total() >= _MAX_STREAMING or self._streaming[client] >= _MAX_STREAMING_OF_CLIENT:
            text = (
                f"{self._streaming.total()} calls stream requests, {self._streaming[client]} of this client; at most "
                f"{_MAX_STREAMING} and {_MAX_STREAMING_OF_CLIENT} are allowed in each of the server's processes"
            )
            raise RequestFailed(RequestError("RESOURCE_EXHAUSTED", text, _RETRY_S))
        self._streaming[client] += 1
        try:
            yield
        finally:
            self._streaming[client] -= 1
            self._streaming += Counter()  # forget clients without any

    @contextlib.contextmanager
    def reading(self, client: str) -> Iterator[asyncio.Timeout]:
        """Bound the time of a read by the returned time-out, which the read has to enter.

        A message in parts takes memory until it is complete, so few may arrive slowly at once, and half of them of one client.

        Raises:
            RequestFailed: the message did not arrive in time, or arrives slowly and too many others do.
        """
        timeout_s, loop = self._limits.message_timeout_s, asyncio.get_running_loop()
        slow_s, timeout = min(_SLOW_S, timeout_s / 2), asyncio.timeout(None)
        is_slow = is_refused = False

        def slow() -> None:
            nonlocal is_slow, is_refused
            if self._slow.total() >= _MAX_SLOW or self._slow[client] >= _MAX_SLOW_OF_CLIENT:
                is_refused = True
                timeout.reschedule(loop.time())
            else:
                is_slow = True
                self._slow[client] += 1
                timeout.reschedule(loop.time() + timeout_s - slow_s)

        timer = loop.call_later(slow_s, slow)
        try:
            yield timeout
        except TimeoutError as error:
            if not is_refused:
                text = f"the call's message did not arrive within message_timeout_s = {timeout_s:g} s"
                raise RequestFailed(RequestError("DEADLINE_EXCEEDED", text)) from error
            text = f"the call's message arrives slowly, and so do {self._slow.total()} others"
            raise RequestFailed(RequestError("RESOURCE_EXHAUSTED", text, _RETRY_S)) from error
        finally:
            timer.cancel()
            if is_slow:
                self._slow[client] -= 1
                self._slow += Counter()  # forget clients without any
