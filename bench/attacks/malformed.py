"""Random and malformed calls of every method that a server has, found by its reflection."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.target import Target

_CALLS = 20_000
_AT_ONCE = 64
_ANSWER_S = 5.0
_DEEPEST = 4  # of random messages
_LIES = ("UNKNOWN", "INTERNAL")  # statuses that say nothing about what is wrong with the call
_UNSUITABLE = (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 7)
_NUMBERS = (0.0, 1.0, -1.0, 0.5, float("nan"), float("inf"), -float("inf"), 1e300, 5e-324)
_KINDS_OF_INT: Mapping[int, tuple[int, int]] = {
    kind: (-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1)
    for bits, signed, kinds in (
        (32, 1, (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32, FieldDescriptor.TYPE_SFIXED32)),
        (64, 1, (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64, FieldDescriptor.TYPE_SFIXED64)),
        (32, 0, (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_FIXED32)),
        (64, 0, (FieldDescriptor.TYPE_UINT64, FieldDescriptor.TYPE_FIXED64)),
    )
    for kind in kinds
}


@dataclass(frozen=True)
class Method:
    """A method of a service of the server."""

    path: str
    input_type: Descriptor
    requests_streamed: bool


def methods_of(address: str) -> list[Method]:
    """Return all methods of the server that listens at `address`, by its reflection."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        services = [pool.FindServiceByName(name) for name in sorted(database.get_services())]
        return [_method(method) for service in services for method in service.methods]


def random_message(kind: Descriptor, rng: random.Random, depth: int = 0) -> Any:
    """Return a message of a type with random fields and random values, many of which nobody would send."""
    message = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        if rng.random() < 0.5:
            _fill(message, field, rng, depth)
    return message


def spoiled(kind: Descriptor, rng: random.Random) -> tuple[str, list[bytes]]:
    """Return how a call is malformed, and its messages."""
    data = random_message(kind, rng).SerializeToString()
    ways: dict[str, Callable[[], list[bytes]]] = {
        "random bytes": lambda: [rng.randbytes(rng.randint(1, 512))],
        "random message": lambda: [data],
        "cut": lambda: [data[: rng.randint(0, max(0, len(data) - 1))]],
        "changed": lambda: [_changed(data, rng)],
        "nested": lambda: [_nested(kind, rng)],
        "no message": list,
        "two messages": lambda: [data, data],
    }
    way = rng.choices(list(ways), weights=(4, 6, 3, 4, 1, 1, 1))[0]
    return way, ways[way]()


async def run(server: Target, seconds: float, *, calls: int = _CALLS) -> dict[str, Any]:
    """Make calls, up to a number and a time; return the statuses by method, and examples of those that lie."""
    methods = await asyncio.to_thread(methods_of, server.address)
    counts: dict[str, Counter[str]] = {method.path: Counter() for method in methods}
    examples: dict[str, str] = {}
    numbers = iter(range(calls))

    async def client(channel: grpc.aio.Channel) -> None:
        for number in numbers:
            rng = random.Random(number)
            method = methods[number % len(methods)]
            way, messages = spoiled(method.input_type, rng)
            status, details = await _call(channel, method, messages)
            counts[method.path][status] += 1
            if status in _LIES:
                examples.setdefault(f"{method.path} {way} {status}", details[:200])

    async with grpc.aio.insecure_channel(server.address) as channel:
        clients = [asyncio.create_task(client(channel)) for _ in range(_AT_ONCE)]
        _, late = await asyncio.wait(clients, timeout=seconds)
        for task in late:
            task.cancel()
        results = await asyncio.gather(*clients, return_exceptions=True)
    wrong = [result for result in results if isinstance(result, Exception)]
    if wrong:
        raise wrong[0]
    total = sum(counts.values(), Counter())
    lies = sum(total[name] for name in _LIES)
    return {
        "calls": total.total(),
        "statuses": dict(total),
        "lies": lies,
        "methods": {path: dict(statuses) for path, statuses in counts.items()},
        "examples": examples,
    }


def _method(method: MethodDescriptor) -> Method:
    path = f"/{method.containing_service.full_name}/{method.name}"
    return Method(path, method.input_type, bool(method.client_streaming))


# grpcio's own, in the client, where a call ends with its status while the client writes another message.
_ENDED = "Internal error from Core"


async def _call(channel: grpc.aio.Channel, method: Method, messages: list[bytes]) -> tuple[str, str]:
    """Make a call and read its first answer; return the status and its message."""
    call: Any = channel.stream_stream(method.path)(timeout=_ANSWER_S)
    try:
        for message in messages:
            await call.write(message)
        await call.done_writing()
        answer = await call.read()
        status = await call.code() if answer is grpc.aio.EOF else grpc.StatusCode.OK
        return status.name, (await call.details() or "") if answer is grpc.aio.EOF else ""
    except grpc.aio.AioRpcError as error:
        if error.details() == _ENDED:
            return "ENDED_WHILE_WRITING", ""
        return error.code().name, error.details() or ""
    except (asyncio.InvalidStateError, grpc.aio.InternalError):  # the call ended while messages were written
        return (await call.code()).name, await call.details() or ""
    finally:
        call.cancel()


def _fill(message: Any, field: FieldDescriptor, rng: random.Random, depth: int) -> None:
    """Give a field of a message random values."""
    if field.message_type is not None and depth >= _DEEPEST:
        return
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        for _ in range(rng.randint(0, 3)):
            if value.message_type is None:
                getattr(message, field.name)[_value(key, rng)] = _value(value, rng)
            else:
                child = random_message(value.message_type, rng, depth + 1)
                getattr(message, field.name)[_value(key, rng)].CopyFrom(child)
    elif field.is_repeated:
        for _ in range(rng.choice((0, 1, 2, 40))):
            if field.message_type is None:
                getattr(message, field.name).append(_value(field, rng))
            else:
                getattr(message, field.name).append(random_message(field.message_type, rng, depth + 1))
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(random_message(field.message_type, rng, depth + 1))
    else:
        setattr(message, field.name, _value(field, rng))


def _value(field: FieldDescriptor, rng: random.Random) -> Any:
    """Return a value for a field that is not a message."""
    if bounds := _KINDS_OF_INT.get(field.type):
        value = rng.choice((*_UNSUITABLE, rng.randint(0, 300), rng.randint(0, 300)))
        return min(max(value, bounds[0]), bounds[1])
    if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
        return rng.choice((*_NUMBERS, rng.random()))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_ENUM:
        assert field.enum_type is not None, f"{field.full_name} has no enumeration"
        return rng.choice((*(value.number for value in field.enum_type.values), 99))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.randint(0, 64))
    return rng.choice(("", "a", "\0", "[]", "{}", "[1]", '[{"role": "user"}]', "null", "{" * 50, "ü" * 300, "x" * 2000))


def _changed(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _nested(kind: Descriptor, rng: random.Random) -> bytes:
    """Return a field that holds itself 150 times, more than protobuf allows."""
    number = rng.choice([field.number for field in kind.fields] or [1])
    data = b""
    for _ in range(150):
        data = _varint(number << 3 | 2) + _varint(len(data)) + data
    return data


def _varint(value: int) -> bytes:
    digits = []
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


ATTACKS = (
    Attack(
        name="malformed",
        about=f"{_CALLS:,} random and malformed calls of every method",
        run=run,
        seconds=300.0,
    ),
)
