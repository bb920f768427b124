"""Two "hosts" on one machine: namespaces of network, processes and mounts, connected by a virtual cable.

They share no memory, local sockets or processes. A host ends, with everything that runs on it, when its first process is
killed. Needs root and Linux namespaces; `why_not()` returns what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_ISOLATE = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc")
_SETUP = "mount -t tmpfs tmpfs /dev/shm && mkdir -p /tmp/ray && mount -t tmpfs tmpfs /tmp/ray && ip link set lo up && hostname"


@dataclass(frozen=True)
class Host:
    """A host.

    Args:
        ip: its address on the cable.
        init: process id of its first process, seen from outside.
    """

    ip: str
    init: int

    def popen(self, *command: str, env: Mapping[str, str] | None = None, **options: object) -> subprocess.Popen:
        """Start a command on this host, with this Python's environment first in the path and `env` added."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        enter = ("nsenter", "--target", str(self.init), "--all", "--wd=" + os.getcwd())
        return subprocess.Popen([*enter, *command], env=os.environ | {"PATH": path} | dict(env or {}), **options)

    def run(self, *command: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> tuple[int, str]:
        """Run a command on this host; return its exit code and output."""
        process = self.popen(*command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said, _ = process.communicate(timeout=timeout)
        return process.returncode, said


@functools.cache
def why_not() -> str:
    """Return why this machine cannot have two hosts; "" if it can."""
    for tool in ("unshare", "nsenter", "ip", "mount"):
        if not shutil.which(tool):
            return f"no {tool} on this machine"
    trial = subprocess.run([*_ISOLATE, "sh", "-c", _SETUP], capture_output=True, text=True)
    return "" if trial.returncode == 0 else f"namespaces are not allowed here: {trial.stderr.strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield hosts 10.213.0.1 and 10.213.0.2."""
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_host(name)) for name in ("first", "second"))
        cable = f"ip link add cable netns {first} type veth peer name cable netns {second}"
        subprocess.run(cable.split(), check=True)
        hosts = Host("10.213.0.1", first), Host("10.213.0.2", second)
        for host in hosts:
            route = "ip link set cable up && ip route add default dev cable"
            code, said = host.run("sh", "-c", f"ip address add {host.ip}/24 dev cable && {route}")
            assert code == 0, said
        yield hosts


@contextlib.contextmanager
def _host(name: str) -> Iterator[int]:
    # A shell that waits is a first process that also reaps orphans, as a host's should.
    command = f"{_SETUP} {name} && echo ready && sleep infinity & wait"
    process = subprocess.Popen([*_ISOLATE, "bash", "-c", command], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n", "the host did not start"
        # unshare's child is the first process inside.
        yield int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
