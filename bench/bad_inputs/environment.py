"""The environment of bad inputs: broken copies of the demo model, an `LLM`, a server, and the command line."""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from expertwire import LLM
from expertwire.bench.bad_inputs.broken_checkpoints import Change, without
from expertwire.deploy import cli
from expertwire.deploy.grpc.client import Client

DEMO = Path(str(importlib.resources.files("expertwire") / "demo_model"))
_CLI = (sys.executable, "-P", "-m", "expertwire.deploy.cli")


class CommandFailed(Exception):
    """A command exited with `code`; the message is its stderr."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Environment:
    """An `LLM` and a server for bad inputs; a context manager.

    Attributes:
        llm: the demo model, for requests of up to 64 tokens.
        client: client of a server with random weights and no tokenizer, for one running and one waiting request.
    """

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:
            self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertwire-")))
            self._num_copies = 0
            self.llm = stack.enter_context(LLM(DEMO, device="cpu", threads_per_rank=1, max_model_len=64))
            folder = self.checkpoint(without("tokenizer.json"))
            options = (
                f"serve {folder} --load-format dummy --device cpu --port 0 --max-num-seqs 1 --max-queued-requests 1"
            )
            server = subprocess.Popen([*_CLI, *shlex.split(options)], stdout=subprocess.PIPE, text=True)
            stack.callback(_stop, server)
            assert server.stdout is not None
            self.client = stack.enter_context(Client(server.stdout.readline().split()[-1]))
            self._stack = stack.pop_all()

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def checkpoint(self, change: Change) -> Path:
        """Return a changed copy of the demo model."""
        self._num_copies += 1
        folder = shutil.copytree(DEMO, self._scratch / str(self._num_copies))
        change(folder)
        return folder

    def command(self, line: str) -> None:
        """Run the command `expertwire line` in this process; `<taken>` becomes a port that is in use.

        Raises:
            CommandFailed: always.
        """
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        err = io.StringIO()
        with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.redirect_stderr(err):
            try:
                code = cli.main(shlex.split(line.replace("<taken>", str(taken.getsockname()[1]))))
            except SystemExit as leaving:
                code = int(leaving.code or 0)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        raise CommandFailed(code, err.getvalue())

    def command_without_gpu(self, line: str) -> None:
        """Run the command `expertwire line` in a process that sees no GPU.

        Raises:
            CommandFailed: always.
        """
        command = ["env", "CUDA_VISIBLE_DEVICES=", *_CLI, *shlex.split(line)]
        done = subprocess.run(command, capture_output=True, text=True)
        raise CommandFailed(done.returncode, done.stderr)

    def request(self, **values: Any) -> None:
        """Send a request, valid but for `values`, to the server and read its stream."""
        list(self.client.generate(**{"prompt": [5], "max_tokens": 16, **values}))

    def session_request(self, *, window_tokens: int, **values: Any) -> None:
        """Send a request, valid but for `values`, in a session, and raise the error that it ends with."""
        with self.client.session(window_tokens=window_tokens) as session:
            request = session.submit(**{"prompt": [5], "max_tokens": 16, **values})
            for _ in session:
                pass
        if request.error is not None:
            raise request.error

    def request_beside(self, **values: Any) -> None:
        """Send a request while the request "first" runs."""
        first = self.client.generate([5], request_id="first", max_tokens=2000, ignore_eos=True)
        chunks = iter(first)
        next(chunks)
        try:
            self.request(**values)
        finally:
            first.close()

    def plain(self, text: str) -> str:
        """Return a message on one line, without the parts that differ between runs."""
        text = re.sub(rf"{re.escape(str(self._scratch))}/\d+", "<checkpoint>", " ".join(text.split()))
        text = re.sub(r"only [\d.]+ GB", "only <free> GB", text)
        text = re.sub(r"--port \d{5}", "--port <port>", text)
        # How argparse lists choices depends on the version of Python.
        return re.sub(r"\(choose from .*?\)", lambda found: found[0].replace("'", ""), text)


def _stop(server: subprocess.Popen) -> None:
    family = psutil.Process(server.pid).children(recursive=True)
    server.terminate()
    server.wait(30)
    _, left = psutil.wait_procs(family, timeout=5)
    assert not left, f"the server left {left} behind"
