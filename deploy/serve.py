"""`expertwire serve`: an engine with a gRPC server, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from expertwire.deploy import runtime
from expertwire.deploy.grpc.server import Server
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.frontend import Frontend

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    config: EngineConfig, *, host: str, port: int, drain_timeout_s: float, announce: Callable[[str], None]
) -> int:
    """Serve until SIGINT or SIGTERM, then drain; a second signal ends at once.

    Args:
        config: the engine's options.
        host: name or address to listen on.
        port: port to listen on; 0 chooses a free one.
        drain_timeout_s: seconds for running requests to finish.
        announce: called with "serving MODEL on HOST:PORT", and a line on the caches, once the server is ready.

    Returns:
        The exit code: 1 if the engine failed.

    Raises:
        ValueError: the port is taken, or the model or an option is not usable.
        EngineFailed: the engine could not start.
    """
    if port:
        _check_port(host, port)
    tokenizer = runtime.open_tokenizer(config)
    _exit_on_signals()
    # The engine first: Ray forks, which is unsafe once gRPC has threads.
    with contextlib.ExitStack() as stack:
        launcher, end_of_turn_ids = runtime.make_launcher(config), runtime.end_of_turn_ids(tokenizer)
        engine = stack.enter_context(Engine(config, launcher, end_of_turn_ids))
        frontend = stack.enter_context(contextlib.closing(Frontend(engine.connect(), tokenizer)))
        # Statistics may take a step; with a frontend of their own, another thread can wait for them.
        stats_frontend = stack.enter_context(contextlib.closing(Frontend(engine.connect(), None)))

        async def serve_frontend() -> str:
            server = Server(host, port)
            return await server.serve(
                frontend,
                stats_frontend.stats,
                stop=_stop_on_signals(),
                drain_timeout_s=drain_timeout_s,
                on_ready=lambda: announce(
                    "\n".join(
                        [f"serving {frontend.model_info.name} on {host}:{server.port}", *_about(frontend.model_info)]
                    )
                ),
            )

        return 1 if asyncio.run(serve_frontend()) else 0


def _about(info: ModelInfo) -> Iterator[str]:
    sizes = ", ".join(f"{name} {nbytes / 1e6:,.1f} MB" for name, nbytes in info.cache_bytes.items())
    yield f"the caches of a rank, in {info.kv_cache_dtype}, hold {info.cache_tokens:,} tokens: {sizes}"
    if info.all_to_all:
        yield f"all-to-all {info.all_to_all}"


def _check_port(host: str, port: int) -> None:
    """Check that the address can be used, before the model is loaded."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise ValueError(
            f"cannot listen on --host {host} --port {port}: {reason} (--port 0 takes a free port)"
        ) from error


def _exit_on_signals() -> None:
    """Make signals raise SystemExit, so that context managers end what has been started."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    for number in _SIGNALS:
        signal.signal(number, leave)


def _stop_on_signals() -> asyncio.Event:
    """Return an event that the next signal sets; the one after it raises."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def drain() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        _exit_on_signals()

    for number in _SIGNALS:
        loop.add_signal_handler(number, drain)
    return stop
