"""Sessions of the clients: many requests over one call, sync and for asyncio.

`Client.session` and `AsyncClient.session` make them. A request that is refused for the moment is submitted again, up to the
client's `retries`, after the time that the server names; a session that is refused as a whole is tried again by gRPC.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Self

import grpc

from expertwire.deploy.grpc import client_messages as values
from expertwire.deploy.grpc.client_messages import Chunk, Progress, ServerError, to_server_error
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.chat import Chat

# Small messages are joined up to this size; the server limits the fields of those over 128 KiB.
_MESSAGE_BYTES = 64 << 10
_FIRST_WAIT_S, _MAX_WAIT_S = 0.2, 5.0  # before a retry, where the server names no time; doubled after each
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_READ_AHEAD = 4  # messages that an asyncio session buffers for its reader


class SubmittedRequest(Progress):
    """A request of a session: what has come of it.

    Attributes:
        key: its number in the session.
        is_done: whether it has ended.
        error: the error with which it has ended, or None.
    """

    def __init__(self, submit: pb.SubmitRequest, timeout_s: float | None) -> None:
        super().__init__(submit.request.request_id)
        self.key = submit.key
        self.is_done = False
        self.error: ServerError | None = None
        self._submit = submit
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._num_retries, self._has_output = 0, False

    def add_entry(self, chunk: pb.Chunk, details: pb.SessionDetails) -> Chunk | None:
        """Take note of an entry of a message; return its chunk, if it has output."""
        self._has_output = True
        chunk.logprobs.extend(details.logprobs)
        chunk.expert_load.extend(details.expert_load)
        if stop := details.WhichOneof("stop_reason"):
            setattr(chunk, stop, getattr(details, stop))
        message = pb.GenerateResponse(chunks=[chunk], opens_reasoning=details.opens_reasoning)
        message.prompt_logprobs.extend(details.prompt_logprobs)
        if details.HasField("group"):
            message.group.CopyFrom(details.group)
        if details.HasField("cascade"):
            message.cascade.CopyFrom(details.cascade)
        (made,) = self.add(message)
        has_output = bool(chunk.token_ids or chunk.text or chunk.finish_reason)
        return made if has_output else None

    def end(self, end: pb.SessionEnd, retries: int) -> float | None:
        """Take note of the end; return the seconds after which the request has to be submitted again, or None."""
        if not end.code:
            self.add(pb.GenerateResponse(usage=end.usage))
            self.is_done = True
            return None
        after_s = end.retry_after_s if end.HasField("retry_after_s") else None
        error = ServerError(_CODES[end.code], end.message, after_s)
        if after_s is None:
            after_s = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2**self._num_retries) * random.uniform(0.8, 1.2)
        in_time = self._deadline_s is None or time.monotonic() + after_s < self._deadline_s
        may_retry = error.code == "RESOURCE_EXHAUSTED" and not self._has_output and self._num_retries < retries
        if may_retry and in_time:
            self._num_retries += 1
            return after_s
        self.error, self.is_done = error, True
        return None

    def message(self) -> pb.SessionRequest:
        """Return the message that submits the request, with the time that is left."""
        if self._deadline_s is not None:
            self._submit.deadline_s = max(1e-3, self._deadline_s - time.monotonic())
        return pb.SessionRequest(requests=[self._submit])


class _State:
    """Requests and messages of a session, without the call.

    Attributes:
        waiting: messages to be sent.
        updates: news that nobody has taken: requests with a chunk, or with None at their end.
        running: requests that have not ended, by key.
    """

    def __init__(self, options: pb.SessionOptions, retries: int) -> None:
        self.waiting = deque([pb.SessionRequest(options=options)])
        self.updates: deque[tuple[SubmittedRequest, Chunk | None]] = deque()
        self.running: dict[int, SubmittedRequest] = {}
        self._retries = retries
        self._keys = itertools.count(1)

    def submit(
        self, prompt: str | Sequence[int] | Chat, timeout_s: float | None, arguments: dict[str, Any]
    ) -> SubmittedRequest:
        """Return a new request, which is to be sent. Raise ValueError as `Client.generate`."""
        submit = pb.SubmitRequest(key=next(self._keys), request=values.make_request(prompt, arguments))
        request = self.running[submit.key] = SubmittedRequest(submit, timeout_s)
        return request

    def take(self, message: pb.SessionResponse) -> list[tuple[float, SubmittedRequest]]:
        """Take note of a message; return the requests to be submitted again, each after so many seconds."""
        details, at = {entry.entry: entry for entry in message.details}, 0
        for place, (key, count) in enumerate(zip(message.keys, message.num_tokens, strict=True)):
            tokens, at = message.token_ids[at : at + count], at + count
            chunk = pb.Chunk(
                branch=message.branches[place],
                token_ids=tokens,
                text=message.texts[place] if message.texts else "",
                finish_reason=message.finish_reasons[place],
            )
            request = self.running[key]
            made = request.add_entry(chunk, details.get(place, pb.SessionDetails()))
            if made is not None:
                self.updates.append((request, made))
        again = []
        for end in message.ends:
            request = self.running[end.key]
            if (after_s := request.end(end, self._retries)) is not None:
                again.append((after_s, request))
            else:
                del self.running[end.key]
                self.updates.append((request, None))
        return again

    def next_message(self) -> pb.SessionRequest:
        """Return the first message to be sent, with as many of the next as are small."""
        message = self.waiting.popleft()
        size = message.ByteSize()
        while self.waiting and (size := size + self.waiting[0].ByteSize()) <= _MESSAGE_BYTES:
            message.MergeFrom(self.waiting.popleft())
        return message


class ClientSession:
    """Many requests over one call; made by `Client.session`. Requests may be submitted by any thread, and one iterates.

    with client.session() as session:
        requests = [session.submit(prompt, max_tokens=64) for prompt in prompts]
        for request, chunk in session:
            print(request.key, chunk.text if chunk else request.error or request.usage)
    """

    def __init__(self, method: Any, metadata: Any, options: pb.SessionOptions, retries: int) -> None:
        self._state = _State(options, retries)
        self._news = threading.Condition()
        self._is_closed = False
        self._call = method(self._outgoing(), metadata=metadata)

    def submit(
        self, prompt: str | Sequence[int] | Chat, *, timeout_s: float | None = None, **arguments: Any
    ) -> SubmittedRequest:
        """Submit a request; arguments and errors as those of `Client.generate`."""
        request = self._state.submit(prompt, timeout_s, arguments)
        self._send(request.message())
        return request

    def abort(self, request: SubmittedRequest) -> None:
        """End a request; what has been computed still comes, and its end."""
        self._send(pb.SessionRequest(abort_keys=[request.key]))

    def grant(self, request: SubmittedRequest, tokens: int) -> None:
        """Let each branch of a request send so many tokens more, in a session with `window_tokens`."""
        self._send(pb.SessionRequest(credit_keys=[request.key], credit_tokens=[tokens]))

    def __iter__(self) -> Iterator[tuple[SubmittedRequest, Chunk | None]]:
        """Yield requests with their chunks, as they come, and with None at their ends, until no request runs.

        Raises:
            ServerError: the whole session has failed; errors of requests are in `SubmittedRequest.error`.
        """
        try:
            while self._state.updates or self._state.running:
                while not self._state.updates:
                    message = next(self._call, None)
                    assert message is not None, "the server ended a session whose requests run"
                    self._take(message)
                yield self._state.updates.popleft()
        except grpc.RpcError as error:
            raise to_server_error(error) from error

    def close(self) -> None:
        """End the call; requests that run are aborted."""
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _take(self, message: pb.SessionResponse) -> None:
        for after_s, request in self._state.take(message):
            timer = threading.Timer(after_s, self._submit_again, (request,))
            timer.daemon = True
            timer.start()

    def _submit_again(self, request: SubmittedRequest) -> None:
        self._send(request.message())

    def _send(self, message: pb.SessionRequest) -> None:
        with self._news:
            self._state.waiting.append(message)
            self._news.notify()

    def _outgoing(self) -> Iterator[pb.SessionRequest]:
        """Yield messages to send; a thread of gRPC calls it."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._is_closed or self._state.waiting)
                if self._is_closed:
                    return
                message = self._state.next_message()
            yield message


