"""The bare library as a ceiling: a `grpc.aio` server whose streams repeat one message and do nothing else.

They write as fast as they can, or, as a front does, one message each whenever a step has ended.
"""

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

    Args:
        step_time_s: seconds between messages; 0: none.

    Attributes:
        address: that it listens on.
        pid: of the process.
    """

    def __init__(self, step_time_s: float = 0.0) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = process.start_call(f"{__name__}:echo_main", step_time_s, theirs.fileno(), sockets=[theirs])
        with ours:
            self.address = f"127.0.0.1:{int(ours.recv(16))}"
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        process.stop_all([self._process], _STOP_S, grace_s=0.0)


def echo_main(step_time_s: float, descriptor: int) -> None:
    """Serve until the parent ends; entry point of the process."""
    with socket.socket(fileno=descriptor) as parent:
        asyncio.run(_serve(step_time_s, parent))


async def _serve(step_time_s: float, parent: socket.socket) -> None:
    waiting: list[asyncio.Future[None]] = []
    loop = asyncio.get_running_loop()
    message = pb.GenerateResponse(chunks=[pb.Chunk(token_ids=[77], text="a")]).SerializeToString()

    async def generate(request: bytes, context: grpc.aio.ServicerContext) -> None:
        while True:
            if step_time_s:
                waiting.append(loop.create_future())
                await waiting[-1]
            await context.write(message)

    async def step() -> None:
        while True:
            await asyncio.sleep(step_time_s)
            for future in waiting:
                if not future.done():
                    future.set_result(None)
            waiting.clear()

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Generate": grpc.unary_stream_rpc_method_handler(generate)
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("expertwire.v1.Inference", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    parent.sendall(str(port).encode())
    stepping = loop.create_task(step()) if step_time_s else None
    await server.wait_for_termination()
    assert stepping is None or not stepping.done(), "steps go on as long as the server"
