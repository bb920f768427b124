"""Another user of the machine, who has no token: connections to whatever the server's processes listen on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import time
from typing import Any

from expertwire.bench.attacks.attack import Attack
from expertwire.bench.attacks.target import Target

_HELD = 4_000  # most open sockets of a thread; one more closes the oldest
_THREADS = 4  # that connect to each address


def describe(role: str, family: socket.AddressFamily, where: str | tuple[str, int]) -> str:
    """Return a text such as "controller abstract unix socket" or "rank tcp 0.0.0.0"; ports and names differ in every run."""
    if isinstance(where, str):
        return f"{role} {'abstract unix socket' if where.startswith(chr(0)) else 'unix socket'}"
    return f"{role} tcp {where[0]}"


def is_loopback(where: str | tuple[str, int]) -> bool:
    """Return whether an address is of this machine alone."""
    if isinstance(where, str):
        return True
    address = ipaddress.ip_address(where[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


async def run(server: Target, seconds: float, *, unix: bool) -> dict[str, Any]:
    """Connect to all unix sockets, or to all ports but the service's, as often as possible."""
    listeners = server.listeners()
    seen = {"listeners": sorted({describe(*each) for each in listeners})}
    seen["beyond_loopback"] = sorted({describe(*each) for each in listeners if not is_loopback(each[2])})
    targets = [
        (family, where)
        for _, family, where in listeners
        if (family == socket.AF_UNIX) == unix and (isinstance(where, str) or where[1] != server.port)
    ]
    if not targets:
        await asyncio.sleep(seconds)  # beside others it must not begin again and again
    counts = await asyncio.gather(*(asyncio.to_thread(_storm, *target, seconds) for target in targets * _THREADS))
    return {**seen, "targets": len(targets), "connections": sum(counts)}


def _storm(family: socket.AddressFamily, where: str | tuple[str, int], seconds: float) -> int:
    """Connect for some seconds; return how often it worked."""
    if not isinstance(where, str) and ipaddress.ip_address(where[0]).is_unspecified:
        where = ("127.0.0.1" if family == socket.AF_INET else "::1", where[1])
    held: list[socket.socket] = []
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.settimeout(0.5)
        try:
            sock.connect(where)
        except OSError:
            sock.close()
            time.sleep(0.05)
            continue
        count += 1
        held.append(sock)
        if len(held) > _HELD:
            held.pop(0).close()
    for sock in held:
        with contextlib.suppress(OSError):
            sock.close()
    return count


ATTACKS = (
    Attack(
        name="control_socket",
        about="connections to the unix sockets of the server's processes",
        run=functools.partial(run, unix=True),
        seconds=8.0,
    ),
    Attack(
        name="internal_ports",
        about="connections to their other TCP ports, with 1,024 descriptors a process",
        run=functools.partial(run, unix=False),
        seconds=15.0,
        descriptors=1024,
    ),
)
