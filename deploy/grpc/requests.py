"""The requests of all calls of a front, as those calls see them."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.usage import UsageCounter
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.token_columns import ColumnReader


class Opened(NamedTuple):
    """A request that has been submitted.

    Attributes:
        number: the frontend's id of it.
        key: tenant, and the client's id or the one chosen for it.
        usage: what it has used.
        opens_reasoning: whether the prompt ends with the start of reasoning.
    """

    number: int
    key: tuple[str, str]
    usage: UsageCounter
    opens_reasoning: bool


class Stream(Protocol):
    """The way of one request's output to its client.

    Attributes:
        error: the error that the stream ends with, or None.
        writing_since: when the write began that has not ended, by `time.monotonic`; None between writes.
    """

    error: RequestError | None

    @property
    def writing_since(self) -> float | None:
        """See above."""
        ...

    def wake(self, request: OpenRequest) -> None:
        """Take note that the request has news."""
        ...

    def fail(self, code: str, message: str, *, drop: bool = False) -> None:
        """End with an error status after what is unread, or, with `drop`, instead of it."""
        ...


class Requests(Protocol):
    """The server's requests, of all calls."""

    async def submit(
        self,
        request: pb.GenerateRequest,
        call: Call,
        deadline_s: float | None,
        *,
        detokenize: bool = True,
        window: int = ...,
        allowance: int | None = None,
        columns: tuple[ColumnReader, int] | None = None,
    ) -> Opened:
        """Submit a request that came with `call`.

        Args:
            request: the client's request.
            call: the call that it came with.
            deadline_s: seconds within which its first token must come.
            detokenize, window, allowance, columns: as for `Frontend.submit`.

        Raises:
            ValueError: names the field and what is allowed.
            RequestFailed: it cannot be served.
        """
        ...

    def add(self, opened: Opened, stream: Stream) -> None:
        """Wake `stream` when the request has news."""
        ...

    def grant(self, number: int, tokens: int) -> None:
        """Let each branch of a request send more tokens."""
        ...

    def abort(self, number: int) -> None:
        """End a request; its stream is woken."""
        ...

    def close_request(self, opened: Opened) -> None:
        """Forget a request, and end it if it runs."""
        ...
