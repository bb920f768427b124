"""Guard process that ends the Ray of a driver on this machine once the driver has gone.

When a driver is killed, most of its Ray dies with it, but some of Ray's agents stay for a minute. The driver runs this module as
a process and keeps its standard input open. The children of a raylet are recognised by the raylet's log, which they inherit
open, and by their titles, which begin with `ray::`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

_PARENT_CHECK_S = 1.0


def start(raylet_pid: int) -> subprocess.Popen[bytes]:
    """Start a guard of the Ray of this raylet; it acts on `stop`, or when this process ends. Linux only."""
    log = os.readlink(f"/proc/{raylet_pid}/fd/1")
    command = [sys.executable, "-P", "-m", "expertwire.deploy.ray.guard", log]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def stop(guard: subprocess.Popen[bytes]) -> None:
    """End the guarded Ray's processes and the guard."""
    assert guard.stdin
    guard.stdin.close()
    guard.wait()


def _main(log: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    # A fork of the driver may hold the other end of the pipe longer than the driver lives.
    while os.getppid() == parent and not select.select([sys.stdin], [], [], _PARENT_CHECK_S)[0]:
        pass
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            is_ray = (process / "comm").read_text().startswith("ray::")
            if is_ray and log in map(os.readlink, (process / "fd").iterdir()):
                os.kill(int(process.name), signal.SIGKILL)


if __name__ == "__main__":
    _main(sys.argv[1])
