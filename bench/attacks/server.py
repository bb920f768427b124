"""`Server`: `expertwire serve`, or a server that does nothing, as a process, to be attacked."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

from expertwire.bench.attacks.target import Target

_STOP_S = 20.0


class Server:
    """`expertwire serve` on two local ranks.

    Args:
        model: folder of the checkpoint; None: a server that does nothing, see `bare`.
        serve_args: further options.
        descriptors: limit of descriptors of each process; None keeps this process's.

    Attributes:
        target: what attacks see of it.
    """

    target: Target

    def __init__(self, model: Path | None, serve_args: Sequence[str] = (), *, descriptors: int | None = None) -> None:
        if model is None:
            command = [sys.executable, "-m", "expertwire.bench.attacks.bare"]
        else:
            command = [
                sys.executable,
                "-m",
                "expertwire.deploy.cli",
                "serve",
                str(model),
                "--port",
                "0",
                "--ep-size",
                "2",
            ]
            command += ["--launcher", "local", "--device", "cpu", "--drain-timeout", "1", *serve_args]
        if descriptors is not None:
            command = ["sh", "-c", f'ulimit -n {descriptors} && exec "$@"', "sh", *command]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)
        try:
            self.target = Target(self._wait_ready(), self._process.pid)
        except BaseException:
            self.close()
            raise

    def log(self) -> str:
        """Return what the server has written to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        """End all processes."""
        family: list[psutil.Process] = [self._process]
        with contextlib.suppress(psutil.NoSuchProcess):  # if it has ended, its children end by themselves
            family += self._process.children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        self._process.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            self._process.wait(_STOP_S)
        _, left = psutil.wait_procs(family, timeout=5)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _wait_ready(self) -> str:
        for line in self._process.stdout:
            if line.startswith("serving "):
                # Nobody reads what it prints from now on.
                threading.Thread(target=self._process.stdout.read, daemon=True).start()
                return line.split()[-1]
        raise RuntimeError(f"the server ended with code {self._process.wait()} before it was ready:\n{self.log()}")
