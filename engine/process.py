"""Child processes that cannot outlive their parent.

A child is a fresh interpreter (`python -m`), so nothing of the parent's script is imported again and it needs no `__main__`
guard. What the child shall do arrives, pickled, on its standard input, which then stays open as a lifeline: when the parent
ends, however it ends, the child's watchdog thread sees the end of the pipe and exits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import IO

LIFELINE_EXIT_CODE = 75  # of a child whose parent let go of it
_LENGTH = struct.Struct("<Q")
_PARENT_CHECK_S = 1.0


def start_call(target: str, *args: object, stdout: int | IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Run `target` ("package.module:function") with `args`, picklable, in a child.

    It runs in a session of its own: Ctrl-C in the terminal reaches the parent only, which decides. Closing the child's
    `stdin` ends it.

    Args:
        stdout: as for `subprocess.Popen`; None inherits ours.
    """
    # -P: the current folder is no place to import from.
    command = [sys.executable, "-P", "-m", "expertwire.engine.process"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, start_new_session=True)
    assert process.stdin
    data = pickle.dumps((os.getpid(), sys.path, target, args))
    try:
        process.stdin.write(_LENGTH.pack(len(data)) + data)
        process.stdin.flush()
    except BrokenPipeError:
        process.wait()  # it died at once; its exit code says more than the pipe
    return process


def describe_exit(returncode: int) -> str:
    """ "exited with code 3", "was killed by SIGKILL"."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def stop_all(processes: Iterable[subprocess.Popen[bytes]], timeout_s: float, *, grace_s: float = 0.5) -> None:
    """End children: let them leave by themselves for `grace_s`, cut the lifelines, terminate, kill. Waits for all of them.

    Args:
        timeout_s: seconds from cutting the lifelines to killing.
    """
    processes = list(processes)
    _wait_all(processes, grace_s)
    for process in processes:
        _cut(process)
    _wait_all(processes, timeout_s / 2)
    for process in processes:
        process.terminate()  # does nothing to one that has been waited for
    _wait_all(processes, timeout_s / 2)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _cut(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # what was still buffered has no reader any more
        process.stdin.close()


def _wait_all(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return


def _read_exactly(pipe: IO[bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = pipe.read(size - len(data))
        if not more:
            os._exit(LIFELINE_EXIT_CODE)  # the parent died while it was starting us
        data += more
    return bytes(data)


def _watch(lifeline: int, parent: int) -> None:
    """Exit when the lifeline ends, or when the parent is gone although one of its forks still holds the other end."""
    while os.getppid() == parent:
        readable, _, _ = select.select([lifeline], [], [], _PARENT_CHECK_S)
        if readable and not os.read(lifeline, 1):
            break
    os._exit(LIFELINE_EXIT_CODE)


def _main() -> None:
    """In a child: do what the parent asked for. From here on the child ends with its parent and ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The lifeline moves out of the way of whoever reads standard input.
    lifeline = os.dup(0)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with open(lifeline, "rb", buffering=0, closefd=False) as pipe:
        (length,) = _LENGTH.unpack(_read_exactly(pipe, _LENGTH.size))
        parent, path, target, args = pickle.loads(_read_exactly(pipe, length))
    sys.path += [entry for entry in path if entry and entry not in sys.path]
    threading.Thread(target=_watch, args=(lifeline, parent), name="lifeline", daemon=True).start()
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(*args)


if __name__ == "__main__":
    _main()
