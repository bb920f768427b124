"""Health checks, `grpc.health.v1`: readiness of the engine, and liveness of the server.

The library's own servicer writes to watchers under the lock that changing the status needs, so a watcher that never reads would
stop it. Here every watcher writes for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVENESS = "liveness"  # name of the service that is healthy as long as the server's loop works
_Status = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """The health service.

    Args:
        services: names of the services whose health is the engine's.
        is_ready: returns whether the engine can serve.
    """

    def __init__(self, services: Collection[str], is_ready: Callable[[], bool]) -> None:
        self._services = frozenset(services)
        self._is_ready = is_ready
        self._was_ready = is_ready()
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Wake the watchers if the engine's health has changed; to be called a few times a second."""
        if (is_ready := self._is_ready()) != self._was_ready:
            self._was_ready = is_ready
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """Return the status of a service."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service is called {request.service!r:.100}")
        return _Status(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext) -> None:
        """Send the status of a service now and at every change."""
        sent = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != sent:
                await context.write(_Status(status=status))
                sent = status
            else:
                await changed.wait()

    def _status(self, service: str) -> int:
        if service == LIVENESS:
            return _Status.SERVING
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._is_ready() else _Status.NOT_SERVING
