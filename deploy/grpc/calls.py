"""The calls of the service, from their arrival to their status.

Every method is registered as one that streams both ways and takes bytes: so a call is authenticated and admitted before its
message is read, and a message that cannot be decoded is the client's mistake (INVALID_ARGUMENT) instead of UNKNOWN.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from expertwire.deploy.grpc import status, wire
from expertwire.deploy.grpc.identity import ANYBODY, Authenticator, Identity
from expertwire.deploy.grpc.overload import Overload
from expertwire.deploy.grpc.turns import OPENING, Turns
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError, RequestFailed

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Service:
    """Parts of the server that the calls of a service share.

    Args:
        overload: admits calls.
        turns: order in which clients are served.
        authenticator: finds out who makes them. None: anybody may, and they are neither counted nor wait for their turn, so that
            health checks are answered by a server that is busy.
    """

    overload: Overload
    turns: Turns
    authenticator: Authenticator | None


class Call:
    """A call that has been admitted.

    Attributes:
        context: gRPC's own view of it.
        client: who shares what one client may hold: the tenant, or the address of a client that nobody has verified.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext,
        service: Service,
        request: type[Message],
        identify: Callable[[], Identity],
    ) -> None:
        self.context = context
        tenant, peer = identify().tenant, context.peer()
        self.client = tenant or peer.rpartition(":")[0]
        self._identify = identify
        self._overload, self._turns = service.overload, service.turns
        self._turn_of = tenant or peer
        self._is_counted = service.authenticator is not None
        self._request = request

    @property
    def identity(self) -> Identity:
        """Identity of the caller, found out again after the tenants have changed.

        Raises:
            RequestFailed: nobody that the server still knows.
        """
        return self._identify()

    @property
    def deadline_s(self) -> float | None:
        """Seconds until the client's deadline; None: there is none."""
        return self.context.time_remaining()

    async def read(self) -> Any:
        """Return the next message of the client, or None after the last.

        Raises:
            RequestFailed: it cannot be decoded, or did not arrive in time.
        """
        with self._overload.reading(self.client) as timeout:
            async with timeout:
                data: Any = await self.context.read()
        return await self._decode(data)

    async def wait(self) -> Any:
        """Return the next message of a client who may take any time for it, or None after the last.

        Raises:
            RequestFailed: it cannot be decoded.
        """
        return await self._decode(await self.context.read())

    def turn(self, cost: int) -> Awaitable[None]:
        """Return what waits for the turn of the call's tenant, or of its connection if nobody has verified the tenant.

        Args:
            cost: as for `Turns.take`.
        """
        return self._turns.take(self._turn_of, cost)

    def ask(self, cost: int, begin: Callable[[], bool]) -> None:
        """Call `begin` when the client whom `turn` means may do a step; see `Turns.ask`."""
        self._turns.ask(self._turn_of, cost, begin)

    def streaming(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the client may send messages for any time. It raises RequestFailed if too many do."""
        return self._overload.streaming(self.client)

    def write(self, message: Message) -> Awaitable[None]:
        """Return what sends a message, and ends when the connection has taken it."""
        return self.context.write(message)

    async def _decode(self, data: Any) -> Message | None:
        """Return the message of these bytes when it is the client's turn."""
        if data is grpc.aio.EOF:
            return None
        if self._is_counted:
            await self.turn(OPENING)
        wire.check_num_fields(data, self._request.DESCRIPTOR)
        message = self._request()
        try:
            message.ParseFromString(data)
        except (DecodeError, RecursionError) as error:
            text = f"the message cannot be decoded as {self._request.DESCRIPTOR.full_name}: {error}"
            raise RequestFailed(RequestError("INVALID_ARGUMENT", text)) from error
        return message


def make_handlers(
    descriptor: ServiceDescriptor, servicers: Sequence[object], service: Service
) -> dict[str, grpc.RpcMethodHandler[bytes, Any]]:
    """Return the handlers of a service by method.

    Args:
        descriptor: of the service.
        servicers: have together an async method for each of the service's, of the same name. It takes the request, unless the
            client streams them, and the `Call`; it returns the response, unless it streams them. It raises `RequestFailed`, or
            ValueError for the client's mistakes.
        service: what its calls share.
    """
    handlers: dict[str, grpc.RpcMethodHandler[bytes, Any]] = {
        method.name: grpc.stream_stream_rpc_method_handler(
            functools.partial(_serve, method, run, service),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in descriptor.methods
        for servicer in servicers
        if (run := getattr(servicer, method.name, None)) is not None
    }
    missing = {method.name for method in descriptor.methods} - handlers.keys()
    assert not missing, f"nobody serves {missing} of {descriptor.full_name}"
    return handlers


async def _serve(
    method: MethodDescriptor,
    run: Callable[..., Awaitable[Any]],
    service: Service,
    _: object,
    context: grpc.aio.ServicerContext,
) -> None:
    """Serve one call."""
    error: RequestError | None = None
    try:
        kind = GetMessageClass(method.input_type)
        if service.authenticator is None:
            await _run(method, run, Call(context, service, kind, lambda: ANYBODY))
            return
        service.turns.note_arrival()
        with service.overload.call(), service.authenticator.call(context, method.name) as identify:
            await _run(method, run, Call(context, service, kind, identify))
    except RequestFailed as failed:
        error = failed.error
    if error is not None:
        # Not in the handler, where the abort's own exception would keep the failed one, and with it the client's message.
        await status.abort(context, error)


async def _run(method: MethodDescriptor, run: Callable[..., Awaitable[Any]], call: Call) -> None:
    try:
        if method.client_streaming:
            with call.streaming():
                await run(call)
            return
        request = await call.read()
        if request is None:
            raise RequestFailed(RequestError("INVALID_ARGUMENT", f"a call of {method.name} has one message, got none"))
        response = await run(request, call)
        if not method.server_streaming:
            await call.write(response)
    except ValueError as error:
        raise RequestFailed(RequestError("INVALID_ARGUMENT", str(error))) from error
    except (RequestFailed, asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except grpc.aio.InternalError as error:
        # The client has left while a message was written, and gRPC is about to cancel this. A return would let it send a status
        # before, and headers once more if the message was the first: it logs that as TOO_MANY_OPERATIONS.
        raise asyncio.CancelledError from error
    except Exception as error:
        _log.exception("error: a call of %s ended with an exception", method.name)
        text = f"{method.name} failed in the server, whose log says why"
        raise RequestFailed(RequestError("INTERNAL", text)) from error
