"""A server that starts where /dev/shm is full: another user of the machine may fill it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.models import demo_model
from expertwire.bench.attacks.target import Target

_SIZE_KIB = 256
_MOUNT = f'mount -t tmpfs -o size={_SIZE_KIB}k none /dev/shm && exec "$@"'


async def run(server: Target, seconds: float) -> dict[str, Any]:
    """Start another server in a mount namespace of its own; return how it ends. Needs root."""
    serve = [sys.executable, "-m", "expertwire.deploy.cli", "serve", str(demo_model()), "--port", "0", "--ep-size", "2"]
    serve += ["--launcher", "local", "--device", "cpu"]
    process = await asyncio.create_subprocess_exec(
        "unshare",
        "--mount",
        "sh",
        "-c",
        _MOUNT,
        "sh",
        *serve,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    ended = True
    try:
        _, errors = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        ended, errors = False, b""
        process.terminate()
        await process.wait()
    lines = errors.decode(errors="replace").strip().splitlines()
    return {
        "ended": ended,
        "exit_code": process.returncode,
        "tracebacks": sum(line.startswith("Traceback") for line in lines),
        "last_line": lines[-1] if lines else "",
    }


ATTACKS = (
    Attack(
        name="full_shared_memory",
        about=f"a second server with {_SIZE_KIB} KiB of /dev/shm; needs root",
        run=run,
        seconds=60.0,
        joins=False,
    ),
)
