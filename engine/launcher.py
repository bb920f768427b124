"""Launchers, which start and watch one worker process per rank: the protocol, and the one for this machine."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from typing import Protocol

from expertwire.comm.control.channel import this_node
from expertwire.engine import process

WORKER = "expertwire.engine.worker:worker_main"


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """Arguments of all workers.

    Args:
        config: an `EngineConfig`, or in tests and benchmarks anything picklable that their workers take.
        num_ranks: number of ranks.
        address: address of the `ControlHub`.
        token: shared secret of the hub.
    """

    config: object
    num_ranks: int
    address: str
    token: str


class RankFailed(RuntimeError):
    """A worker process has died, or could not be started.

    Attributes:
        rank: rank of the worker; -1 when no rank is at fault.
        message: what happened, with the process id.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}" if rank >= 0 else message)
        self.rank = rank
        self.message = message

    def __reduce__(self) -> tuple[type[RankFailed], tuple[int, str]]:
        return RankFailed, (self.rank, self.message)


class Launcher(Protocol):
    """Starts the workers of one engine, each of which runs `worker_main(config, rank, num_ranks, address, token, node, gpu)`."""

    def hub_address(self) -> str:
        """Return the address ("tcp:host:0", "unix:/path") on which the controller must listen so that all workers reach it."""
        ...

    def connect(self) -> None:
        """Prepare for `start`, while the controller starts. Raises ValueError or EngineFailed. Idempotent."""
        ...

    def start(self, spec: WorkerSpec) -> None:
        """Start all workers, without waiting until they have joined. Raises `RankFailed`."""
        ...

    def poll(self) -> None:
        """Raise `RankFailed` if a worker has ended; do not wait."""
        ...

    def stop(self, timeout_s: float) -> None:
        """End all workers and wait for their end, at most about `timeout_s` seconds. Idempotent."""
        ...


class LocalLauncher:
    """Workers as processes of this machine, rank r on its r-th GPU; they end with this process, however it ends.

    Args:
        worker: the worker's entry point, "package.module:function".
    """

    def __init__(self, worker: str = WORKER) -> None:
        self._worker = worker
        self._processes: list[subprocess.Popen[bytes]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def hub_address(self) -> str:
        """See `Launcher`. The address is a socket in a folder that only this user can enter."""
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="expertwire-", ignore_cleanup_errors=True)
        return f"unix:{self._folder.name}/hub"

    def connect(self) -> None:
        """See `Launcher`: there is nothing to prepare."""

    def start(self, spec: WorkerSpec) -> None:
        """See `Launcher`."""
        assert not self._processes, f"{len(self._processes)} workers run already"
        node = this_node()
        for rank in range(spec.num_ranks):
            args = (spec.config, rank, spec.num_ranks, spec.address, spec.token, node, rank)
            self._processes.append(process.start_call(self._worker, *args))

    def poll(self) -> None:
        """See `Launcher`. Of several dead workers, one that was killed is named before those that failed."""
        codes = {rank: code for rank, worker in enumerate(self._processes) if (code := worker.poll()) is not None}
        if codes:
            rank = min(codes, key=lambda rank: (codes[rank] >= 0, codes[rank] == 0))
            raise RankFailed(rank, f"worker process {self._processes[rank].pid} {process.describe_exit(codes[rank])}")

    def stop(self, timeout_s: float) -> None:
        """See `Launcher`."""
        workers, self._processes = self._processes, []
        process.stop_all(workers, timeout_s)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
