"""The gRPC server: `expertwire.v1.Inference`, health checks and reflection, over one frontend.

One asyncio loop serves all streams and is woken by the frontend's file descriptor; no thread waits for a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertwire.deploy.grpc import messages as grpc_messages
from expertwire.deploy.grpc.messages import RETRY_AFTER
from expertwire.deploy.grpc.stream import OutputStream, StreamFailed
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine.frontend.api import EngineFailed, RequestError
from expertwire.engine.frontend.frontend import Frontend

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
MAX_REQUEST_ID = 256  # characters
_GOODBYE_S = 2.0  # for the last messages to be sent
_PROMPT_END = 32  # tokens; more than any delimiter of reasoning and the space after it
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # make a second server on the same port an error
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 20_000),  # notice clients that vanish
    ("grpc.keepalive_timeout_ms", 10_000),
)

Code = grpc.StatusCode
_log = logging.getLogger(__name__)


class InferenceServicer(pb_grpc.InferenceServicer):
    """The methods of the service.

    Args:
        frontend: used by the loop's thread only.
        read_stats: returns the engine's statistics; called in one other thread, as it may wait.

    Attributes:
        failure: message with which the engine failed, or "".
        failed: set when the engine has failed.
        draining: whether new requests are refused.
    """

    def __init__(self, frontend: Frontend, read_stats: Callable[[], Mapping[str, Any]]) -> None:
        self.failure = ""
        self.failed = asyncio.Event()
        self.draining = False
        self._frontend = frontend
        self._read_stats = read_stats
        self._stats_thread = ThreadPoolExecutor(1, "stats")
        self._streams: dict[int, OutputStream] = {}  # by the frontend's request id
        self._ids: dict[str, int] = {}  # client's request id -> frontend's
        self._idle = asyncio.Event()
        self._idle.set()
        self._descriptor = frontend.fileno()
        asyncio.get_running_loop().add_reader(self._descriptor, self._pump)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """See the .proto."""
        number, stream = await self._open(request, context)
        try:
            while (message := await stream.read()) is not None:
                await context.write(message)
        except StreamFailed as failed:
            await context.abort(Code.__members__[failed.error.code], failed.error.message, _retry_hint(failed.error))
        finally:
            # Also where the client has cancelled, its deadline has passed or its connection is lost.
            self._close(number)

    async def Abort(self, request: pb.AbortRequest, context: grpc.aio.ServicerContext) -> pb.AbortResponse:
        """See the .proto."""
        await self._check_alive(context)
        number = self._ids.get(request.request_id)
        if number is None:
            await context.abort(Code.NOT_FOUND, f"no running request has the id {request.request_id!r}")
        self._frontend.abort(number)
        self._pump()
        return pb.AbortResponse()

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext) -> pb.ModelInfo:
        """See the .proto."""
        await self._check_alive(context)
        info, tokenizer = self._frontend.model_info, self._frontend.tokenizer
        if tokenizer is None:
            return grpc_messages.from_model_info(info, None, ())
        return grpc_messages.from_model_info(info, tokenizer.output_format, tokenizer.chat_variables)

    async def GetStats(self, request: pb.GetStatsRequest, context: grpc.aio.ServicerContext) -> pb.Stats:
        """See the .proto."""
        await self._check_alive(context)
        try:
            values = await asyncio.get_running_loop().run_in_executor(self._stats_thread, self._read_stats)
        except (EngineFailed, TimeoutError) as error:
            await context.abort(Code.UNAVAILABLE, str(error))
        return grpc_messages.from_stats(values)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, wait up to `timeout_s` seconds for the open streams to end, then end them."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for stream in self._streams.values():
            stream.fail("UNAVAILABLE", f"the server shuts down and did not finish this request within {timeout_s:g} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _GOODBYE_S)

    def close(self) -> None:
        """Stop reading from the frontend."""
        if not self.failed.is_set():
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._stats_thread.shutdown(wait=False)

    async def _open(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> tuple[int, OutputStream]:
        """Submit a request; return the frontend's id of it, and its stream."""
        await self._check_alive(context)
        if self.draining:
            await context.abort(Code.UNAVAILABLE, "the server is draining and takes no new requests; ask another one")
        request_id = request.request_id or uuid.uuid4().hex
        if len(request_id) > MAX_REQUEST_ID:
            message = f"request_id must have at most {MAX_REQUEST_ID} characters, got {len(request_id)}"
            await context.abort(Code.INVALID_ARGUMENT, message)
        if request_id in self._ids:
            await context.abort(Code.ALREADY_EXISTS, f"a request with the id {request_id!r} is running")
        try:
            params = grpc_messages.to_sampling_params(request.sampling_params)
            tokens = self._frontend.encode(grpc_messages.to_prompt(request), params)
            options = grpc_messages.to_options(request, context.time_remaining())
            number = self._frontend.submit(tokens, params, options)
        except ValueError as error:
            await context.abort(Code.INVALID_ARGUMENT, str(error))
        except EngineFailed as error:
            self._fail(error)
            await self._check_alive(context)
        stream = OutputStream(request_id, len(tokens), opens_reasoning=self._opens_reasoning(tokens))
        self._streams[number] = stream
        self._ids[request_id] = number
        self._idle.clear()
        return number, stream

    def _opens_reasoning(self, tokens: np.ndarray) -> bool:
        tokenizer = self._frontend.tokenizer
        if tokenizer is None:
            return False
        return tokenizer.output_format.opens_reasoning(
            tokenizer.decode(tokens[-_PROMPT_END:].tolist(), skip_special_tokens=False)
        )

    def _close(self, number: int) -> None:
        stream = self._streams.pop(number)
        del self._ids[stream.request_id]
        # Without effect if the request has finished.
        self._frontend.abort(number)
        self._pump()
        if not self._streams:
            self._idle.set()

    def _pump(self) -> None:
        """Pass updates of the frontend to the streams."""
        try:
            updates = self._frontend.poll(0)
        except EngineFailed as error:
            self._fail(error)
            return
        for update in updates:
            if stream := self._streams.get(update.request_id):
                stream.add(update)
                if stream.done and not update.done:
                    self._frontend.abort(update.request_id)  # the client reads too slowly
        if self._frontend.failure is not None:
            self._fail(self._frontend.failure)

    def _fail(self, error: EngineFailed) -> None:
        """End all streams with the engine's error. The server goes on, to answer health checks."""
        if not self.failed.is_set():
            self.failure = str(error)
            self.failed.set()
            _log.error("error: %s", self.failure)
            asyncio.get_running_loop().remove_reader(self._descriptor)
            for stream in self._streams.values():
                if not stream.done:
                    stream.fail("UNAVAILABLE", self.failure)

    async def _check_alive(self, context: grpc.aio.ServicerContext) -> None:
        if self.failed.is_set():
            await context.abort(Code.UNAVAILABLE, self.failure)


