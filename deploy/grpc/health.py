"""Health checks, `grpc.health.v1`: readiness of the engine, and liveness of the server.

The library's own servicer writes to watchers under the lock that changing the status needs, so a watcher that never reads would
stop it. Here every watcher writes for itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from grpc_health.v1 import health_pb2

from expertwire.deploy.grpc.calls import Call
from expertwire.engine.frontend.api import RequestError, RequestFailed

LIVENESS = "liveness"  # name of the service that is healthy as long as the server's loop works
_MAX_WATCHERS = 256
_Status = health_pb2.HealthCheckResponse
_messages: Any = health_pb2  # whose stubs lack those of List


class HealthServicer:
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
        self._num_watchers = 0

    def notify(self) -> None:
        """Wake the watchers if the engine's health has changed; to be called a few times a second."""
        if (is_ready := self._is_ready()) != self._was_ready:
            self._was_ready = is_ready
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(self, request: health_pb2.HealthCheckRequest, call: Call) -> health_pb2.HealthCheckResponse:
        """Return the status of a service."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            text = f"no service is called {request.service!r:.100}"
            raise RequestFailed(RequestError("NOT_FOUND", text))
        return _Status(status=status)

    async def List(self, request: Any, call: Call) -> Any:
        """Return the status of every service."""
        names = (*sorted(self._services), LIVENESS)
        return _messages.HealthListResponse(statuses={name: _Status(status=self._status(name)) for name in names})

    async def Watch(self, request: health_pb2.HealthCheckRequest, call: Call) -> None:
        """Send the status of a service now and at every change."""
        if self._num_watchers >= _MAX_WATCHERS:
            text = f"{_MAX_WATCHERS} calls of Watch run; no more are allowed"
            raise RequestFailed(RequestError("RESOURCE_EXHAUSTED", text, 1.0))
        self._num_watchers += 1
        try:
            await self._watch(request.service, call)
        finally:
            self._num_watchers -= 1

    async def _watch(self, service: str, call: Call) -> None:
        sent = None
        while True:
            changed, status = self._changed, self._status(service)
            if status != sent:
                await call.write(_Status(status=status))
                sent = status
            else:
                await changed.wait()

    def _status(self, service: str) -> int:
        if service == LIVENESS:
            return _Status.SERVING
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._is_ready() else _Status.NOT_SERVING
