"""Child processes that cannot outlive their parent.

A child is a new interpreter (`python -m`), so the parent's script is not imported again and needs no `__main__` guard. It reads
the function to call and its arguments, pickled, from its standard input, which then stays open as a lifeline: when the parent
ends, however it ends, a thread of the child sees the end of the pipe and exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

LIFELINE_EXIT_CODE = 75  # of a child whose lifeline was closed
_LENGTH = struct.Struct("<Q")
_PARENT_CHECK_S = 1.0
_NICENESS = 5  # a third of the processor time of others
_MOST_DESCRIPTORS = 65_536


def start_call(
    target: str, *args: object, stdout: int | IO[bytes] | None = None, sockets: Sequence[socket.socket] = ()
) -> subprocess.Popen[bytes]:
    """Start a child that calls a function; return its process.

    The child has its own process group, so Ctrl-C in the terminal reaches the parent only. Its session is the parent's: Linux
    shares processors among sessions first (autogroups), and a thread that works little while its process computes on another
    core would wait tens of ms behind the other children's. Closing the child's `stdin` ends it.

    Args:
        target: "package.module:function".
        args: picklable arguments.
        stdout: as for `subprocess.Popen`; None inherits the parent's.
        sockets: inherited by the child, which opens each with `socket.socket(fileno=...)` under the parent's number.
    """
    # -P: do not import from the current folder.
    command = [sys.executable, "-P", "-m", "expertwire.engine.process"]
    inherited = [each.fileno() for each in sockets]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, process_group=0, pass_fds=inherited)
    assert process.stdin
    data = pickle.dumps((os.getpid(), sys.path, target, args))
    try:
        process.stdin.write(_LENGTH.pack(len(data)) + data)
        process.stdin.flush()
    except BrokenPipeError:
        process.wait()  # it died at once; its exit code tells more than the broken pipe
    return process


def raise_descriptor_limit() -> None:
    """Raise this process's limit of open files to `_MOST_DESCRIPTORS`, or as far as its hard limit allows.

    Strangers can open connections to a port, such as gloo's on loopback, which nothing of ours can refuse.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(_MOST_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@contextlib.contextmanager
def batch_threads() -> Iterator[None]:
    """Let threads that are started meanwhile, and those that they start, not interrupt others when they are woken up.

    A thread that is woken often and has nothing urgent to do, such as gRPC's, which tells an event loop of every message that
    has been sent, would otherwise stop the loop each time where they share a core. Without effect if that is not allowed.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def lower_priority() -> None:
    """Let processes that answer clients come before this process's threads, where processors are short."""
    niceness = max(os.getpriority(os.PRIO_PROCESS, 0), _NICENESS)
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)


def return_memory() -> None:
    """Let the operating system have this process's free memory; glibc would keep most of it."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def describe_exit(returncode: int) -> str:
    """Return a description such as "exited with code 3" or "was killed by SIGKILL"."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def stop_all(processes: Iterable[subprocess.Popen[bytes]], timeout_s: float, *, grace_s: float = 0.5) -> None:
    """End children and wait for them: close their lifelines after `grace_s` seconds, then terminate, then kill.

    Args:
        processes: the children.
        timeout_s: seconds from closing the lifelines to killing.
        grace_s: seconds in which the children may end on their own.
    """
    processes = list(processes)
    _wait_all(processes, grace_s)
    for process in processes:
        _close_lifeline(process)
    _wait_all(processes, timeout_s / 2)
    for process in processes:
        process.terminate()  # without effect on a process that has ended
    _wait_all(processes, timeout_s / 2)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()


def _close_lifeline(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # buffered data has no reader any more
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
            os._exit(LIFELINE_EXIT_CODE)  # the parent died meanwhile
        data += more
    return bytes(data)


def _watch(lifeline: int, parent: int) -> None:
    """Exit when the lifeline closes, or when the parent has gone although a fork of it still holds the pipe."""
    while os.getppid() == parent:
        readable, _, _ = select.select([lifeline], [], [], _PARENT_CHECK_S)
        if readable and not os.read(lifeline, 1):
            break
    os._exit(LIFELINE_EXIT_CODE)


def _main() -> None:
    """Call the function; the main function of a child. The child ignores Ctrl-C and ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a terminal with `stty tostop` would stop it at its first message
    # Keep the lifeline on another descriptor, so that nothing else reads it as standard input.
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
