"""The requests of all calls of a front, over one frontend.

One asyncio loop serves all streams and is woken by the frontend's file descriptor; no thread waits for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from expertwire.deploy.grpc import messages as grpc_messages
from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.usage import UsageCounter
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import EngineFailed, RequestError, RequestFailed
from expertwire.engine.frontend.frontend import WINDOW, Frontend
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.engine.frontend.token_columns import ColumnReader

MAX_REQUEST_ID = 256  # characters
GOODBYE_S = 2.0  # for the last messages to be sent
STALL_S = 30.0
_BATCH_ROWS = 512  # tokens that are handled before the loop serves others
_PROMPT_END = 32  # tokens; more than any delimiter of reasoning and the space after it
_log = logging.getLogger(__name__)


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


class Requests:
    """The requests of all calls, and the streams that their output goes to.

    Args:
        frontend: used by the loop's thread only.
        texts: tokenise what clients send.
        stall_s: a client that reads nothing for so many seconds, while there is output for it, loses its request.

    Attributes:
        frontend: as given.
        failure: message with which the engine failed, or "".
        draining: whether new requests are refused.
    """

    def __init__(self, frontend: Frontend, texts: TextWorkers, stall_s: float = STALL_S) -> None:
        self.frontend = frontend
        self.failure = ""
        self.draining = False
        self._texts = texts
        self._stall_s = stall_s
        self._streams: dict[int, Stream] = {}  # by the frontend's request id
        self._ids: dict[tuple[str, str], int] = {}  # tenant and client's request id -> frontend's
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._descriptor = frontend.fileno()
        self._writes = False  # whether the loop waits until the frontend can send more
        self._loop.add_reader(self._descriptor, self._pump)
        frontend.on_abort_by_name = self._abort_named

    async def submit(
        self,
        request: pb.GenerateRequest,
        call: Call,
        deadline_s: float | None,
        *,
        detokenize: bool = True,
        window: int = WINDOW,
        allowance: int | None = None,
        columns: tuple[ColumnReader, int] | None = None,
    ) -> Opened:
        """Submit a request.

        Args:
            request: the client's request.
            call: the call that it came with.
            deadline_s: seconds within which its first token must come.
            detokenize, window, allowance, columns: as for `Frontend.submit`.

        Raises:
            ValueError: names the field and what is allowed.
            RequestFailed: it cannot be served.
        """
        arrived_s = time.monotonic()
        self._check_takes_requests()
        request_id = request.request_id or secrets.token_hex(16)
        if len(request_id) > MAX_REQUEST_ID:
            raise ValueError(f"request_id must have at most {MAX_REQUEST_ID} characters, got {len(request_id)}")
        key = call.identity.tenant, request_id
        tenant = call.identity.tenant_of(request.tenant)
        self._check_is_new(key)
        params = grpc_messages.to_sampling_params(request.sampling_params, self.frontend.model_info)
        prompt = grpc_messages.to_prompt(request)
        tokens = await self._texts.encode(prompt, params, client=call.client)
        # Others have been served meanwhile.
        self._check_takes_requests()
        self._check_is_new(key)
        try:
            opens_reasoning = self._opens_reasoning(tokens)
            number = self.frontend.submit(
                tokens,
                params,
                grpc_messages.to_options(request, tenant, deadline_s),
                detokenize=detokenize,
                window=window,
                allowance=allowance,
                columns=columns,
                opens_reasoning=opens_reasoning,
            )
        except EngineFailed as error:
            self._fail(error)
            raise _unavailable(self.failure) from error
        self.watch_writes()
        reasoning = None if self.frontend.tokenizer is None else self.frontend.tokenizer.reasoning_ids
        usage = UsageCounter(len(tokens), reasoning, arrived_s, opens_reasoning=opens_reasoning)
        return Opened(number, key, usage, opens_reasoning)

    def add(self, opened: Opened, stream: Stream) -> None:
        """Wake `stream` when the request has news."""
        self._streams[opened.number] = stream
        self._ids[opened.key] = opened.number
        self._idle.clear()
        _log.debug("request %r of tenant %r begins", opened.key[1], opened.key[0])

    def grant(self, number: int, tokens: int) -> None:
        """Let each branch of a request send more tokens."""
        self.frontend.grant(number, tokens)
        self.watch_writes()

    def abort(self, number: int) -> None:
        """End a request; its stream is woken."""
        if self.frontend.abort(number):
            self._pump()

    def abort_by_name(self, tenant: str, request_ids: Sequence[str]) -> None:
        """End a tenant's requests with these ids, here and on the other fronts: gRPC may have brought the call to any of them."""
        self._abort_named(tenant, request_ids)
        self.frontend.abort_by_name(tenant, request_ids)
        self.watch_writes()

    def close(self, opened: Opened) -> None:
        """Forget a request, and end it if it runs."""
        del self._streams[opened.number], self._ids[opened.key]
        # Without effect if the request has finished.
        self.abort(opened.number)
        if not self._streams:
            self._idle.set()
        if _log.isEnabledFor(logging.DEBUG):
            usage = opened.usage.message()
            sizes = f"{usage.prompt_tokens} prompt tokens ({usage.cached_prompt_tokens} cached), {usage.completion_tokens} output"
            _log.debug("request %r of tenant %r ends: %s", opened.key[1], opened.key[0], sizes)

    @property
    def problem(self) -> str:
        """Why requests cannot be served at the moment, or ""."""
        return self.failure or self.frontend.problem

    def end_stalled(self) -> None:
        """End the requests whose clients have read nothing for too long; called about every second.

        gRPC sends no status behind a message that the client does not take, and a blocked write cannot be cancelled (grpcio 1.85
        then crashes), so the call itself ends when the client reads on, leaves, or its connection reaches its age limit.
        """
        oldest = time.monotonic() - self._stall_s
        for number, stream in self._streams.items():
            if stream.error is None and stream.writing_since is not None and stream.writing_since < oldest:
                self.frontend.abort(number)
                stream.fail("RESOURCE_EXHAUSTED", f"the client has read nothing for {self._stall_s:g} s", drop=True)
        self.watch_writes()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait up to `timeout_s` seconds for the open streams to end, then end them."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for stream in self._streams.values():
            stream.fail("UNAVAILABLE", f"the server shuts down and did not finish this request within {timeout_s:g} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), GOODBYE_S)

    def stop(self) -> None:
        """Stop reading from the frontend."""
        if not self.failure:
            self._stop_watching()

    def watch_writes(self) -> None:
        """Let the loop send what the kernel has not taken from the frontend."""
        if self.frontend.pending and not self._writes and not self.failure:
            self._writes = True
            self._loop.add_writer(self._descriptor, self._flush)

    def check_alive(self) -> None:
        """Raise RequestFailed if the engine has failed."""
        if self.frontend.failure is not None:
            self._fail(self.frontend.failure)
        if self.failure:
            raise _unavailable(self.failure)

    def _check_takes_requests(self) -> None:
        self.check_alive()
        if self.draining:
            raise _unavailable("the server is draining and takes no new requests; ask another one")

    def _check_is_new(self, key: tuple[str, str]) -> None:
        if key in self._ids:
            raise RequestFailed(RequestError("ALREADY_EXISTS", f"a request with the id {key[1]!r} is running"))

    def _opens_reasoning(self, tokens: np.ndarray) -> bool:
        tokenizer = self.frontend.tokenizer
        if tokenizer is None or tokenizer.output_format.reasoning is None:
            return False
        return tokenizer.output_format.opens_reasoning(
            tokenizer.decode(tokens[-_PROMPT_END:].tolist(), skip_special_tokens=False)
        )

    def _abort_named(self, tenant: str, request_ids: Sequence[str]) -> None:
        """Abort those of a tenant's requests that run here."""
        numbers = [number for each in request_ids if (number := self._ids.get((tenant, each))) is not None]
        for number in numbers:
            self.frontend.abort(number)
        if numbers:
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Wake the streams whose requests have news."""
        try:
            news = self.frontend.receive(0, _BATCH_ROWS)
        except EngineFailed as error:
            self._fail(error)
            return
        for request in news:
            if stream := self._streams.get(request.id):
                stream.wake(request)
        if self.frontend.failure is not None:
            self._fail(self.frontend.failure)
            return
        if self.frontend.has_more:
            self._loop.call_soon(self._pump)  # the loop serves others in between
        self.watch_writes()

    def _flush(self) -> None:
        self.frontend.flush()
        if self.frontend.failure is not None:
            self._fail(self.frontend.failure)
        elif not self.frontend.pending:
            self._writes = False
            self._loop.remove_writer(self._descriptor)

    def _fail(self, error: EngineFailed) -> None:
        """End all streams with the engine's error. The server goes on for a while, to answer health checks."""
        if not self.failure:
            self._stop_watching()
            self.failure = str(error)
            _log.error("error: %s", self.failure)
            for stream in self._streams.values():
                stream.fail("UNAVAILABLE", self.failure)

    def _stop_watching(self) -> None:
        self._loop.remove_reader(self._descriptor)
        if self._writes:
            self._loop.remove_writer(self._descriptor)
            self._writes = False


def _unavailable(message: str) -> RequestFailed:
    return RequestFailed(RequestError("UNAVAILABLE", message))
