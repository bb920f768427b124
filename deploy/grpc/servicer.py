"""The methods of `expertwire.v1.Inference` that generate text."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.cascade_stream import CascadeStream
from expertwire.deploy.grpc.group_stream import GroupStream
from expertwire.deploy.grpc.identity import Authenticator
from expertwire.deploy.grpc.models import Models
from expertwire.deploy.grpc.opening import open_request
from expertwire.deploy.grpc.session import Session
from expertwire.deploy.grpc.stream import OutputStream, WholeResponse
from expertwire.deploy.proto import expertwire_v1_pb2 as pb


class InferenceServicer:
    """Requests for text, and their ends.

    Args:
        models: the models and their requests.
        authenticator: knows who may act for whom.
    """

    def __init__(self, models: Models, authenticator: Authenticator) -> None:
        self._models = models
        self._authenticator = authenticator

    async def Generate(self, request: pb.GenerateRequest, call: Call) -> None:
        """See the .proto."""
        async with self._open(request, call) as stream:
            while (message := await stream.read()) is not None:
                stream.writes()
                await call.write(message)
                stream.written()

    async def GenerateUnary(self, request: pb.GenerateRequest, call: Call) -> pb.GenerateResponse:
        """See the .proto."""
        whole = WholeResponse()
        async with self._open(request, call) as stream:
            while (message := await stream.read()) is not None:
                whole.add(message)
        return whole.message()

    async def Session(self, call: Call) -> None:
        """See the .proto."""
        if (first := await call.wait()) is not None:
            await Session(self._models, call, first.options).run(first)

    async def Abort(self, request: pb.AbortRequest, call: Call) -> pb.AbortResponse:
        """See the .proto."""
        self._models.check_alive()
        tenant = self._authenticator.owner(call.context, call.identity, request.tenant, "Abort")
        request_ids = [each for each in (request.request_id, *request.request_ids) if each]
        if not request_ids:
            raise ValueError("request_ids must have at least one id, got none")
        self._models.abort_by_name(tenant, request_ids)
        return pb.AbortResponse()

    @contextlib.asynccontextmanager
    async def _open(
        self, request: pb.GenerateRequest, call: Call
    ) -> AsyncIterator[OutputStream | GroupStream | CascadeStream]:
        """Submit a request and yield its stream; end it also where the client leaves or its deadline passes."""
        opening = await open_request(self._models, request, call)
        try:
            yield opening.stream
        finally:
            opening.close()
