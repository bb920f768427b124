"""Ranks in a test: N processes joined in a gloo group, which run functions of the tests and always end."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from expertwire.comm.group import Group, SoloGroup, TorchGroup
from expertwire.engine import process


class Ranks:
    """`size` processes, started when first needed. A run that fails ends them, and the next one starts others.

    Args:
        size: one rank is a `SoloGroup`, several are gloo.
        timeout_s: of one run; then those that have not answered are named.
    """

    def __init__(self, size: int, timeout_s: float = 60.0) -> None:
        self.size, self._timeout_s = size, timeout_s
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(group, *args)` on every rank; what each returned, by rank.

        Raises:
            RuntimeError: a rank raised (with its traceback), ended, or did not answer in time.
        """
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                _send(connection, (function, args))
            return self._collect()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes and wait for them. Idempotent."""
        for connection in self._connections:
            connection.close()
        process.stop_all(self._processes, 2.0)
        self._processes, self._connections = [], []

    def _start(self) -> None:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder, Listener(str(Path(folder) / "socket")) as listener:
            args = (self.size, folder, listener.address)
            self._processes = [process.start_call("helpers.ranks:rank_main", rank, *args) for rank in range(self.size)]
            connected = [listener.accept() for _ in range(self.size)]
            by_rank = {_receive(connection): connection for connection in connected}
            self._connections = [by_rank[rank] for rank in range(self.size)]
            self._collect()  # all have met, and the folder is not needed any more

    def _collect(self) -> list[Any]:
        deadline, answers = time.monotonic() + self._timeout_s, {}
        while len(answers) < self.size:
            waiting = {self._connections[rank]: rank for rank in range(self.size) if rank not in answers}
            ready = wait(list(waiting), deadline - time.monotonic())
            if not ready:
                raise RuntimeError(f"ranks {sorted(waiting.values())} did not answer within {self._timeout_s:g} s")
            for connection in ready:
                rank = waiting[connection]
                try:
                    error, answers[rank] = _receive(connection)
                except EOFError:
                    raise RuntimeError(f"rank {rank} has ended") from None
                if error:
                    raise RuntimeError(f"rank {rank}:\n{error}")
        return [answers[rank] for rank in range(self.size)]


def rank_main(rank: int, size: int, folder: str, address: str) -> None:
    """The life of a rank's process."""
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        from expertwire.bench.kernels import interpreter

        interpreter.prepare()
    with Client(address) as connection:
        _send(connection, rank)
        group = _join(rank, size, folder)
        _send(connection, (None, None))
        while True:
            try:
                function, args = _receive(connection)
            except EOFError:
                return
            try:
                answer = (None, function(group, *args))
            except Exception:  # noqa: BLE001 - the test shall hear of it
                answer = (traceback.format_exc(), None)
            _send(connection, answer)


def _send(connection: Connection, value: Any) -> None:
    """A copy of the value; `Connection.send` would share tensors' memory."""
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _join(rank: int, size: int, folder: str) -> Group:
    if size == 1:
        return SoloGroup()
    store = dist.FileStore(str(Path(folder) / "store"), size)
    group = TorchGroup(store=store, rank=rank, size=size, device="cpu", local_ip="127.0.0.1", timeout_s=60)
    group.barrier()
    return group
