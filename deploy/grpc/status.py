"""Error statuses of calls, with the details of `google.rpc` (https://google.aip.dev/193)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError

DETAILS = "grpc-status-details-bin"
PUSHBACK = "grpc-retry-pushback-ms"  # gRPC's own retries wait as long (gRFC A6)
_FIRST_WORD = re.compile(r"[a-z_]+")
_MAX_MESSAGE = 2048  # characters: a status travels in the trailing metadata, of which clients take 8 KiB


async def abort(context: grpc.aio.ServicerContext, error: RequestError) -> None:
    """End a call with an error status and its details; its handler then returns."""
    try:
        await context.abort(grpc.StatusCode[error.code], _short(error.message), _metadata(error))
    except grpc.aio.AbortError as aborted:
        # gRPC keeps the exception with the call, and raises it again when the handler has returned. With its traceback it would
        # hold the handler's frames, which hold the call: all of that would stay until cyclic garbage is collected.
        aborted.__traceback__ = None


def _metadata(error: RequestError) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata: a google.rpc.Status, if it has details, and the time to wait before the next try."""
    details: list[Message] = []
    metadata: list[tuple[str, str | bytes]] = []
    if error.code == "INVALID_ARGUMENT":
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_field(error.message), description=_short(error.message)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        milliseconds = math.ceil(1e3 * error.retry_after_s)
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(milliseconds)
        details.append(retry)
        metadata.append((PUSHBACK, str(milliseconds)))
    if details:
        status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=_short(error.message))
        for detail in details:
            status.details.add().Pack(detail)
        metadata.append((DETAILS, status.SerializeToString()))
    return tuple(metadata)


def _short(message: str) -> str:
    return message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 4]} ..."


def _field(message: str) -> str:
    """Return the field that an error is about, with which its message begins; "" if that is none of a request."""
    word = _FIRST_WORD.match(message)
    return word[0] if word and word[0] in _FIELDS else ""


def _fields(message: Descriptor, seen: set[str]) -> Iterator[str]:
    """Yield the names of the fields of a message and of the messages in it, but of those already seen."""
    if message.full_name not in seen:
        seen.add(message.full_name)
        for field in message.fields:
            yield field.name
            if field.message_type is not None:
                yield from _fields(field.message_type, seen)


_REQUESTS = [method.input_type for method in pb.DESCRIPTOR.services_by_name["Inference"].methods]
_SEEN: set[str] = set()
_FIELDS = frozenset(name for request in _REQUESTS for name in _fields(request, _SEEN))
