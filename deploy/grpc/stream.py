"""Output stream of one request, to a client that may read more slowly than the engine writes."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from expertwire.deploy.grpc.messages import add_logprobs, write_chunk
from expertwire.deploy.grpc.started import Opened
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import Position, RequestError, RequestFailed
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.open_requests import OpenRequest

# Tokens and entries of log-probabilities in a message, about 25 bytes each. They take about 2 ms, in which nobody else is served,
# and gRPC clients refuse messages of more than 4 MiB by default.
MESSAGE_SIZE = 2_048


class OutputStream:
    """The outputs of one request for its client; a `Stream`.

    What the client has not read stays in the frontend, which joins it and holds the request up when there is too much of it.

    Args:
        frontend: the frontend that the request was submitted to.
        opened: the request.
        ask: asks for the client's turn, before a message is made, as `Call.ask`.

    Attributes:
        error: the error that the stream ends with, or None.
        writing_since: when the write began that has not ended, by `time.monotonic`; None between writes.
    """

    def __init__(self, frontend: Frontend, opened: Opened, ask: Callable[[Callable[[], bool]], None]) -> None:
        self.writing_since: float | None = None
        self._frontend = frontend
        self._request: OpenRequest | None = None
        self._opened = opened
        self._ask = ask
        self._loop = asyncio.get_running_loop()
        self.error: RequestError | None = None
        self._unread_prompt: deque[Position | None] = deque()
        self._is_dropped = False
        self._begun = False  # whether the first message has been read
        self._is_last_update = self._complete = False  # whether the last update, and the last message, have been read
        self._waiter: asyncio.Future[None] | None = None  # of the reader that waits for news and its turn
        self._has_asked = False  # for a turn that has not come

    def wake(self, request: OpenRequest) -> None:
        """Take note that the request has news."""
        if not self._is_dropped:
            self._request = request
        self._ask_for_turn()

    def abort(self) -> bool:
        """End the request; return whether it ran."""
        return self._frontend.abort(self._opened.number)

    def fail(self, code: str, message: str, *, drop: bool = False) -> None:
        """End with an error status after what is unread, or, with `drop`, instead of it."""
        if self.error is None:
            self.error = RequestError(code, message)
            if drop:
                self._request, self._is_dropped = None, True
                self._unread_prompt.clear()
            self._ask_for_turn()

    def forget(self) -> None:
        """Forget what is unread, which refers to the request that refers to it; the client has gone or has all."""
        if self._request is not None:
            self._request.untaken.clear()

    async def read(self) -> pb.GenerateResponse | None:
        """Return a message of unread outputs, up to about `MESSAGE_SIZE`; None after the last one.

        Raises:
            RequestFailed: the stream ends with an error.
        """
        if self._complete:
            return None
        # News ask for the turn, not the reader when it is woken: there is one wake-up for each message.
        self._waiter = self._loop.create_future()
        if self._has_output() or self.error is not None:
            self._ask_for_turn()
        await self._waiter
        message = pb.GenerateResponse()
        if self._has_output():
            self._take(message)
        if self.error is not None and not (message.chunks or message.prompt_logprobs):
            raise RequestFailed(self.error)
        if not self._begun:
            message.request_id, message.opens_reasoning = self._opened.key[1], self._opened.opens_reasoning
            self._begun = True
        if self._is_last_update and self.error is None and not self._unread_prompt:
            message.usage.CopyFrom(self._opened.usage.message())
            self._complete = True
        return message

    def written(self) -> None:
        """Take note that a write has ended."""
        self.writing_since = None

    def writes(self) -> None:
        """Take note that a write begins."""
        self.writing_since = time.monotonic()

    def _ask_for_turn(self) -> None:
        if self._waiter is not None and not self._waiter.done() and not self._has_asked:
            self._has_asked = True
            self._ask(self._begin)

    def _begin(self) -> bool:
        """Let the reader make a message; return whether it waits."""
        self._has_asked = False
        if self._waiter is None or self._waiter.done():
            return False
        self._waiter.set_result(None)
        return True

    def _has_output(self) -> bool:
        request = self._request
        return bool(self._unread_prompt) or (request is not None and (bool(request.untaken) or request.done))

    def _take(self, message: pb.GenerateResponse) -> None:
        """Move unread outputs into `message`."""
        if not self._unread_prompt:
            self._take_updates(message)
        num_entries = 0
        while self._unread_prompt and num_entries < MESSAGE_SIZE:
            entry = self._unread_prompt.popleft()
            add_logprobs(message.prompt_logprobs, [entry])
            num_entries += 1 + len(entry or ())

    def _take_updates(self, message: pb.GenerateResponse) -> None:
        assert self._request is not None
        for update in self._frontend.take(self._request, MESSAGE_SIZE):
            self._opened.usage.add(update)
            if update.prompt_logprobs:
                self._unread_prompt.extend(update.prompt_logprobs)
            if update.error is not None:
                self.error = self.error or update.error
            else:
                write_chunk(message.chunks.add(), update)
                self._is_last_update = update.done


class WholeResponse:
    """The messages of a stream as one, with one chunk a branch."""

    def __init__(self) -> None:
        self._message = pb.GenerateResponse()
        self._chunks: dict[int, pb.Chunk] = {}
        self._texts: dict[int, list[str]] = {}

    def add(self, message: pb.GenerateResponse) -> None:
        """Add the next message of the stream."""
        for chunk in message.chunks:
            self._texts.setdefault(chunk.branch, []).append(chunk.text)
            self._chunks.setdefault(chunk.branch, pb.Chunk()).MergeFrom(chunk)
        message.ClearField("chunks")
        self._message.MergeFrom(message)

    def message(self) -> pb.GenerateResponse:
        """Return the message, with the branches in order."""
        for branch, chunk in sorted(self._chunks.items()):
            chunk.text = "".join(self._texts[branch])
            self._message.chunks.append(chunk)
        return self._message
