"""A `Session`: one call that carries any number of requests of one backend.

The output of all requests is packed into one message, as much as there is when the one before it has left. So a client that
reads slowly gets fewer and larger messages, and holds up its own requests only: the frontend holds those whose output nobody
takes.
"""

from __future__ import annotations

import asyncio
import logging
import time

import grpc

from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.models import Models
from expertwire.deploy.grpc.opening import is_composite, open_composite
from expertwire.deploy.grpc.session_columns import Columns
from expertwire.deploy.grpc.session_sources import RequestSource, Source, StreamSource
from expertwire.deploy.grpc.stream import MESSAGE_SIZE
from expertwire.deploy.grpc.turns import COSTLY, OPENING
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError, RequestFailed
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.token_columns import ColumnReader
from expertwire.scheduler.config import is_number

_log = logging.getLogger(__name__)
MAX_REQUESTS, MAX_BRANCHES = 1024, 4096  # of a session, that are open at once
WINDOW = 256  # tokens of a branch that wait to be taken
MIN_WINDOW = 16
_COLUMN_IDS = 65_536  # in a message, of requests of which only token ids are sent


class _Entry:
    """A request of a session; a `Stream`."""

    def __init__(self, session: Session, key: int, num_branches: int) -> None:
        self.key, self.num_branches = key, num_branches
        self.error: RequestError | None = None
        self.opening: asyncio.Task[None] | None = None
        self.source: Source | None = None  # None until the request has begun
        self.granted = 0  # tokens, before the request was submitted
        self.deadline: asyncio.TimerHandle | None = None
        self._session = session

    @property
    def writing_since(self) -> float | None:
        """See `Stream`."""
        return self._session.writing_since

    def wake(self, request: OpenRequest) -> None:
        """See `Stream`."""
        if isinstance(self.source, RequestSource) and self.source.note(request):
            self._session.wake(self)

    def abort(self) -> bool:
        """See `Stream`."""
        return self.source is not None and self.source.abort()

    def fail(self, code: str, message: str, *, drop: bool = False) -> None:
        """See `Stream`."""
        if self.error is None:
            self.error = RequestError(code, message)
            if drop and self.source is not None:
                self.source.drop()
            self._session.wake(self)

    @property
    def has_output(self) -> bool:
        """True if something has not been taken."""
        return self.source is not None and self.source.has_output

    @property
    def has_ended(self) -> bool:
        """True if nothing more will come."""
        has_source_ended = self.source is not None and self.source.has_ended
        return not self.has_output and (self.error is not None or has_source_ended)


