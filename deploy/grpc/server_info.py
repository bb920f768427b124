"""The resolved configuration of a server, and why it is so, for `GetServerInfo`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo

# Fields of the engine's options that `ModelInfo` has as they were resolved.
_RESOLVED = {"dtype": "dtype", "device": "device", "kv_cache_dtype": "kv_cache_dtype", "max_model_len": "max_model_len"}


class ServerInfo:
    """Options of a running server.

    Args:
        engines: of each model, the engine's options, as they were given, and the running model.
        server: the server's options, as they were given.
    """

    def __init__(self, engines: Sequence[tuple[EngineConfig, ModelInfo]], server: ServerConfig) -> None:
        self._started_s = time.monotonic()
        self._fronts = server.num_fronts()
        self._entries = list(_server_entries(server))
        for engine, model in engines:
            prefix = "engine" if len(engines) == 1 else f"engine.{model.name}"
            self._entries += _engine_entries(prefix, engine, model)

    def message(self) -> pb.ServerInfo:
        """Return the message."""
        return pb.ServerInfo(
            version=importlib.metadata.version("expertwire"),
            uptime_s=time.monotonic() - self._started_s,
            fronts=self._fronts,
            config=self._entries,
        )


def _engine_entries(prefix: str, engine: EngineConfig, model: ModelInfo) -> Iterator[pb.ConfigEntry]:
    for field in dataclasses.fields(engine):
        given = value = getattr(engine, field.name)
        reason = ""
        if field.name in _RESOLVED:
            value = getattr(model, _RESOLVED[field.name])
            if value != given:
                reason = f"{_shown(given)} stands for the model's, or this machine's"
        elif field.name == "all2all_backend" and model.all_to_all:
            value, _, reason = model.all_to_all.partition(" ")
        yield _entry(f"{prefix}.{field.name}", value, reason)
    sizes = "what the model's caches take within kv_cache_memory_bytes, or within the memory that is free"
    yield _entry(f"{prefix}.cache_tokens", model.cache_tokens, sizes)
    yield _entry(f"{prefix}.cache_bytes", model.cache_bytes, sizes)


def _server_entries(server: ServerConfig) -> Iterator[pb.ConfigEntry]:
    for field in dataclasses.fields(server):
        value = getattr(server, field.name)
        if field.name == "limits":
            for limit in dataclasses.fields(value):
                yield _entry(f"server.{limit.name}", getattr(value, limit.name))
            connections = dict(value.options())["grpc.max_allowed_incoming_connections"]
            yield _entry("server.connections", connections, "max_connections, or a share of the descriptors")
        elif field.name == "fronts" and value is None:
            yield _entry("server.fronts", server.num_fronts(), "one for every eight cores, at most 8")
        else:
            yield _entry(f"server.{field.name}", value)


def _entry(name: str, value: Any, reason: str = "") -> pb.ConfigEntry:
    return pb.ConfigEntry(name=name, value=_shown(value), reason=reason)


def _shown(value: Any) -> str:
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """Return what JSON can say of another value."""
    is_instance = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_instance else str(value)
