"""Clients that read streams as fast as they can, in a process of their own."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import grpc

from expertwire.deploy.grpc.messages import from_sampling_params
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc
from expertwire.engine import process

_PROMPT = range(10, 26)
_STOP_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """Streams that a client keeps open.

    Args:
        address: of the server.
        streams: how many.
        channels: connections over which they are spread.
        session: None, or whether all are requests of one `Session`, "text" or "ids".
        sampling: fields of the sampling parameters.
    """

    address: str
    streams: int
    channels: int = 1
    session: Literal["text", "ids"] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Count:
    """The messages that a client has received since the last count.

    Attributes:
        begun: streams that have had output since the start.
        arrivals: time of arrival of each token of the first stream, by `time.monotonic`.
    """

    tokens: int = 0
    messages: int = 0
    num_bytes: int = 0
    begun: int = 0
    arrivals: list[float] = field(default_factory=list)


class Client:
    """A handle of the process."""

    def __init__(self, load: Load) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = process.start_call(f"{__name__}:client_main", load, theirs.fileno(), sockets=[theirs])
        self._socket = ours
        self._lines = ours.makefile("r")

    def take(self) -> Count:
        """Return what has been received since the last call."""
        self._socket.sendall(b"\n")
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"the client {process.describe_exit(self._process.wait())}")
        return Count(**json.loads(line))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lines.close()
        self._socket.close()
        process.stop_all([self._process], _STOP_S, grace_s=0.0)


def client_main(load: Load, descriptor: int) -> None:
    """Read streams until the parent closes the socket; entry point of the process.

    Real clients are on other machines, so no thread of this one interrupts the front when a message arrives.
    """
    with process.batch_threads(), socket.socket(fileno=descriptor) as parent:
        asyncio.run(_run(load, parent))


async def _run(load: Load, parent: socket.socket) -> None:
    count, loop = Count(), asyncio.get_running_loop()
    parent.setblocking(False)
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channels = [grpc.aio.insecure_channel(load.address, options=options) for _ in range(load.channels)]
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=_PROMPT), sampling_params=from_sampling_params(load.sampling)
    )
    if load.session is not None:
        streams = [asyncio.create_task(_read_session(pb_grpc.InferenceStub(channels[0]), request, count, load))]
    else:
        streams = [
            asyncio.create_task(
                _read(pb_grpc.InferenceStub(channels[number % load.channels]), request, count, number == 0)
            )
            for number in range(load.streams)
        ]
    answering = asyncio.create_task(_answer(parent, loop, count))
    done, _ = await asyncio.wait([*streams, answering], return_when=asyncio.FIRST_COMPLETED)
    for task in (*streams, answering):
        task.cancel()
    for task in done:
        task.result()


async def _answer(parent: socket.socket, loop: asyncio.AbstractEventLoop, count: Count) -> None:
    while await loop.sock_recv(parent, 1):
        values = vars(count) | {"arrivals": list(count.arrivals)}
        count.tokens = count.messages = count.num_bytes = 0
        count.arrivals.clear()
        await loop.sock_sendall(parent, json.dumps(values).encode() + b"\n")


async def _read_session(stub: Any, request: pb.GenerateRequest, count: Count, load: Load) -> None:
    call = stub.Session()
    requests = [pb.SubmitRequest(key=key, request=request) for key in range(load.streams)]
    await call.write(
        pb.SessionRequest(options=pb.SessionOptions(token_ids_only=load.session == "ids"), requests=requests)
    )
    begun: set[int] = set()
    async for message in call:
        count.tokens += len(message.token_ids)
        count.messages += 1
        count.num_bytes += message.ByteSize()
        if len(begun) < load.streams:
            begun.update(message.keys)
            count.begun = len(begun)


async def _read(stub: Any, request: pb.GenerateRequest, count: Count, is_first: bool) -> None:
    has_begun = False
    while True:
        async for message in stub.Generate(request):
            tokens = 0
            for chunk in message.chunks:
                tokens += len(chunk.token_ids)
            count.tokens += tokens
            count.messages += 1
            count.num_bytes += message.ByteSize()
            if not has_begun:
                has_begun = True
                count.begun += 1
            if is_first:
                count.arrivals += [time.monotonic()] * tokens
