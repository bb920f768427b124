"""Connections between processes that share a token, over unix and TCP sockets.

Addresses are strings: `unix:/path`, `unix:@name` (Linux's abstract names: nothing in the file system, private
to a network namespace) and `tcp:host:port` (port 0 picks a free one). A connection starts with a handshake by which
both sides prove that they know the shared token, and which cannot be replayed (HMAC-SHA256 over a nonce of each
side, as in SCRAM, RFC 5802, without its salting of passwords, because the token is random):

    listener: magic, nonce    client: nonce, HMAC("client", both nonces)    listener: HMAC("listener", both nonces)

Then it is a `SocketChannel`. At a unix socket the listener also refuses peers of other users.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import time
from pathlib import Path

from expertwire.comm.control.socket_channel import SocketChannel

_MAGIC = b"xpwire02"
_NONCE_BYTES = _MAC_BYTES = hashlib.sha256().digest_size
_HANDSHAKE_S = 10.0  # a connection that has not proved itself is dropped after this time
_UCRED = struct.Struct("3i")  # process, user and group of a unix socket's peer, `struct ucred` of Linux
_MAX_UNVERIFIED = 128


class _Handshake:
    """A connection that has not proved that it knows the token."""

    def __init__(self, nonce: bytes) -> None:
        self.deadline = time.monotonic() + _HANDSHAKE_S
        self.nonce = nonce
        self.received = bytearray()


class Listener:
    """Accept connections of peers that know the token; drop the others.

    Attributes:
        address: where it listens, with the chosen port.

    Raises:
        ValueError: the address is malformed.
        OSError: it is in use or not of this host; the message names it.
    """

    def __init__(self, address: str, token: str) -> None:
        self._token = token.encode()
        self._sock, self._path = _bind(address)
        self.address = _address_of(self._sock, address)
        self._unverified: dict[socket.socket, _Handshake] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._sock, selectors.EVENT_READ)

    def accept(self, timeout_s: float | None) -> SocketChannel | None:
        """Return the next connection that has shown the token, or None after `timeout_s` seconds (None: wait for ever).

        A select() loop watches `fileno()` and calls `accept(0)` until it returns None.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            events = self._selector.select(remaining)
            for key, _ in events:
                if key.fileobj is self._sock:
                    self._accept_new()
                elif channel := self._check(key.data):
                    return channel
            self._drop_expired()
            if not events and remaining == 0.0:
                return None

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `accept(0)` has something to do."""
        return self._selector.fileno()

    def close(self) -> None:
        """Stop listening and drop the connections that have not shown the token. Idempotent."""
        for sock in list(self._unverified):
            self._drop(sock)
        self._selector.close()
        self._sock.close()
        if self._path:
            self._path.unlink(missing_ok=True)
            self._path = None

    def _accept_new(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._sock.accept()
                sock.setblocking(False)
                nonce = secrets.token_bytes(_NONCE_BYTES)
                if not _is_own_user(sock) or not _sent_at_once(sock, _MAGIC + nonce):
                    sock.close()
                    continue
                self._unverified[sock] = _Handshake(nonce)
                self._selector.register(sock, selectors.EVENT_READ, sock)

    def _check(self, sock: socket.socket) -> SocketChannel | None:
        handshake, length = self._unverified[sock], _NONCE_BYTES + _MAC_BYTES
        try:
            data = sock.recv(length - len(handshake.received))
        except OSError:
            data = b""
        handshake.received += data
        if data and len(handshake.received) < length:
            return None
        theirs, proof = bytes(handshake.received[:_NONCE_BYTES]), bytes(handshake.received[_NONCE_BYTES:])
        if not hmac.compare_digest(proof, _proof(self._token, b"client", handshake.nonce, theirs)):
            self._drop(sock)
            return None
        if not _sent_at_once(sock, _proof(self._token, b"listener", handshake.nonce, theirs)):
            self._drop(sock)
            return None
        self._selector.unregister(sock)
        del self._unverified[sock]
        _tune(sock)
        return SocketChannel(sock)

    def _drop_expired(self) -> None:
        now = time.monotonic()
        too_many = len(self._unverified) - _MAX_UNVERIFIED
        for index, (sock, handshake) in enumerate(list(self._unverified.items())):
            if index < too_many or now > handshake.deadline:
                self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._unverified[sock]
        sock.close()


def connect(address: str, token: str, *, timeout_s: float = 10.0) -> SocketChannel:
    """Connect to a listener, which must be accepting meanwhile.

    Raises:
        ValueError: the address is malformed.
        OSError: nobody listens there, the listener has another token, or it is another program; the message names the address.
    """
    family, where, _ = _parse_address(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(where)
        magic, theirs = _read_exactly(sock, len(_MAGIC)), _read_exactly(sock, _NONCE_BYTES)
        if magic != _MAGIC:
            raise OSError(0, "it is another program or version")
        ours, secret = secrets.token_bytes(_NONCE_BYTES), token.encode()
        sock.sendall(ours + _proof(secret, b"client", theirs, ours))
        if not hmac.compare_digest(_read_exactly(sock, _MAC_BYTES), _proof(secret, b"listener", theirs, ours)):
            raise OSError(0, "it does not know the token")
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot connect to {address}: {error.strerror or error}") from error
    _tune(sock)
    return SocketChannel(sock)


def _proof(token: bytes, side: bytes, listener_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(token, side + listener_nonce + client_nonce, "sha256")


def _read_exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise OSError(0, "it closed the connection (another token)")
        data += more
    return data


def _sent_at_once(sock: socket.socket, data: bytes) -> bool:
    """Send a few bytes on a new connection, whose buffer is empty; return whether it worked."""
    try:
        return sock.send(data) == len(data)
    except OSError:
        return False


def _is_own_user(sock: socket.socket) -> bool:
    """Return whether the peer is a process of this user, or root's; True where the kernel cannot tell."""
    if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return user in (os.getuid(), 0)


def _parse_address(address: str) -> tuple[socket.AddressFamily, str | tuple[str, int], Path | None]:
    """Return the family, the socket module's address, and the path in the file system if there is one."""
    kind, _, where = address.partition(":")
    if kind == "unix" and where.startswith("@") and len(where) > 1:
        return socket.AF_UNIX, "\0" + where[1:], None
    if kind == "unix" and where.strip("@"):
        if len(where.encode()) > 107:
            raise ValueError(f"address {address!r}: a unix socket's path has at most 107 bytes")
        return socket.AF_UNIX, where, Path(where)
    host, _, port = where.rpartition(":")
    if kind == "tcp" and host and port.isdecimal() and int(port) < 65536:
        host = host.removeprefix("[").removesuffix("]")
        return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port)), None
    raise ValueError(f"address {address!r}: allowed are unix:/path, unix:@name and tcp:host:port")


def _bind(address: str) -> tuple[socket.socket, Path | None]:
    family, where, path = _parse_address(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        if path:
            path.chmod(0o600)
        sock.listen(512)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on {address}: {error.strerror or error}") from error
    return sock, path


def _address_of(sock: socket.socket, asked: str) -> str:
    if sock.family == socket.AF_UNIX:
        return asked
    host, _, _ = asked.removeprefix("tcp:").rpartition(":")
    return f"tcp:{host}:{sock.getsockname()[1]}"


def _tune(sock: socket.socket) -> None:
    """Send small messages at once, and notice within about ten seconds that a host is gone."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # No TCP_USER_TIMEOUT: it would also end a connection to a rank that computes for long with its receive window full.
    options = (("TCP_KEEPIDLE", 4), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3))
    for name, value in options:
        if hasattr(socket, name):  # Linux has them all
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