class Session:
    """One call of `Session`.

    Args:
        models: the models and their requests.
        call: the call.
        options: what the client's first message says.

    Attributes:
        writing_since: when the write began that has not ended, by `time.monotonic`; None between writes.

    Raises:
        ValueError: the options are wrong.
        RequestFailed: there is no such model, or it cannot serve.
    """

    def __init__(self, models: Models, call: Call, options: pb.SessionOptions) -> None:
        self.writing_since: float | None = None
        self._models, self._call = models, call
        self._requests = models.of_session(options.model).requests
        self._frontend = self._requests.frontend
        self._model = options.model or self._frontend.model_info.name
        self._ids_only = options.token_ids_only
        self._window = options.window_tokens or None
        if self._window is not None and self._window < MIN_WINDOW:
            raise ValueError(f"window_tokens must be 0 or at least {MIN_WINDOW}, got {self._window}")
        self._entries: dict[int, _Entry] = {}  # by the client's key
        self._num_branches = 0
        self._ready: dict[int, _Entry] = {}  # entries with news, in the order of their turns
        self._refused: list[pb.SessionEnd] = []
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._reader = ColumnReader(self._news.set)

    async def run(self, first: pb.SessionRequest) -> None:
        """Serve the call until the client has sent its last message and every request has ended.

        Raises:
            ValueError: a message of the client is wrong.
            RequestFailed: one cannot be decoded.
        """
        reading = asyncio.create_task(self._read(first))
        reading.add_done_callback(self._read_ended)
        try:
            await self._write(reading)
        finally:
            # Also where the client has cancelled, its deadline has passed or its connection is lost.
            reading.cancel()
            for entry in list(self._entries.values()):
                self._close(entry)
            self._frontend.remove_reader(self._reader)

    def wake(self, entry: _Entry) -> None:
        """Take note that an entry has news."""
        self._ready.setdefault(entry.key, entry)
        self._news.set()

    # ---- what the client sends

    def _read_ended(self, reading: asyncio.Task[None]) -> None:
        if not reading.cancelled():
            reading.exception()  # `_write` raises it, unless the call ends first: then asyncio shall not log it
        self._news.set()

    async def _read(self, first: pb.SessionRequest) -> None:
        message: pb.SessionRequest | None = first
        while message is not None:
            if message.HasField("options") and message is not first:
                raise ValueError("options must be in the first message of the call only")
            for submit in message.requests:
                # Refusals wait for the client to read, and so does what it sends.
                await self._call.turn(OPENING)
                while len(self._refused) >= MAX_REQUESTS:
                    self._room.clear()
                    await self._room.wait()
                self._submit(submit)
            self._grant(message)
            for key in message.abort_keys:
                if (entry := self._entries.get(key)) is not None:
                    self._abort(entry)
            message = await self._call.wait()

    def _submit(self, submit: pb.SubmitRequest) -> None:
        """Submit a request by a task, as its text may have to wait for a worker that makes tokens of it."""
        if submit.key in self._entries:
            raise ValueError(f"key {submit.key} is that of a request that runs")
        num_branches = max(1, submit.request.sampling_params.n)
        if (error := self._refusal(submit, num_branches)) is not None:
            self._refused.append(_failed_end(submit.key, error))
            self._news.set()
            return
        entry = self._entries[submit.key] = _Entry(self, submit.key, num_branches)
        self._num_branches += num_branches
        if submit.HasField("deadline_s"):
            loop = asyncio.get_running_loop()
            entry.deadline = loop.call_later(submit.deadline_s, self._expire, entry, submit.deadline_s)
        entry.opening = asyncio.create_task(self._open(entry, submit))

    async def _open(self, entry: _Entry, submit: pb.SubmitRequest) -> None:
        deadline_s = submit.deadline_s if submit.HasField("deadline_s") else None
        try:
            if is_composite(self._models, submit.request):
                await self._run_composite(entry, submit.request, deadline_s)
            else:
                await self._open_request(entry, submit.request, deadline_s)
        except ValueError as error:
            entry.fail("INVALID_ARGUMENT", str(error))
        except RequestFailed as failed:
            entry.error = failed.error
            self.wake(entry)
        except Exception:  # noqa: BLE001 - a mistake of ours costs this request only
            _log.exception("error: a request of a session ended with an exception")
            entry.fail("INTERNAL", "the request failed in the server, whose log says why")

    async def _open_request(self, entry: _Entry, request: pb.GenerateRequest, deadline_s: float | None) -> None:
        opened = await self._requests.submit(
            request,
            self._call,
            deadline_s,
            detokenize=not self._ids_only,
            window=WINDOW,
            allowance=self._window,
            columns=(self._reader, entry.key) if self._fits_columns(request.sampling_params) else None,
        )
        entry.source = RequestSource(entry.key, self._requests, opened)
        self._requests.add(opened, entry)
        if entry.granted:
            self._requests.grant(opened.number, entry.granted)
        if entry.has_output:
            self.wake(entry)

    async def _run_composite(self, entry: _Entry, request: pb.GenerateRequest, deadline_s: float | None) -> None:
        opening = await open_composite(self._models, request, self._call, deadline_s, entry)
        source = entry.source = StreamSource(entry.key, opening, lambda: self.wake(entry))
        await source.run()

    def _abort(self, entry: _Entry) -> None:
        if entry.source is not None:
            self._requests.abort(entry)
        elif entry.opening is not None and entry.opening.cancel():
            entry.fail("CANCELLED", "the request was aborted before it began")

    def _fits_columns(self, params: pb.SamplingParams) -> bool:
        """Return whether there is nothing to say of a request's tokens but their ids and text."""
        has_details = params.HasField("logprobs") or params.HasField("prompt_logprobs") or params.expert_load
        return not has_details and not params.stop

    def _refusal(self, submit: pb.SubmitRequest, num_branches: int) -> RequestError | None:
        request = submit.request
        # Before it becomes a timer: one of NaN, which compares with no number, puts all timers of the loop out of order.
        if submit.HasField("deadline_s") and not (is_number(submit.deadline_s) and submit.deadline_s >= 0):
            text = f"deadline_s must be a finite number of seconds >= 0, got {submit.deadline_s!r}"
            return RequestError("INVALID_ARGUMENT", text)
        if self._ids_only and request.sampling_params.stop:
            text = "stop must be empty in a session with token_ids_only, which makes no text; use stop_token_ids"
            return RequestError("INVALID_ARGUMENT", text)
        if not request.model:
            request.model = self._model
        if request.model != self._model and not self._models.is_cascade(request.model):
            text = (
                f"model must be that of the session, {self._model!r} (SessionOptions.model), a cascade, or empty; got "
                f"{request.model!r:.200}"
            )
            return RequestError("INVALID_ARGUMENT", text)
        if self._window is not None and is_composite(self._models, request):
            text = "strategy must be unset, and model no cascade, in a session with window_tokens"
            return RequestError("INVALID_ARGUMENT", text)
        if len(self._entries) < MAX_REQUESTS and self._num_branches + num_branches <= MAX_BRANCHES:
            return None
        text = (
            f"the session has {len(self._entries)} requests with {self._num_branches} branches; at most {MAX_REQUESTS} with "
            f"{MAX_BRANCHES} run at once"
        )
        return RequestError("RESOURCE_EXHAUSTED", text)

    def _grant(self, message: pb.SessionRequest) -> None:
        if len(message.credit_keys) != len(message.credit_tokens):
            sizes = f"{len(message.credit_keys)} and {len(message.credit_tokens)}"
            raise ValueError(f"credit_keys and credit_tokens must have as many entries, got {sizes}")
        if message.credit_keys and self._window is None:
            raise ValueError("credit_keys must be empty in a session without window_tokens")
        for key, tokens in zip(message.credit_keys, message.credit_tokens, strict=True):
            entry = self._entries.get(key)
            if entry is not None and isinstance(entry.source, RequestSource):
                self._requests.grant(entry.source.opened.number, tokens)
            elif entry is not None:
                entry.granted += tokens

    def _expire(self, entry: _Entry, deadline_s: float) -> None:
        entry.fail("DEADLINE_EXCEEDED", f"the request did not end within deadline_s = {deadline_s:g}", drop=True)
        self._abort(entry)

    # ---- what the client receives

    async def _write(self, reading: asyncio.Task[None]) -> None:
        while True:
            while not (self._ready or self._refused or self._reader.has_tokens):
                if reading.done():
                    reading.result()
                    if not self._entries:
                        return
                self._news.clear()
                await self._news.wait()
            if reading.done():
                reading.result()
            await self._call.turn(COSTLY)
            message = self._take()
            self.writing_since = time.monotonic()
            await self._call.write(message)
            self.writing_since = None
            self._room.set()

    def _take(self) -> pb.SessionResponse:
        """Return a message of what has not been taken, up to about `MESSAGE_SIZE`: some of each request in turn."""
        columns, size = Columns(with_text=not self._ids_only), 0
        ends, self._refused = self._refused, []
        if self._reader.has_tokens:
            max_tokens = _COLUMN_IDS if self._ids_only else MESSAGE_SIZE
            columns.add_tokens(self._frontend.take_columns(self._reader, max_tokens))
            if self._reader.has_tokens:
                return columns.message(ends)  # an end comes behind its tokens
        while self._ready and size < MESSAGE_SIZE:
            entry = self._ready.pop(next(iter(self._ready)))
            if entry.source is not None and entry.has_output:
                size += entry.source.take(columns)
            if entry.has_output:
                self._ready[entry.key] = entry
            elif entry.has_ended:
                ends.append(_end(entry))
                self._close(entry)
        return columns.message(ends)

    def _close(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._ready.pop(entry.key, None)
        self._num_branches -= entry.num_branches
        if entry.deadline is not None:
            entry.deadline.cancel()
        if entry.opening is not None:
            entry.opening.cancel()
        if entry.source is not None:
            entry.source.close()


def _end(entry: _Entry) -> pb.SessionEnd:
    source = entry.source
    error = entry.error if source is None else entry.error or source.error
    if error is not None:
        return _failed_end(entry.key, error)
    assert source is not None, f"request {entry.key} has ended and was not submitted"
    return pb.SessionEnd(key=entry.key, usage=source.usage())


def _failed_end(key: int, error: RequestError) -> pb.SessionEnd:
    code: int = grpc.StatusCode[error.code].value[0]
    return pb.SessionEnd(key=key, code=code, message=error.message, retry_after_s=error.retry_after_s)
