"""A gRPC server without an engine, which answers at once: what clients wait beside an attack even where a server does nothing.

`--bare` attacks it instead. It has one process, the options of a front, and `Generate` and the health service only; an answer is
one message with all tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from expertwire.deploy.grpc.config import Limits
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.deploy.proto import expertwire_v1_pb2_grpc as pb_grpc


class _Inference(pb_grpc.InferenceServicer):
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """See expertwire.v1."""
        yield pb.GenerateResponse(chunks=[pb.Chunk(token_ids=[0] * request.sampling_params.max_tokens)])


async def _main() -> None:
    server, checks = grpc.aio.server(options=Limits().options()), health.aio.HealthServicer()
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    pb_grpc.add_InferenceServicer_to_server(_Inference(), server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"serving on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_main())
