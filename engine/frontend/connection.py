"""A frontend's connection to the controller: messages, the engine's statistics, and the news that the engine has failed."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from expertwire.comm.control.channel import ChannelClosed, ControlChannel
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.api import EngineFailed
from expertwire.engine.messages import (
    Beat,
    CacheFlush,
    Count,
    Failure,
    Hello,
    Message,
    Stats,
    StatsRequest,
    Welcome,
    decode,
    encode,
)

# Without a message from the controller for so long, an engine that sends beats is not healthy.
_SILENT_S = 1.75


class Connection:
    """The channel to the controller. When it or the engine fails, nothing more is sent or received.

    Args:
        channel: a connected channel, which `close` closes.
        watches: whether the controller shall send beats, so that `problem` notices a frozen engine.
        welcome_timeout_s: seconds within which the controller must answer.

    Attributes:
        model_info: the model and its limits.
        failure: the error with which the engine failed, or None.
        counts: what is to be added to the engine's statistics.
        on_failure: called once, when `failure` has been set.

    Raises:
        EngineFailed: the controller does not answer, or the engine has failed.
    """

    def __init__(self, channel: ControlChannel, *, watches: bool, welcome_timeout_s: float) -> None:
        self._channel = channel
        self._watches = watches
        self.failure: EngineFailed | None = None
        self.counts: Counter[str] = Counter()
        self.on_failure: Callable[[], None] = lambda: None
        self._stats_callbacks: deque[Callable[[dict[str, Any] | None], None]] = deque()
        self._flush_callbacks: deque[Callable[[dict[str, int] | None], None]] = deque()
        self._problem, self._heard_s = "", time.monotonic()
        self.model_info = self._say_hello(welcome_timeout_s)

    @property
    def problem(self) -> str:
        """Why the engine cannot serve at the moment, or "". Only if it `watches`."""
        if self.failure is not None:
            return str(self.failure)
        if (silence_s := time.monotonic() - self._heard_s) > _SILENT_S:
            return f"the controller has been silent for {silence_s:.1f} s"
        return self._problem

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `poll(0)` may return updates."""
        return self._channel.fileno()

    @property
    def pending(self) -> int:
        """Bytes that wait to be sent; callers that wait for `fileno()` wait until it is writable as well, and call `flush`."""
        return self._channel.pending

    def flush(self) -> None:
        """Send what the kernel takes without waiting."""
        if self.failure is None:
            try:
                self._channel.flush()
            except ChannelClosed as error:
                self._fail(-1, f"the connection to the controller is lost: {error}")

    def check_alive(self) -> None:
        """Raise EngineFailed if the engine has failed."""
        if self.failure is not None:
            raise EngineFailed(str(self.failure), self.failure.rank)

    def send(self, message: Message) -> None:
        """Send a message, unless the engine has failed."""
        if self.failure is None:
            try:
                self._channel.send(encode(message))
            except ChannelClosed as error:
                self._fail(-1, f"the connection to the controller is lost: {error}")

    def receive(self, timeout_s: float) -> Message | None:
        """Return the next message; wait up to `timeout_s` seconds for it. None: there is none, or the engine has failed."""
        if self.failure is not None:
            return None
        try:
            arrays = self._channel.recv(timeout_s)
        except ChannelClosed as error:
            self._fail(-1, f"the connection to the controller is lost: {error}")
            return None
        if arrays is None:
            return None
        self._heard_s = time.monotonic()
        return decode(arrays)

    def request_stats(self, callback: Callable[[dict[str, Any] | None], None]) -> None:
        """Ask for the engine's counters and gauges. `handle` calls `callback` with them, or with None if the engine fails."""
        self._stats_callbacks.append(callback)
        self._send_counts()
        self.send(StatsRequest())

    def request_cache_flush(self, callback: Callable[[dict[str, int] | None], None]) -> None:
        """Empty the prefix cache of blocks that no request uses; `callback` gets their number by cache, as in `request_stats`."""
        self._flush_callbacks.append(callback)
        self.send(CacheFlush())

    def handle(self, message: Message) -> bool:
        """Handle a message about the engine; return whether it is one, and not one about requests."""
        if isinstance(message, Stats):
            self._stats_callbacks.popleft()(message.values)
        elif isinstance(message, CacheFlush):
            self._flush_callbacks.popleft()(message.freed_blocks)
        elif isinstance(message, Beat):
            self._problem = message.problem
            self._send_counts()
        elif isinstance(message, Failure):
            self._fail(message.rank, message.message)
        else:
            return False
        return True

    def close(self) -> None:
        """Close the channel; the controller then frees the open requests. Idempotent."""
        self._channel.close()

    def _say_hello(self, timeout_s: float) -> ModelInfo:
        self.send(Hello(beats=self._watches))
        message = self.receive(timeout_s)
        if isinstance(message, Welcome):
            return ModelInfo.from_dict(message.model_info)
        if isinstance(message, Failure):
            self.handle(message)
        self.check_alive()
        raise EngineFailed(f"the controller did not answer within {timeout_s:g} s")

    def _send_counts(self) -> None:
        if self.counts:
            self.send(Count(values=dict(self.counts)))
            self.counts.clear()

    def _fail(self, rank: int, message: str) -> None:
        named = rank < 0 or f"rank {rank}" in message
        self.failure = EngineFailed(message if named else f"rank {rank}: {message}", rank)
        self.on_failure()
        while self._stats_callbacks:
            self._stats_callbacks.popleft()(None)
        while self._flush_callbacks:
            self._flush_callbacks.popleft()(None)
