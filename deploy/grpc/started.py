"""Requests that have been checked or have begun, and what the front asks of the streams that their output goes to."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from expertwire.deploy.grpc.usage import GroupUsage, UsageCounter
from expertwire.engine.frontend.api import RequestError, RequestOptions
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.scheduler.sampling_params import SamplingParams


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


class OpenedGroup(NamedTuple):
    """A request with a strategy that has begun; attributes as those of `Opened`.

    Attributes:
        run: its group.
    """

    run: GroupRun
    key: tuple[str, str]
    usage: GroupUsage
    opens_reasoning: bool


class Prepared(NamedTuple):
    """A request that has been checked."""

    key: tuple[str, str]
    params: SamplingParams
    options: RequestOptions
    tokens: np.ndarray
    opens_reasoning: bool
    arrived_s: float


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

    def abort(self) -> bool:
        """End the request, and return whether it ran; the stream goes on with what is unread."""
        ...

    def fail(self, code: str, message: str, *, drop: bool = False) -> None:
        """End with an error status after what is unread, or, with `drop`, instead of it."""
        ...


class Waker(Protocol):
    """Something that waits for news of a request."""

    def wake(self, request: OpenRequest) -> None:
        """Take note that the request has news."""
        ...


class RequestStream(Stream, Waker, Protocol):
    """The stream of a request without a strategy."""
