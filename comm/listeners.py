"""Listening sockets that libraries open and keep, though nobody has to connect any more.

Gloo listens for as long as its device lives and accepts whoever connects: strangers can exhaust a process's descriptors, which
ends it. The kernel drops packets to such a socket once it has a filter that takes none; connections that exist have sockets of
their own. See socket(7), SO_ATTACH_FILTER.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")
_SO_ATTACH_FILTER = 26
_one_at_a_time = threading.Lock()
_TAKE_NOTHING = struct.pack("=HBBI", 0x06, 0, 0, 0)  # struct sock_filter: BPF_RET | BPF_K, 0 bytes


@contextlib.contextmanager
def opened() -> Iterator[set[int]]:
    """Yield a set that has, at the end, the descriptors of the TCP listeners that were opened meanwhile."""
    found: set[int] = set()
    with _one_at_a_time:  # ranks may be threads of a process
        before = _listening()
        yield found
        found |= _listening() - before


def _listening() -> frozenset[int]:
    """Return the descriptors of this process that listen on TCP; none where the system does not list descriptors (macOS)."""
    if not _DESCRIPTORS.is_dir():
        return frozenset()
    return frozenset(descriptor for name in os.listdir(_DESCRIPTORS) if _listens(descriptor := int(name)))


def refuse_connections(descriptors: Iterable[int]) -> None:
    """Let these listening sockets accept no further connections; open ones stay open. Linux only."""
    instructions = ctypes.create_string_buffer(_TAKE_NOTHING)
    program = struct.pack("HL", 1, ctypes.addressof(instructions))  # struct sock_fprog
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _listens(descriptor: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return False
        copy = os.dup(descriptor)
    except OSError:  # it is closed meanwhile
        return False
    with socket.socket(fileno=copy) as each:
        is_tcp = each.family in (socket.AF_INET, socket.AF_INET6) and each.type == socket.SOCK_STREAM
        return is_tcp and bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