class Server:
    """A gRPC server, created within a running event loop.

    Args:
        host: name or address to listen on.
        port: port to listen on; 0 chooses a free one.

    Attributes:
        port: the port that it listens on.

    Raises:
        ValueError: the address cannot be used.
    """

    def __init__(self, host: str, port: int) -> None:
        self._server = grpc.aio.server(options=_OPTIONS)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ValueError(
                f"cannot listen on {address}: the port is taken, or the host is not this machine"
            ) from error

    async def serve(
        self,
        frontend: Frontend,
        read_stats: Callable[[], Mapping[str, Any]],
        *,
        stop: asyncio.Event,
        drain_timeout_s: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> str:
        """Serve until `stop` is set, and drain.

        Args:
            frontend: the engine's frontend; left open.
            read_stats: as for `InferenceServicer`.
            stop: set to end the service.
            drain_timeout_s: seconds for running requests to finish.
            on_ready: called when the server is ready.

        Returns:
            The message with which the engine failed, or "".
        """
        servicer = InferenceServicer(frontend, read_stats)
        health_servicer = health.aio.HealthServicer()
        pb_grpc.add_InferenceServicer_to_server(servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        await _set_health(health_servicer, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        try:
            on_ready()
            await _first(stop, servicer.failed)
            await _set_health(health_servicer, health_pb2.HealthCheckResponse.NOT_SERVING)
            await stop.wait()
            await servicer.drain(drain_timeout_s)
            servicer.close()
        finally:
            await self._server.stop(_GOODBYE_S)
        return servicer.failure


def _retry_hint(error: RequestError) -> tuple[tuple[str, str], ...]:
    """Return trailing metadata with the time to wait before trying again, if known."""
    if error.retry_after_s is None:
        return ()
    return ((RETRY_AFTER, str(math.ceil(1e3 * error.retry_after_s))),)


async def _set_health(servicer: health.aio.HealthServicer, status: int) -> None:
    for name in ("", SERVICE):
        await servicer.set(name, status)


async def _first(*events: asyncio.Event) -> None:
    tasks = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
