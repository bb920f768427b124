"""The bare library as a ceiling: a `grpc.aio` server whose streams repeat one message and do nothing else."""

from __future__ import annotations

import asyncio
import socket
from typing import Self

import grpc

from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine import process

_STOP_S = 5.0


class EchoServer:
    """A handle of the server's process.

    Attributes:
        address: that it listens on.
        pid: of the process.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = process.start_call(f"{__name__}:echo_main", theirs.fileno(), sockets=[theirs])
        with ours:
            self.address = f"127.0.0.1:{int(ours.recv(16))}"
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        process.stop_all([self._process], _STOP_S, grace_s=0.0)


def echo_main(descriptor: int) -> None:
    """Serve until the parent ends; entry point of the process."""
    with socket.socket(fileno=descriptor) as parent:
        asyncio.run(_serve(parent))


async def _serve(parent: socket.socket) -> None:
    message = pb.GenerateResponse(chunks=[pb.Chunk(token_ids=[77], text="a")]).SerializeToString()

    async def generate(request: bytes, context: grpc.aio.ServicerContext) -> None:
        while True:
            await context.write(message)

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Generate": grpc.unary_stream_rpc_method_handler(generate)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("expertwire.v1.Inference", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    parent.sendall(str(port).encode())
    await server.wait_for_termination()
