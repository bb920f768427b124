"""The start of a request: its stream, and what ends it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.cascade_stream import CascadeStream
from expertwire.deploy.grpc.group_stream import GroupStream
from expertwire.deploy.grpc.models import Models
from expertwire.deploy.grpc.started import Stream
from expertwire.deploy.grpc.stream import OutputStream
from expertwire.deploy.grpc.turns import COSTLY, MESSAGE
from expertwire.deploy.proto import expertwire_v1_pb2 as pb


class Opening(NamedTuple):
    """A request that has begun.

    Attributes:
        stream: its output.
        close: forgets the request, and ends it if it runs.
    """

    stream: OutputStream | GroupStream | CascadeStream
    close: Callable[[], None]


async def open_request(models: Models, request: pb.GenerateRequest, call: Call) -> Opening:
    """Begin a request of any kind, within the call's deadline.

    Raises:
        ValueError: names the field and what is allowed.
        RequestFailed: it cannot be served.
    """
    if is_composite(models, request):
        return await open_composite(models, request, call, call.deadline_s)
    requests = models.find(request.model).requests
    opened = await requests.submit(request, call, call.deadline_s)
    cost = _cost(request.sampling_params)
    stream = OutputStream(requests.frontend, opened, functools.partial(call.ask, cost))
    requests.add(opened, stream)

    def close() -> None:
        requests.close(opened)
        stream.forget()

    return Opening(stream, close)


def is_composite(models: Models, request: pb.GenerateRequest) -> bool:
    """Return whether a request is several ones to the engines: it has a strategy, or names a cascade."""
    return request.HasField("strategy") or models.is_cascade(request.model)


async def open_composite(
    models: Models, request: pb.GenerateRequest, call: Call, deadline_s: float | None, owner: Stream | None = None
) -> Opening:
    """Begin a request that is several ones to the engines; errors as those of `open_request`.

    Args:
        models: the models.
        request: the client's request.
        call: the call that it came with.
        deadline_s: seconds within which its first token must come.
        owner: what is told of aborts and failures; None: the stream itself.
    """
    if models.is_cascade(request.model):
        models.check_cascade(request.model)
        cascades, cost = models.cascades, _cost(request.sampling_params)
        cascade = CascadeStream(lambda: call.turn(cost))
        cascade.opened = begun = await cascades.open(request, call, deadline_s, cascade.wake)
        begun.served.small.add_stream(begun.key, owner or cascade)
        return Opening(cascade, lambda: cascades.close(begun))
    requests = models.find(request.model).requests
    opened = await requests.start(request, call, deadline_s)
    stream = GroupStream(opened, lambda: call.turn(COSTLY), all_branches=request.strategy.all_branches)
    requests.add_group(opened, owner or stream)
    return Opening(stream, lambda: requests.close(opened))


def _cost(params: pb.SamplingParams) -> int:
    """Return the cost of a message; some take many times as long to make as those of single tokens."""
    is_costly = params.logprobs > 0 or params.HasField("prompt_logprobs") or params.n > 8
    return COSTLY if is_costly else MESSAGE
