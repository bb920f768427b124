"""The gRPC server: `expertwire.v1.Inference`, health checks and reflection, over one frontend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from expertwire.deploy.grpc import calls
from expertwire.deploy.grpc.calls import Call
from expertwire.deploy.grpc.catalog import Catalog
from expertwire.deploy.grpc.config import Limits
from expertwire.deploy.grpc.health import HealthServicer
from expertwire.deploy.grpc.identity import Authenticator
from expertwire.deploy.grpc.models import Models, ServedModel
from expertwire.deploy.grpc.overload import Overload
from expertwire.deploy.grpc.queries import QueryServicer
from expertwire.deploy.grpc.requests import GOODBYE_S, STALL_S, Requests
from expertwire.deploy.grpc.server_info import ServerInfo
from expertwire.deploy.grpc.servicer import InferenceServicer
from expertwire.deploy.grpc.turns import Turns
from expertwire.engine.frontend.cascade_legs import CascadePolicy
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.text_workers import TextWorkers
from expertwire.strategies.decision_log import DecisionLog

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
SERVICE = calls.SERVICE.full_name
_BEAT_S = 0.25
_DEFAULT_LIMITS = Limits()
_DEFAULT_CATALOG = Catalog()
_NONE_FAILED: Mapping[str, str] = MappingProxyType({})
_NO_CASCADES: Mapping[str, CascadePolicy] = MappingProxyType({})


class Server:
    """A gRPC server, created within a running event loop.

    Args:
        host: name or address to listen on.
        port: port to listen on; 0 chooses a free one.
        limits: what clients may hold.
        credentials: TLS credentials; None speaks plain text.
        shares_port: whether other processes of the server listen on the same port; otherwise a second server is an error.

    Attributes:
        port: the port that it listens on.

    Raises:
        ValueError: the address cannot be used.
    """

    def __init__(
        self,
        host: str,
        port: int,
        limits: Limits = _DEFAULT_LIMITS,
        *,
        credentials: grpc.ServerCredentials | None = None,
        shares_port: bool = False,
    ) -> None:
        self._overload, self._turns = Overload(limits), Turns()
        self._server = grpc.aio.server(options=(*limits.options(), ("grpc.so_reuseport", int(shares_port))))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ValueError(
                f"cannot listen on {address}: the port is taken, or the host is not this machine"
            ) from error

    @property
    def num_calls(self) -> int:
        """Calls that run, without health checks."""
        return self._overload.num_calls

    async def serve(
        self,
        frontend: Frontend,
        *,
        authenticator: Authenticator | None = None,
        stop: asyncio.Event,
        gives_way: Callable[[], bool] = lambda: False,
        drain_timeout_s: float,
        texts: TextWorkers | None = None,
        others: Sequence[tuple[Frontend, TextWorkers]] = (),
        failed: Mapping[str, str] = _NONE_FAILED,
        cascades: Mapping[str, CascadePolicy] = _NO_CASCADES,
        decision_log: DecisionLog | None = None,
        info: ServerInfo | None = None,
        catalog: Catalog = _DEFAULT_CATALOG,
        stall_s: float = STALL_S,
        on_ready: Callable[[], None] = lambda: None,
        on_beat: Callable[[], None] = lambda: None,
    ) -> str:
        """Serve until `stop` is set, and drain.

        Args:
            frontend: a frontend that watches its engine, whose model answers calls that name none; left open.
            authenticator: finds out who makes a call; None believes everybody.
            stop: set to end the service.
            gives_way: tells then whether another process serves the port, to which clients are sent.
            drain_timeout_s: seconds for running requests to finish.
            texts: tokenise what clients send; left open. None does it on the loop.
            others: frontends of further models, of other names, with what tokenises for them; left open.
            failed: by name, why further models cannot serve.
            cascades: policies over the models, by name.
            decision_log: gets the cascades' decisions; left open.
            info: the server's options.
            catalog: strategies and verifiers that clients may name.
            stall_s: as for `Requests`.
            on_ready: called when the server is ready.
            on_beat: called a few times a second while the loop works.

        Returns:
            The message with which all engines failed, or "".
        """
        authenticator, texts = authenticator or Authenticator(), texts or TextWorkers(frontend, None)
        each = ((frontend, texts), *others)
        models = Models(
            [ServedModel(Requests(one, of, catalog, self._turns, stall_s), of) for one, of in each],
            failed,
            cascades,
            decision_log,
        )
        servicer, queries = InferenceServicer(models, authenticator), QueryServicer(models, info, catalog)
        health = HealthServicer(("", SERVICE), lambda: models.is_ready)
        services: tuple[tuple[Any, tuple[object, ...], Authenticator | None], ...] = (
            (calls.SERVICE, (servicer, queries), authenticator),
            (_HEALTH, (health,), None),
            (_REFLECTION, (_Reflection(),), authenticator),
        )
        for descriptor, servicers, who in services:
            service = calls.Service(overload=self._overload, turns=self._turns, authenticator=who)
            handlers = calls.make_handlers(descriptor, servicers, service)
            # The calls of each registered method wait in a queue of its own, so health checks do not wait behind others.
            self._server.add_registered_method_handlers(descriptor.full_name, handlers)
        beating, leaving = asyncio.create_task(_beat(models, health, on_beat)), list[asyncio.Task[None]]()
        await self._server.start()
        try:
            on_ready()
            await stop.wait()
            if gives_way():
                # Clients connect anew at once.
                leaving.append(asyncio.create_task(self._server.stop(drain_timeout_s + GOODBYE_S)))
            await models.drain(drain_timeout_s)
            models.stop()
        finally:
            beating.cancel()
            await asyncio.gather(self._server.stop(GOODBYE_S), *leaving)
        return models.failure


class _Reflection:
    """Server reflection, by the library's servicer."""

    def __init__(self) -> None:
        names = (SERVICE, _HEALTH.full_name, reflection.SERVICE_NAME)
        self._library: Any = reflection.aio.ReflectionServicer(names)

    async def ServerReflectionInfo(self, call: Call) -> None:
        """See grpc.reflection.v1alpha."""
        async for response in self._library.ServerReflectionInfo(_requests(call), None):
            await call.write(response)


async def _requests(call: Call) -> AsyncIterator[Any]:
    while (request := await call.wait()) is not None:
        yield request


async def _beat(models: Models, health: HealthServicer, on_beat: Callable[[], None]) -> None:
    """Report the health, and end stalled streams."""
    while True:
        health.notify()
        models.end_stalled()
        on_beat()
        await asyncio.sleep(_BEAT_S)
