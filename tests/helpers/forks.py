"""Children of tests as forks of a process that has imported torch, numba and the engine, which takes seconds.

`Forks.start_call` stands in for `expertwire.engine.process.start_call`: a child is the caller's own, with the same pipes, process
group and end. It asks a process that has only imported (this file, run as a script) to fork; `make test-slow` starts new
interpreters.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from numba.core.caching import NullCache
from numba.core.dispatcher import Dispatcher

from expertwire.engine import process
from expertwire.kernels import registry

_SET_CHILD_SUBREAPER = 36  # of prctl(2)
_ANSWER_S = 120.0
# What the children of tests import.
_MODULES = (
    "expertwire.engine.worker",
    "expertwire.engine.controller",
    "expertwire.scheduler.warm_up",
    "expertwire.comm.group",
)
start_call = process.start_call


def are_safe() -> bool:
    """Return whether forks are like new interpreters: without a GPU's driver, and without Triton's interpreter."""
    return sys.platform == "linux" and not Path("/dev/nvidiactl").exists() and "TRITON_INTERPRET" not in os.environ


class Forks:
    """The process that forks, started with the first child.

    Args:
        environment: variables of this process with which a child is a fork.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._environment = dict(environment)

    def close(self) -> None:
        """End the process."""
        if self._server is not None and self._socket is not None:
            self._socket.close()
            self._server.wait()

    def start_call(
        self,
        target: str,
        *args: object,
        stdout: int | IO[bytes] | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> subprocess.Popen[bytes]:
        """See `expertwire.engine.process.start_call`.

        A child whose environment is another is a new interpreter: modules may have read it.
        """
        with self._lock:
            if _environment() != self._environment:
                return start_call(target, *args, stdout=stdout, sockets=sockets)
            if self._server is None:
                self._start()
            return self._fork((os.getpid(), sys.path, target, args), stdout, sockets)

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self._socket.settimeout(_ANSWER_S)
        assert self._socket.recv(16) == b"ready"

    def _fork(
        self, call: object, stdout: int | IO[bytes] | None, sockets: Sequence[socket.socket]
    ) -> subprocess.Popen[bytes]:
        assert self._socket is not None
        with contextlib.ExitStack() as stack:
            stdin, lifeline = os.pipe()
            stack.callback(os.close, stdin)
            output, out = None, 1
            if stdout == subprocess.PIPE:
                output, out = os.pipe()
                stack.callback(os.close, out)
            elif stdout is not None:
                out = stdout if isinstance(stdout, int) else stdout.fileno()
            inherited = [each.fileno() for each in sockets]
            descriptors = array.array("i", [stdin, out, 2, *inherited])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            with _subreaper():
                self._socket.sendmsg([pickle.dumps((os.getpid(), os.getcwd(), inherited))], rights)
                pid = int(self._socket.recv(16))
        child = _popen(pid, lifeline, output)
        data = pickle.dumps(call)
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(process._LENGTH.pack(len(data)) + data)
            child.stdin.flush()
        return child


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Make this process the parent of descendants whose parent ends."""
    libc = ctypes.CDLL(None)
    libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _popen(pid: int, stdin: int, stdout: int | None) -> subprocess.Popen[bytes]:
    """Return the `Popen` of a child that something else has started."""
    child: Any = subprocess.Popen.__new__(subprocess.Popen)
    child._waitpid_lock = threading.Lock()
    child._child_created, child._input, child._communication_started = True, None, False
    child._sigint_wait_secs, child._closed_child_pipe_fds = 0.25, True
    child.args, child.pid, child.returncode = ["fork"], pid, None
    child.stdin = os.fdopen(stdin, "wb")
    child.stdout = None if stdout is None else os.fdopen(stdout, "rb")
    child.stderr, child.text_mode, child.encoding, child.errors, child.pipesize = None, None, None, None, -1
    return child


def _serve(connection: socket.socket) -> bool:
    """Fork for each request; return True in a child, and False in this process when the tests have ended."""
    connection.send(b"ready")
    while True:
        data, rights, _, _ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(64 * 4))
        if not data:
            return False
        descriptors = array.array("i")
        for _, _, bytes_ in rights:
            descriptors.frombytes(bytes_[: len(bytes_) - len(bytes_) % descriptors.itemsize])
        answer, ours = os.pipe()
        middle = os.fork()
        if not middle:
            middle, pid = os.getpid(), os.fork()
            if not pid:
                connection.close()
                _become(descriptors.tolist(), middle, *pickle.loads(data))
                return True
            os.write(ours, str(pid).encode())
            os._exit(0)  # the tests' process becomes the parent
        for each in (*descriptors, ours):
            os.close(each)
        os.waitpid(middle, 0)
        connection.send(os.read(answer, 16))
        os.close(answer)


def _become(descriptors: list[int], middle: int, parent: int, folder: str, inherited: list[int]) -> None:
    """Be what `subprocess.Popen` would have started."""
    while os.getppid() == middle:
        time.sleep(0.001)
    if os.getppid() != parent:
        os._exit(process.LIFELINE_EXIT_CODE)
    os.setpgid(0, 0)
    os.chdir(folder)
    # First out of the way: a descriptor's own number may be the wanted number of another.
    high = [os.dup2(each, 512 + i) for i, each in enumerate(descriptors)]
    for each in descriptors:
        os.close(each)
    for each, number in zip(high, (0, 1, 2, *inherited), strict=True):
        os.dup2(each, number)
        os.close(each)


def _load_compiled() -> None:
    """Load the machine code that numba's caches have: every child would load what it needs of it again."""
    modules = [module for name, module in sys.modules.items() if name.startswith("expertwire.")]
    dispatchers = {each for module in modules for each in vars(module).values() if isinstance(each, Dispatcher)}
    for each in dispatchers:
        target = each.targetctx.codegen().magic_tuple()
        if each.targetoptions.get("no_cpython_wrapper") or not each._can_compile or isinstance(each._cache, NullCache):
            continue
        for signature, made_for, _ in each._cache._cache_file._load_index():
            if made_for == target:
                each.compile(signature)


if __name__ == "__main__":
    for name in _MODULES:
        __import__(name)
    registry.cpu()  # imports the kernels and loads those whose signatures are declared
    _load_compiled()
    gc.freeze()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has only one of the threads"
    with socket.socket(fileno=int(sys.argv[1])) as ours:
        is_child = _serve(ours)
    if is_child:
        process._main()
        # As an interpreter ends, without taking all modules apart, which would copy most of the memory.
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
