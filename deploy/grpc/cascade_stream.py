"""Output stream of one request of a cascade."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from expertwire.deploy.grpc.cascade_loop import OpenedCascade
from expertwire.deploy.grpc.messages import write_chunk
from expertwire.deploy.grpc.stream import MESSAGE_SIZE
from expertwire.deploy.grpc.usage import UsageCounter
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError, RequestFailed


class CascadeStream:
    """The output of one request for its client; a `Stream`.

    The small model's output is held back until it is accepted; the large one's comes as it is made.

    Args:
        turn: waits for the client's turn, before a message is made.

    Attributes:
        error: the error that the stream ends with, or None.
        writing_since: when the write began that has not ended, by `time.monotonic`; None between writes.
        opened: the request; set when it has begun.
    """

    opened: OpenedCascade

    def __init__(self, turn: Callable[[], Awaitable[None]]) -> None:
        self.error: RequestError | None = None
        self.writing_since: float | None = None
        self._turn = turn
        self._usage: UsageCounter | None = None  # None before the first message
        self._complete = False
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Take note that there is something to read."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, code: str, message: str, *, drop: bool = False) -> None:
        """End with an error status, instead of what is unread."""
        if self.error is None:
            self.error = RequestError(code, message)
            self.wake()

    def abort(self) -> bool:
        """End the request; return whether it ran."""
        return self.opened.run.cancel()

    async def read(self) -> pb.GenerateResponse | None:
        """Return a message of unread output, up to about `MESSAGE_SIZE`; None after the last one.

        Raises:
            RequestFailed: the stream ends with an error.
        """
        run = self.opened.run
        while not (run.has_output or run.error is not None or self.error is not None or self._complete):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._complete:
            return None
        await self._turn()
        message = pb.GenerateResponse()
        updates = [] if self.error is not None else run.take(MESSAGE_SIZE)
        if (error := self.error or run.error) is not None:
            raise RequestFailed(error)
        if self._usage is None:
            message.request_id, message.opens_reasoning = self.opened.key[1], self.opened.opens_reasoning
            self._usage = self.opened.usage()
        for update in updates:
            self._usage.add(update)
            write_chunk(message.chunks.add(), update)
        if run.done:
            message.usage.CopyFrom(self._usage.message())
            message.usage.kept_tokens = message.usage.completion_tokens
            message.usage.pruned_tokens = run.num_tokens - message.usage.completion_tokens
            message.usage.verifier_tokens = run.verifier_tokens
            self._write_result(message.cascade)
            self._complete = True
        return message

    def writes(self) -> None:
        """Take note that a write begins."""
        self.writing_since = time.monotonic()

    def written(self) -> None:
        """Take note that a write has ended."""
        self.writing_since = None

    def _write_result(self, result: pb.CascadeResult) -> None:
        run = self.opened.run
        result.model, result.reason = run.model, run.reason
        if run.record is not None:
            result.policy_version, result.in_random_slice = run.record.policy_version, run.record.in_random_slice
            for leg in run.record.legs:
                result.legs.add(**{field.name: getattr(leg, field.name) for field in pb.CascadeLeg.DESCRIPTOR.fields})
