"""The requests of all calls of a front, over one frontend.

One asyncio loop serves all streams and is woken by the frontend's file descriptor; no thread waits for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Sequence

import numpy as np

from expertwire.deploy.grpc import messages as grpc_messages
from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.catalog import Catalog
from expertwire.deploy.grpc.group_loop import GroupLoop
from expertwire.deploy.grpc.started import Opened, OpenedGroup, Prepared, RequestStream, Stream, Waker
from expertwire.deploy.grpc.turns import Turns
from expertwire.deploy.grpc.usage import GroupUsage, UsageCounter
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import EngineFailed, RequestError, RequestFailed
from expertwire.engine.frontend.frontend import WINDOW, Frontend
from expertwire.engine.frontend.prompts import with_effort
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.engine.frontend.token_columns import ColumnReader
from expertwire.engine.frontend.tokenizer import ReasoningIds
from expertwire.scheduler.sampling_params import MAX_BRANCHES
from expertwire.strategies.base import Strategy

MAX_REQUEST_ID = 256  # characters
GOODBYE_S = 2.0  # for the last messages to be sent
STALL_S = 30.0
_BATCH_ROWS = 256  # tokens that are handled before the loop serves others
_PROMPT_END = 32  # tokens; more than any delimiter of reasoning and the space after it
_log = logging.getLogger(__name__)


class Requests:
    """The requests of all calls, and the streams that their output goes to.

    Args:
        frontend: used by the loop's thread only.
        texts: tokenise what clients send.
        catalog: strategies and verifiers that clients may name.
        turns: when clients are served.
        stall_s: a client that reads nothing for so many seconds, while there is output for it, loses its request.

    Attributes:
        frontend: as given.
        failure: message with which the engine failed, or "".
        draining: whether new requests are refused.
    """

    def __init__(
        self, frontend: Frontend, texts: TextWorkers, catalog: Catalog, turns: Turns, stall_s: float = STALL_S
    ) -> None:
        self.frontend = frontend
        self.failure = ""
        self.draining = False
        self._texts = texts
        self._stall_s = stall_s
        self._catalog = catalog
        self._open: dict[tuple[str, str], Stream] = {}  # by tenant and client's request id
        self._streams: dict[int, Waker] = {}  # those without a strategy, by the frontend's request id
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._descriptor = frontend.fileno()
        self._writes = False  # whether the loop waits until the frontend can send more
        self._turns = turns
        self._watches, self._pumps_later = True, False  # `_pump_later` stops watching for a while
        self._loop.add_reader(self._descriptor, self._on_readable)
        self._groups = GroupLoop(frontend, self._settle)
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
        prepared = await self.prepare(request, call, deadline_s)
        try:
            number = self.frontend.submit(
                prepared.tokens,
                prepared.params,
                prepared.options,
                detokenize=detokenize,
                window=window,
                allowance=allowance,
                columns=columns,
                opens_reasoning=prepared.opens_reasoning,
            )
        except EngineFailed as error:
            self._fail(error)
            raise _unavailable(self.failure) from error
        self.watch_writes()
        usage = UsageCounter(
            len(prepared.tokens), self.reasoning_ids, prepared.arrived_s, opens_reasoning=prepared.opens_reasoning
        )
        return Opened(number, prepared.key, usage, prepared.opens_reasoning)

    async def start(self, request: pb.GenerateRequest, call: Call, deadline_s: float | None) -> OpenedGroup:
        """Start the group of a request with a strategy; arguments and errors as those of `submit`."""
        strategy = self._catalog.strategy(request.strategy)
        prepared = await self.prepare(request, call, deadline_s)
        self._check_cost(prepared, strategy)
        text = request.text if request.HasField("text") else None
        run = self._groups.start(
            prepared.tokens,
            prepared.params,
            prepared.options,
            strategy,
            text,
            streams=request.strategy.all_branches,
        )
        usage = GroupUsage(run, self.reasoning_ids, prepared.arrived_s, opens_reasoning=prepared.opens_reasoning)
        return OpenedGroup(run, prepared.key, usage, prepared.opens_reasoning)

    def add(self, opened: Opened, stream: RequestStream) -> None:
        """Wake `stream` when the request has news."""
        self._streams[opened.number] = stream
        self.add_group(opened, stream)

    def add_group(self, opened: Opened | OpenedGroup, stream: Stream) -> None:
        """Take note of the stream of a group, which wakes itself."""
        self._open[opened.key] = stream
        self._idle.clear()
        _log.debug("request %r of tenant %r begins", opened.key[1], opened.key[0])

    def watch(self, number: int, leg: Waker) -> None:
        """Wake a part of a request of several models when this model has news of it."""
        self._streams[number] = leg
        self._settle()

    def unwatch(self, number: int) -> None:
        """Forget a part of a request, which has been ended."""
        del self._streams[number]
        self._settle()

    def add_stream(self, key: tuple[str, str], stream: Stream) -> None:
        """Take note of the stream of a request of several models, which wakes itself."""
        self._open[key] = stream
        self._idle.clear()

    def remove_stream(self, key: tuple[str, str]) -> None:
        """Forget such a stream."""
        del self._open[key]
        if not self._open:
            self._idle.set()

    def makes_same_tokens(self, other: Requests) -> bool:
        """Return whether the other model's tokenizer makes the same tokens of texts."""
        one, two = self.frontend.tokenizer, other.frontend.tokenizer
        return one is two if one is None or two is None else one.makes_same_tokens(two)

    def makes_same_chats(self, other: Requests) -> bool:
        """Return whether the other model's tokenizer makes the same tokens of chats."""
        one, two = self.frontend.tokenizer, other.frontend.tokenizer
        return one is two if one is None or two is None else one.makes_same_chats(two)

    def grant(self, number: int, tokens: int) -> None:
        """Let each branch of a request send more tokens."""
        self.frontend.grant(number, tokens)
        self.watch_writes()

    def abort(self, stream: Stream) -> None:
        """End a request; its stream is woken."""
        if stream.abort():
            self._pump()

    def abort_by_name(self, tenant: str, request_ids: Sequence[str]) -> None:
        """End a tenant's requests with these ids, here and on the other fronts: gRPC may have brought the call to any of them."""
        self._abort_named(tenant, request_ids)
        self.frontend.abort_by_name(tenant, request_ids)
        self.watch_writes()

    def close(self, opened: Opened | OpenedGroup) -> None:
        """Forget a request, and end it if it runs."""
        stream = self._open.pop(opened.key)
        if isinstance(opened, Opened):
            del self._streams[opened.number]
        else:
            self._groups.closed()
            opened.run.on_done = opened.run.on_news = _ignore  # the stream refers to it, too
        # Without effect if the request has finished.
        self.abort(stream)
        if not self._open:
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
        for stream in self._open.values():
            if stream.error is None and stream.writing_since is not None and stream.writing_since < oldest:
                stream.abort()
                stream.fail("RESOURCE_EXHAUSTED", f"the client has read nothing for {self._stall_s:g} s", drop=True)
        self.watch_writes()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait up to `timeout_s` seconds for the open streams to end, then end them."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for stream in self._open.values():
            stream.fail("UNAVAILABLE", f"the server shuts down and did not finish this request within {timeout_s:g} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), GOODBYE_S)

    def stop(self) -> None:
        """Stop reading from the frontend."""
        self._groups.stop()
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

    def check_is_new(self, key: tuple[str, str]) -> None:
        """Raise RequestFailed if a request with this tenant and id runs."""
        if key in self._open:
            raise RequestFailed(RequestError("ALREADY_EXISTS", f"a request with the id {key[1]!r} is running"))

    async def prepare(
        self, request: pb.GenerateRequest, call: Call, deadline_s: float | None, tokens: np.ndarray | None = None
    ) -> Prepared:
        """Check a request, with the tokens of its prompt if they are known, and return what it says. See `submit`."""
        arrived_s = time.monotonic()
        self._check_takes_requests()
        request_id = request.request_id or secrets.token_hex(16)
        if len(request_id) > MAX_REQUEST_ID:
            raise ValueError(f"request_id must have at most {MAX_REQUEST_ID} characters, got {len(request_id)}")
        key = call.identity.tenant, request_id
        tenant = call.identity.tenant_of(request.tenant)
        self.check_is_new(key)
        params = grpc_messages.to_sampling_params(request.sampling_params, self.frontend.model_info)
        prompt = grpc_messages.to_prompt(request)
        tokens = await self._texts.encode(prompt if tokens is None else tokens, params, client=call.client)
        params = with_effort(params, prompt, len(tokens), self.frontend.model_info, self.frontend.tokenizer)
        options = grpc_messages.to_options(request, tenant, deadline_s)
        # Others have been served meanwhile.
        self._check_takes_requests()
        self.check_is_new(key)
        return Prepared(key, params, options, tokens, self._opens_reasoning(tokens), arrived_s)

    @property
    def reasoning_ids(self) -> ReasoningIds | None:
        """The tokens around reasoning; None if the model has none."""
        return None if self.frontend.tokenizer is None else self.frontend.tokenizer.reasoning_ids

    def _check_cost(self, prepared: Prepared, strategy: Strategy) -> None:
        """Refuse a strategy with more output than one request may have, which the front keeps until the group has ended."""
        most = min(MAX_BRANCHES, max(1, getattr(strategy, "n", 1)))
        params = dataclasses.replace(prepared.params, n=most)
        params.check_cost(len(prepared.tokens), self.frontend.model_info.max_model_len)

    def _opens_reasoning(self, tokens: np.ndarray) -> bool:
        tokenizer = self.frontend.tokenizer
        if tokenizer is None or tokenizer.output_format.reasoning is None:
            return False
        return tokenizer.output_format.opens_reasoning(
            tokenizer.decode(tokens[-_PROMPT_END:].tolist(), skip_special_tokens=False)
        )

    def _abort_named(self, tenant: str, request_ids: Sequence[str]) -> None:
        """Abort those of a tenant's requests that run here."""
        streams = [stream for each in request_ids if (stream := self._open.get((tenant, each))) is not None]
        for stream in streams:
            stream.abort()
        if streams:
            self._loop.call_soon(self._pump)

    def _on_readable(self) -> None:
        if self._turns.calls_arrive:
            self._pump_later()
        else:
            self._pump()

    def _pump_later(self) -> None:
        """Let the next round that serves clients begin with the news; until then nothing calls `_on_readable`."""
        if not self._pumps_later:
            self._pumps_later = True
            self._loop.remove_reader(self._descriptor)
            self._turns.begin_round_with(self._pump_on)

    def _pump_on(self) -> None:
        self._pumps_later = False
        if self._watches:
            self._loop.add_reader(self._descriptor, self._on_readable)
            self._pump()

    def _pump(self) -> None:
        """Wake the streams whose requests have news."""
        try:
            news = self.frontend.receive(0, _BATCH_ROWS)
        except EngineFailed as error:
            self._fail(error)
            return
        has_groups = False
        for request in news:
            if stream := self._streams.get(request.id):
                stream.wake(request)
            elif self._groups.handle(request):
                has_groups = True
            else:
                request.untaken.clear()  # nobody waits for it, and it refers to the request
        if has_groups:
            self._groups.settle()
        if self.frontend.has_more and self.frontend.failure is None:
            self._pump_later()
        self._settle()

    def _settle(self) -> None:
        """Notice that the frontend has failed, or has something to send."""
        if self.frontend.failure is not None:
            self._fail(self.frontend.failure)
        else:
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
            for stream in self._open.values():
                stream.fail("UNAVAILABLE", self.failure)

    def _stop_watching(self) -> None:
        self._watches = False
        self._loop.remove_reader(self._descriptor)
        if self._writes:
            self._loop.remove_writer(self._descriptor)
            self._writes = False


def _ignore() -> None:
    """Do nothing."""


def _unavailable(message: str) -> RequestFailed:
    return RequestFailed(RequestError("UNAVAILABLE", message))
