"""Output of the requests of a session: a plain request's tokens as the frontend has them, or the messages of a stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from expertwire.deploy.grpc.messages import add_logprobs
from expertwire.deploy.grpc.opening import Opening
from expertwire.deploy.grpc.requests import Requests
from expertwire.deploy.grpc.session_columns import Columns
from expertwire.deploy.grpc.started import Opened
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import Position, RequestError, RequestFailed
from expertwire.engine.frontend.open_requests import OpenRequest

_TURN = 1024  # tokens and log-probabilities that a request sends before it is the next one's turn
_RESULT_SIZE = 80  # tokens that a branch's result counts as; it takes up to about 2 kB


class Source(Protocol):
    """Output of one request of a session that has begun.

    Attributes:
        has_output: whether `take` has something to move.
        has_ended: whether nothing more will come.
        error: the error that it ends with, or None.
    """

    @property
    def has_output(self) -> bool:
        """See above."""
        ...

    @property
    def has_ended(self) -> bool:
        """See above."""
        ...

    @property
    def error(self) -> RequestError | None:
        """See above."""
        ...

    def take(self, columns: Columns) -> int:
        """Move some output into the columns; return how much."""
        ...

    def abort(self) -> bool:
        """End the request, and return whether it ran; what has come can be taken."""
        ...

    def drop(self) -> None:
        """Forget what has not been taken, and what comes."""
        ...

    def usage(self) -> pb.Usage:
        """Return what a request that has ended without an error has used."""
        ...

    def close(self) -> None:
        """Forget the request, and end it if it runs."""
        ...


class RequestSource:
    """Output of a request without a strategy, to one model.

    Args:
        key: of the request in its session.
        requests: of its model.
        opened: the request.
    """

    def __init__(self, key: int, requests: Requests, opened: Opened) -> None:
        self.error: RequestError | None = None
        self.opened = opened
        self._key, self._requests = key, requests
        self._request: OpenRequest | None = None  # None until it has news
        self._unread_prompt: deque[Position | None] = deque()
        self._opens_reasoning = opened.opens_reasoning  # what the client has not been told
        self._is_dropped = False

    @property
    def has_output(self) -> bool:
        """See `Source`."""
        request = self._request
        return self._opens_reasoning or bool(self._unread_prompt) or (request is not None and bool(request.untaken))

    @property
    def has_ended(self) -> bool:
        """See `Source`."""
        return self._request is not None and self._request.done

    def note(self, request: OpenRequest) -> bool:
        """Take note that the request has news; return whether they count."""
        if not self._is_dropped:
            self._request = request
        return not self._is_dropped

    def take(self, columns: Columns) -> int:
        """See `Source`."""
        size = 0
        if self._opens_reasoning:
            columns.add_details(self._key, pb.SessionDetails(opens_reasoning=True))
            self._opens_reasoning = False
        if not self._unread_prompt and self._request is not None:
            for update in self._requests.frontend.take(self._request, _TURN):
                self.opened.usage.add(update)
                if update.prompt_logprobs:
                    self._unread_prompt.extend(update.prompt_logprobs)
                if update.error is not None:
                    self.error = self.error or update.error
                    continue
                columns.add(self._key, update)
                size += 1 + len(update.token_ids) + sum(map(len, update.logprobs or ()))
        part: list[Position | None] = []
        while self._unread_prompt and size < _TURN:
            part.append(self._unread_prompt.popleft())
            size += 1 + len(part[-1] or ())
        if part:
            details = pb.SessionDetails()
            add_logprobs(details.prompt_logprobs, part)
            columns.add_details(self._key, details)
        return size

    def abort(self) -> bool:
        """See `Source`."""
        return self._requests.frontend.abort(self.opened.number)

    def drop(self) -> None:
        """See `Source`."""
        self._request, self._is_dropped, self._opens_reasoning = None, True, False
        self._unread_prompt.clear()

    def usage(self) -> pb.Usage:
        """See `Source`."""
        if self._request is not None:
            self.opened.usage.add_columns(self._request)
        return self.opened.usage.message()

    def close(self) -> None:
        """See `Source`."""
        self._requests.close(self.opened)


class StreamSource:
    """Output of a request that is several ones to the engines, from its stream's messages; one of them waits to be taken.

    Args:
        key: of the request in its session.
        opening: the request.
        on_news: called when there is something to take, or the request has ended.
    """

    def __init__(self, key: int, opening: Opening, on_news: Callable[[], None]) -> None:
        self.error: RequestError | None = None
        self.has_ended = False
        self._key, self._opening, self._on_news = key, opening, on_news
        self._message: pb.GenerateResponse | None = None
        self._usage = pb.Usage()
        self._taken = asyncio.Event()

    @property
    def has_output(self) -> bool:
        """See `Source`."""
        return self._message is not None

    async def run(self) -> None:
        """Read the stream to its end."""
        try:
            while (message := await self._opening.stream.read()) is not None:
                self._message = message
                self._taken.clear()
                self._on_news()
                await self._taken.wait()
        except RequestFailed as failed:
            self.error = failed.error
        self.has_ended = True
        self._on_news()

    def take(self, columns: Columns) -> int:
        """See `Source`."""
        message, self._message = self._message, None
        assert message is not None, f"request {self._key} has no output"
        self._taken.set()
        size = len(message.group.branches) * _RESULT_SIZE + len(message.prompt_logprobs)
        before = pb.SessionDetails(opens_reasoning=message.opens_reasoning, prompt_logprobs=message.prompt_logprobs)
        if before.ListFields():
            columns.add_details(self._key, before)
        for chunk in message.chunks:
            columns.add_chunk(self._key, chunk)
            size += 1 + len(chunk.token_ids) + sum(len(position.tokens) for position in chunk.logprobs)
        if message.HasField("group"):
            columns.add_details(self._key, pb.SessionDetails(group=message.group))
        if message.HasField("cascade"):
            columns.add_details(self._key, pb.SessionDetails(cascade=message.cascade))
        if message.HasField("usage"):
            self._usage = message.usage
        return size

    def abort(self) -> bool:
        """See `Source`."""
        return self._opening.stream.abort()

    def drop(self) -> None:
        """See `Source`."""
        self._message, self.has_ended = None, True

    def usage(self) -> pb.Usage:
        """See `Source`."""
        return self._usage

    def close(self) -> None:
        """See `Source`."""
        self._opening.close()
