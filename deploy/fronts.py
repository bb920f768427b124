"""The fronts of a server: processes that serve gRPC on one port, started, watched and replaced.

The kernel spreads connections over the fronts (SO_REUSEPORT). A front that ends loses its own connections only and is replaced;
the controller aborts its requests. One that is silent is killed, because the kernel goes on giving it connections. One that has
lost its link to an engine that works gives way to another, and then finishes what its other engines have begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import select
import signal
import socket
import subprocess
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from expertwire.comm.control.channel import ChannelClosed, SocketChannel
from expertwire.deploy.grpc.config import ServerConfig
from expertwire.deploy.grpc.front import NOTHING, FrontArgs
from expertwire.engine import process
from expertwire.engine.config.engine_config import EngineConfig
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.api import EngineFailed
from expertwire.strategies.cascade import Cascade

SILENT_S = 1.75  # a front that serves and has not been heard for so long is killed
_STARVED_S = 8.0  # or for so long, if it has waited for a processor for most of that time
_START_S = 60.0  # for a front to begin to serve
_MIN_LIFE_S = 5.0  # a front that ends sooner is not simply replaced
_MAX_SHORT_LIVES = 3
_POLL_S = 0.1
_LINK_S = 1.0  # after which an engine whose link is lost is known to work, as it has not ended
_STACKS_S = 0.05  # for a front to print its stacks before it is killed
_STOP_S = 5.0
_log = logging.getLogger(__name__)


class Fronts:
    """The fronts of one server.

    Args:
        engines: running engines, each with its options; the model of the first answers calls that name none.
        config: the server's options.
        cascades: policies over the models, by name; None: there are none.

    Attributes:
        port: the port that the fronts listen on.

    Raises:
        ValueError: the address cannot be used.
        EngineFailed: an engine has failed, or a front could not start.
    """

    def __init__(
        self,
        engines: Sequence[tuple[Engine, EngineConfig]],
        config: ServerConfig,
        cascades: Mapping[str, Cascade] | None = None,
    ) -> None:
        self._engines = engines
        self._cascades = dict(cascades or {})
        self._failed: dict[str, str] = {}  # models whose engines have failed, and how
        self._reserved = reserve_port(config.host, config.port)
        self.port = self._reserved.getsockname()[1]
        self._config = dataclasses.replace(config, port=self.port)
        self._fronts: list[_Front] = []
        self._leaving: list[tuple[_Front, int]] = []  # fronts that give way, and the numbers of those in their places
        self._short_lives = 0
        try:
            for _ in range(config.num_fronts()):
                self._fronts.append(self._start())
            self._await_serving()
        except BaseException:
            self.close()
            raise

    def watch(self, timeout_s: float = _POLL_S) -> None:
        """Wait a little, and replace fronts that have ended, are silent or have lost a link.

        Raises:
            EngineFailed: all engines have failed, or fronts end as soon as they are started.
        """
        self._hear(timeout_s)
        self._note_failures()
        for number, front in enumerate(self._fronts):
            ending = front.trouble()
            if (trouble := ending or front.lost_link(self._failed)) is None:
                continue
            _log.error("error: a front (process %d) %s; it is replaced", front.process.pid, trouble)
            if ending is None:
                self._leaving.append((front, number))
            else:
                front.kill()
            self._count_short_life(front, trouble)
            self._fronts[number] = self._start()
        self._let_leave()

    def drain(self) -> None:
        """Let every front refuse new requests and finish the running ones; wait until all have ended."""
        fronts = self._all_fronts()
        for front in fronts:
            front.tell("drain")
        deadline = time.monotonic() + self._config.drain_timeout_s + _STOP_S
        while time.monotonic() < deadline and any(front.process.poll() is None for front in fronts):
            self._hear(_POLL_S)

    def close(self) -> None:
        """End every front. Idempotent."""
        fronts = self._all_fronts()
        process.stop_all([front.process for front in fronts], _STOP_S, grace_s=0.0)
        for front in fronts:
            front.channel.close()
        self._fronts, self._leaving = [], []
        self._reserved.close()

    def _start(self) -> _Front:
        serving = [(engine, config) for engine, config in self._engines if engine.info.name not in self._failed]
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(theirs)
            sockets = [stack.enter_context(engine.connect_socket()) for engine, _ in serving]
            args = FrontArgs(
                engines=tuple(config for _, config in serving),
                controllers=tuple(each.fileno() for each in sockets),
                failed=self._failed,
                cascades=self._cascades,
                server=self._config,
                parent=theirs.fileno(),
            )
            child = process.start_call("expertwire.deploy.grpc.front:front_main", args, sockets=[theirs, *sockets])
        return _Front(child, SocketChannel(ours), [engine.info.name for engine, _ in serving])

    def _all_fronts(self) -> list[_Front]:
        return [*self._fronts, *(front for front, _ in self._leaving)]

    def _let_leave(self) -> None:
        """Let fronts give way to those in their places that serve, and forget those that have left."""
        for front, number in list(self._leaving):
            if front.trouble() is not None:
                front.kill()
                self._leaving.remove((front, number))
            elif self._fronts[number].is_serving and not front.is_told:
                front.tell("give_way")

    def _note_failures(self) -> None:
        """Take note of engines that have failed, of which clients learn from the fronts.

        Raises:
            EngineFailed: all have.
        """
        for engine, _ in self._engines:
            if engine.failure is not None and engine.info.name not in self._failed:
                self._failed[engine.info.name] = engine.failure
                if len(self._failed) == len(self._engines):
                    raise EngineFailed(engine.failure)
                _log.error("error: the model %s cannot serve any more, others do: %s", engine.info.name, engine.failure)

    def _await_serving(self) -> None:
        while not all(front.is_serving for front in self._fronts):
            self._hear(_POLL_S)
            self._note_failures()
            for front in self._fronts:
                if (trouble := front.trouble()) is not None:
                    raise EngineFailed(f"a front (process {front.process.pid}) {trouble} before it served")

    def _hear(self, timeout_s: float) -> None:
        """Receive what the fronts say; wait up to `timeout_s` seconds for it."""
        by_descriptor = {front.channel.fileno(): front for front in self._all_fronts() if not front.has_hung_up}
        poller = select.poll()
        for descriptor in by_descriptor:
            poller.register(descriptor, select.POLLIN)
        for descriptor, _ in poller.poll(timeout_s * 1000):
            by_descriptor[descriptor].hear()

    def _count_short_life(self, front: _Front, trouble: str) -> None:
        is_short = time.monotonic() - front.started_s < _MIN_LIFE_S
        self._short_lives = self._short_lives + 1 if is_short else 0
        if self._short_lives >= _MAX_SHORT_LIVES:
            raise EngineFailed(
                f"{self._short_lives} fronts in a row ended within {_MIN_LIFE_S:g} s; the last {trouble}"
            )


class _Front:
    """A front's process, and what its parent knows of it; `models` are the names of its engines."""

    def __init__(self, child: subprocess.Popen[bytes], channel: SocketChannel, models: Sequence[str]) -> None:
        self.process = child
        self.channel = channel
        self.started_s = self._heard_s = time.monotonic()
        self._waited_s = 0.0  # for a processor, when it was last heard
        self.is_serving = False
        self.is_told = False  # to end
        self.has_hung_up = False
        self._models = models
        self._lost_s: dict[str, float] = {}  # when it was first heard that the link to a model's engine is lost

    def hear(self) -> None:
        try:
            while (message := self.channel.recv(0)) is not None:
                self.is_serving |= "serving" in message
                self._heard_s, self._waited_s = time.monotonic(), waited_s(self.process.pid)
                for number in message.get("lost", ()):
                    self._lost_s.setdefault(self._models[number], self._heard_s)
        except ChannelClosed:
            self.has_hung_up = True

    def tell(self, what: str) -> None:
        self.is_told = True
        with contextlib.suppress(ChannelClosed):
            self.channel.send({what: NOTHING})

    def trouble(self) -> str | None:
        """Return why the front has to be replaced, or None."""
        if (code := self.process.poll()) is not None:
            return process.describe_exit(code)
        silent_s, limit_s = time.monotonic() - self._heard_s, SILENT_S if self.is_serving else _START_S
        if silent_s <= limit_s:
            return None
        # Where others take the processors, a front that works is late, and a new one would be later.
        starved_s = waited_s(self.process.pid) - self._waited_s
        if silent_s / 2 < starved_s and silent_s <= _STARVED_S:
            return None
        return f"has been silent for {silent_s:.1f} s, {starved_s:.1f} s of which it waited for a processor"

    def lost_link(self, failed: Container[str]) -> str | None:
        """Return that it has lost a link to an engine that works, or None."""
        before = time.monotonic() - _LINK_S
        lost = [model for model, since_s in self._lost_s.items() if since_s < before and model not in failed]
        return f"has lost its link to the model {lost[0]}, which works" if lost else None

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(_STACKS_S)
            self.process.kill()
        self.process.wait()
        self.channel.close()


def waited_s(pid: int) -> float:
    """Return for how long the main thread of a process has waited for a processor; 0.0 if the kernel does not say."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def reserve_port(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address that does not listen, so that only this server's processes can.

    Raises:
        ValueError: the address is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Without SO_REUSEPORT, binding fails if anybody else uses the port, even with SO_REUSEPORT.
        with socket.create_server((host, port), family=family) as trial:
            address = trial.getsockname()
        reserved = socket.socket(family)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(address)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise ValueError(
            f"cannot listen on --host {host} --port {port}: {reason} (--port 0 takes a free port)"
        ) from error
    return reserved
