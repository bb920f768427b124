"""A rank's side of the control channel; `comm.control.hub` describes the ways that messages take."""

from __future__ import annotations

import contextlib
import secrets
import select
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from expertwire.comm.control.codec import unpack
from expertwire.comm.control.connections import Listener, connect
from expertwire.comm.control.errors import BEAT, ERROR, ChannelClosed
from expertwire.comm.control.socket_channel import SocketChannel

_JOIN_S = 60.0  # for the peers to do their part once all ranks have said hello
_DRAIN_S = 60.0  # for a peer to read on in the middle of a message
_POLL_S = 0.05
_BEAT_S = 0.5
_BEAT = {BEAT: np.zeros(0, np.uint8)}


class ControlLink:
    """A rank's connection to the controller.

    The first `recv` completes the joining, which needs every rank, so a rank calls it as soon as it is ready for plans.

    Args:
        address: the hub's.
        token: shared secret.
        rank: this rank.
        node: id of this host (`this_node()`).
        hello: what the hub's `wait_joined` returns for this rank.

    Attributes:
        local_ip: address of this host as the controller sees it.
        folder: the folder of the hub's unix socket, which only this user can enter; None for another kind of address.

    Raises:
        OSError: nobody listens at `address`, or it does not know the token.
    """

    def __init__(self, address: str, token: str, *, rank: int, node: str, hello: Mapping[str, np.ndarray]) -> None:
        self._rank = rank
        self._token = token
        self._hub = connect(address, token, timeout_s=_JOIN_S)
        self.local_ip = self._hub.local_ip
        kind, _, path = address.partition(":")
        self.folder = Path(path).parent if kind == "unix" and path.startswith("/") else None
        name = f"unix:@expertwire-{secrets.token_hex(8)}" if sys.platform == "linux" else "tcp:127.0.0.1:0"
        self._listener = Listener(name, token)  # for the other ranks of this node, if this one forwards plans
        self._plans: SocketChannel | None = None  # the hub, or the rank of this node that forwards
        self._followers: list[SocketChannel] = []
        self._frames: deque[bytearray] = deque()
        self._next_beat = 0.0
        self._poller = select.poll()
        reserved = {
            "_rank": np.array([rank]),
            "_node": np.frombuffer(node.encode(), np.uint8),
            "_address": np.frombuffer(self._listener.address.encode(), np.uint8),
        }
        self._hub.send({**hello, **reserved})

    def recv(self, timeout_s: float | None = None) -> dict[str, np.ndarray] | None:
        """Return the next plan, or None after `timeout_s` seconds (None: wait for ever).

        Raises:
            ChannelClosed: the controller is gone, or refused this rank.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._plans is None and not self._join(timeout_s):
            return None
        while not self._frames:
            self.beat()
            remaining = None if deadline is None else max(0.0, deadline - time.monotonic())
            wait_s = _BEAT_S if remaining is None else min(remaining, _BEAT_S)
            events = self._poller.poll(wait_s * 1000)
            if not events and wait_s == remaining:
                return None
            self._read(events)
        message = self._frames.popleft()
        # Forwarded before this rank computes: its all-to-all waits for the others.
        for follower in self._followers:
            with contextlib.suppress(ChannelClosed):  # the hub notices a lost rank
                follower.send_frame(message)
        for follower in self._followers:
            with contextlib.suppress(ChannelClosed):
                follower.drain(_DRAIN_S)
        return unpack(message)

    def send(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Answer the controller; only after a first `recv`.

        Raises:
            ChannelClosed: the controller is gone.
        """
        assert self._plans, f"rank {self._rank} answers before it has joined"
        self._hub.send(arrays)
        self._hub.drain(_DRAIN_S)

    def beat(self) -> None:
        """Tell the controller that this rank works, at most every half second; the loop that works calls it often.

        Raises:
            ChannelClosed: the controller is gone.
        """
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + _BEAT_S
            self._hub.send(_BEAT)

    def fail(self, message: str, **details: np.ndarray) -> None:
        """Report a failure, so that the controller does not wait for the others. Raise `ChannelClosed` as `send`."""
        self.send({ERROR: np.frombuffer(message.encode(), np.uint8), **details})

    def close(self) -> None:
        """Close all connections; the controller then raises `RankLost`. Idempotent."""
        self._listener.close()
        for channel in (self._hub, self._plans, *self._followers):
            if channel:
                channel.close()

    def _join(self, timeout_s: float | None) -> bool:
        """Connect as the hub's welcome message says; return False if none came within `timeout_s`."""
        try:
            welcome = self._hub.recv(timeout_s)
        except ChannelClosed as error:
            raise ChannelClosed(f"the controller ended the connection: {error}") from error
        if welcome is None:
            return False
        leader = bytes(welcome["leader"]).decode()
        self._plans = connect(leader, self._token) if leader else self._hub
        self._accept_followers(int(welcome["num_followers"][0]))
        for channel in {self._hub, self._plans}:
            self._poller.register(channel.fileno(), select.POLLIN)
        self._hub.send({"ready": np.array([self._rank])})
        return True

    def _accept_followers(self, count: int) -> None:
        deadline = time.monotonic() + _JOIN_S
        while len(self._followers) < count:
            self._check_hub()
            if time.monotonic() > deadline:
                raise ChannelClosed(f"{count - len(self._followers)} ranks of this node did not connect in time")
            if channel := self._listener.accept(_POLL_S):
                self._followers.append(channel)
        self._listener.close()

    def _check_hub(self) -> None:
        """Raise `ChannelClosed` if the hub has ended; nothing else can come from it at this time."""
        frames = self._hub.ready_frames()
        assert not frames, f"{len(frames)} early messages"

    def _read(self, events: list[tuple[int, int]]) -> None:
        assert self._plans
        for descriptor, _ in events:
            if descriptor != self._plans.fileno():
                self._check_hub()
                continue
            try:
                self._frames += self._plans.ready_frames()
            except ChannelClosed:
                if self._plans is not self._hub:
                    # The rank that forwards plans is gone. If this rank left at once, the hub might
                    # see its end first and report the wrong rank.
                    self._hub.recv_frame(_JOIN_S)
                raise