class AsyncClientSession:
    """Many requests over one call; made by `AsyncClient.session`. Methods as those of `ClientSession`; `submit` does not wait.

    async with client.session() as session:
        requests = [session.submit(prompt, max_tokens=64) for prompt in prompts]
        async for request, chunk in session:
            print(request.key, chunk.text if chunk else request.error or request.usage)
    """

    def __init__(self, method: Any, metadata: Any, options: pb.SessionOptions, retries: int) -> None:
        self._state = _State(options, retries)
        self._news = asyncio.Event()
        self._news.set()
        self._call = method(metadata=metadata)
        self._messages: asyncio.Queue[pb.SessionResponse | None] = asyncio.Queue(_READ_AHEAD)
        self._error: ServerError | None = None
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    def submit(
        self, prompt: str | Sequence[int] | Chat, *, timeout_s: float | None = None, **arguments: Any
    ) -> SubmittedRequest:
        """Submit a request; see `ClientSession.submit`."""
        request = self._state.submit(prompt, timeout_s, arguments)
        self._send(request.message())
        return request

    def abort(self, request: SubmittedRequest) -> None:
        """End a request; see `ClientSession.abort`."""
        self._send(pb.SessionRequest(abort_keys=[request.key]))

    def grant(self, request: SubmittedRequest, tokens: int) -> None:
        """Let each branch of a request send so many tokens more; see `ClientSession.grant`."""
        self._send(pb.SessionRequest(credit_keys=[request.key], credit_tokens=[tokens]))

    async def __aiter__(self) -> AsyncIterator[tuple[SubmittedRequest, Chunk | None]]:
        """Yield requests with their chunks, and with None at their ends; see `ClientSession.__iter__`."""
        while self._state.updates or self._state.running:
            while not self._state.updates:
                message = await self._messages.get()
                if message is None:
                    self._messages.put_nowait(None)  # for whoever iterates again
                    assert self._error is not None, "the server ended a session whose requests run"
                    raise self._error
                self._take(message)
            yield self._state.updates.popleft()

    async def close(self) -> None:
        """End the call; requests that run are aborted."""
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._error = self._error or ServerError("CANCELLED", "the session was closed")
        while not self._messages.empty():
            self._messages.get_nowait()
        self._messages.put_nowait(None)  # for whoever iterates

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _take(self, message: pb.SessionResponse) -> None:
        loop = asyncio.get_running_loop()
        for after_s, request in self._state.take(message):
            loop.call_later(after_s, self._submit_again, request)

    def _submit_again(self, request: SubmittedRequest) -> None:
        self._send(request.message())

    def _send(self, message: pb.SessionRequest) -> None:
        self._state.waiting.append(message)
        self._news.set()

    async def _write(self) -> None:
        while True:
            while self._state.waiting:
                try:
                    await self._call.write(self._state.next_message())
                except (grpc.RpcError, asyncio.InvalidStateError):  # the call has ended, and `_read` says why
                    return
            self._news.clear()
            await self._news.wait()

    async def _read(self) -> None:
        # A task of its own, as gRPC loses what a cancelled read would have got.
        try:
            async for message in self._call:
                await self._messages.put(message)
        except grpc.RpcError as error:
            self._error = to_server_error(error)
        await self._messages.put(None)
