"""A server as a black box: what /proc says of its processes, and what they listen on."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

_SAMPLE_S = 0.25
_LISTENING = "0A"  # state of a TCP socket in /proc/net/tcp
_ACCEPTS = 0x10000  # flag of a listening unix socket in /proc/net/unix


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The resources that the server's processes hold.

    Attributes:
        front_mib: memory of all processes but the ranks, without what they share with others.
        ranks_mib: memory of the ranks, likewise.
        descriptors: open descriptors of all processes.
        processes: how many there are.
    """

    front_mib: float
    ranks_mib: float
    descriptors: int
    processes: int


class Target:
    """A server that runs.

    Args:
        address: host and port of the service.
        pid: of the process that was started.
    """

    def __init__(self, address: str, pid: int) -> None:
        self.address = address
        self.port = int(address.rpartition(":")[2])
        self.process = psutil.Process(pid)
        self._roles = {self.process: "parent"}

    def family(self) -> list[psutil.Process]:
        """Return the processes that run now, the started one first."""
        try:
            found = [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        for process in found:
            if process not in self._roles or self._roles[process] == "starting":
                self._roles[process] = self._role_of(process)
        return found

    def with_role(self, role: str) -> list[psutil.Process]:
        """Return the processes that are the "parent", a "front", the "controller", a "rank", or something "other"."""
        return [process for process in self.family() if self._roles[process] == role]

    def sample(self) -> Sample:
        """Return what the processes hold now."""
        front = ranks = 0.0
        descriptors = processes = 0
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                memory = process.memory_info()
                mib = (memory.rss - memory.shared) / 2**20
                descriptors += process.num_fds()
                processes += 1
                if self._roles[process] == "rank":
                    ranks += mib
                else:
                    front += mib
        return Sample(front_mib=front, ranks_mib=ranks, descriptors=descriptors, processes=processes)

    def listeners(self) -> list[tuple[str, socket.AddressFamily, str | tuple[str, int]]]:
        """Return the sockets on which the server's processes listen: role of the process, family, address."""
        roles = {}
        for process in self.family():
            with contextlib.suppress(OSError):
                for link in Path(f"/proc/{process.pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        roles[str(link.readlink())] = self._roles[process]
        found = [(f"socket:[{inode}]", family, where) for inode, family, where in _all_listeners(self.process.pid)]
        return [(roles[link], family, where) for link, family, where in found if link in roles]

    def _role_of(self, process: psutil.Process) -> str:
        """Tell a process by the libraries that it has loaded."""
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
        except OSError:
            return "other"
        if "libtorch" in maps:
            return "rank"
        if "llvmlite" in maps:
            return "controller"
        if "cygrpc" in maps:
            return "front"
        return "starting" if time.time() - process.create_time() < 5 else "other"


class Watch:
    """Samples of a server by a thread; the largest of each figure."""

    def __init__(self, server: Target) -> None:
        self.samples = [server.sample()]
        self._server = server
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def peak(self) -> Sample:
        """Return the largest value of each figure."""
        names = Sample.__dataclass_fields__
        return Sample(**{name: max(getattr(sample, name) for sample in self.samples) for name in names})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(_SAMPLE_S):
            self.samples.append(self._server.sample())


def _all_listeners(pid: int) -> Iterator[tuple[str, socket.AddressFamily, str | tuple[str, int]]]:
    """Yield inode, family and address of the listening sockets in the network namespace of a process."""
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in _lines(pid, name):
            fields = line.split()
            if fields[3] == _LISTENING:
                digits, _, port = fields[1].partition(":")
                words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
                yield fields[9], family, (socket.inet_ntop(family, b"".join(words)), int(port, 16))
    for line in _lines(pid, "unix"):
        fields = line.split()
        if int(fields[3], 16) & _ACCEPTS and len(fields) == 8:
            path = fields[7]
            yield fields[6], socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path


def _lines(pid: int, name: str) -> list[str]:
    file = Path(f"/proc/{pid}/net/{name}")
    return file.read_text().splitlines()[1:] if file.exists() else []
