"""`expertwire serve`: an engine and its gRPC fronts, until a signal ends them."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from expertwire.deploy import runtime
from expertwire.deploy.cascades import open_cascades
from expertwire.deploy.fronts import Fronts, reserve_port
from expertwire.deploy.grpc.catalog import open_catalog
from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.grpc.reloading import Reloading
from expertwire.deploy.grpc.security import Security
from expertwire.deploy.tenants import Tenants
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.api import EngineFailed
from expertwire.engine.loader.checkpoint import Checkpoint
from expertwire.engine.mock_worker import DEVICE

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_FAILED_S = 3.0  # for which fronts without an engine still answer, so that clients and health checks learn why


def serve(configs: Sequence[EngineConfig], server: ServerConfig, *, announce: Callable[[str], None]) -> int:
    """Serve until SIGINT or SIGTERM, then drain; a second signal ends at once.

    Args:
        configs: options of each model's engine; the first model answers calls that name none.
        server: the server's options.
        announce: called with "serving MODEL on HOST:PORT", and lines on the caches, once the server is ready.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: the port is taken, or the model or an option is not usable.
        EngineFailed: an engine could not start, or all have failed.
    """
    reserve_port(server.host, server.port).close()  # before the model is loaded
    catalog = open_catalog(server.strategies, server.services(), server.verifier_ca_certs)  # as each front does
    tenants = Security.open(server).tenants
    configs = [runtime.with_model_folder(_with_quotas(config, tenants)) for config in configs]
    special_ids = [runtime.special_ids(runtime.open_tokenizer(config)) for config in configs]
    names = [config.served_model_name or Path(config.model).name for config in configs]
    cascades = open_cascades(server, names, catalog.verifiers)
    _exit_on_signals()
    with contextlib.ExitStack() as stack:
        engines = []
        for config, ids in zip(configs, special_ids, strict=True):
            sys.stderr.write(f"{_about_start(config)}\n")
            launcher, log_stats = runtime.make_launcher(config), not server.disable_log_stats
            engines.append((stack.enter_context(Engine(config, launcher, *ids, log_stats=log_stats)), config))
        fronts = stack.enter_context(contextlib.closing(Fronts(engines, server, cascades)))
        infos = [engine.info for engine, _ in engines]
        announce(
            "\n".join(
                [f"serving {', '.join(info.name for info in infos)} on {server.host}:{fronts.port}", *_about_all(infos)]
            )
        )
        is_stopping = _stop_on_signals()
        try:
            while not is_stopping():
                fronts.watch()
        except EngineFailed:
            end = time.monotonic() + _FAILED_S
            while time.monotonic() < end and not is_stopping():
                time.sleep(0.05)
            raise
        fronts.drain()
    return 0


def _with_quotas(config: EngineConfig, tenants: Reloading[Tenants] | None) -> EngineConfig:
    """Return the engine's options with the quotas of the file of tenants."""
    if tenants is None:
        return config
    known = tenants.value
    return dataclasses.replace(config, tenant_quotas=known.quotas(), default_tenant_quota=known.default_quota)


def _about_start(config: EngineConfig) -> str:
    """Return what the start takes its time for."""
    ranks = f"{config.ep_size} rank{'s' * (config.ep_size > 1)}"
    name = config.served_model_name or Path(config.model).name
    if config.load_format != "auto":
        return f"starting {name} on {ranks}, with {config.load_format} weights"
    size = Checkpoint(config.model).nbytes / 1e9
    return (
        f"starting {name} on {ranks}: loading {size:,.3g} GB of weights, and compiling the kernels "
        "that no earlier start has cached"
    )


def _about_all(infos: Sequence[ModelInfo]) -> Iterator[str]:
    for info in infos:
        yield from (line if len(infos) == 1 else f"{info.name}: {line}" for line in _about(info))


def _about(info: ModelInfo) -> Iterator[str]:
    if info.device == DEVICE:
        yield "THERE IS NO MODEL (load format mock): every answer is made of pseudo-random tokens"
    sizes = ", ".join(f"{name} {nbytes / 1e6:,.1f} MB" for name, nbytes in info.cache_bytes.items())
    yield f"the caches of a rank, in {info.kv_cache_dtype}, hold {info.cache_tokens:,} tokens: {sizes}"
    if info.all_to_all:
        yield f"all-to-all {info.all_to_all}"


def _exit_on_signals() -> None:
    """Make signals raise SystemExit, so that context managers end what has been started."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, leave)


def _stop_on_signals() -> Callable[[], bool]:
    """Return a function that tells whether a signal has come; the next one raises."""
    received: list[int] = []

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        _exit_on_signals()

    for number in _SIGNALS:
        signal.signal(number, stop)
    return lambda: bool(received)
