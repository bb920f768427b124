"""A rank's side of the control channel; `comm.control.hub` says which way messages travel."""

from __future__ import annotations

import select
import time
from collections.abc import Mapping

import numpy as np

from expertwire.comm.control.node import Inbox, NodeSender, RingOutbox, SocketInbox, attach, wait
from expertwire.comm.control.socket_channel import connect
from expertwire.comm.control.wire import ERROR, ChannelClosed, pack, unpack

_JOIN_S = 60.0  # for the peers to do their part once all ranks have said hello
_DRAIN_S = 60.0  # for a peer to read on in the middle of a message
_FOREVER_S = 1e9


class ControlLink:
    """A rank's connection to the controller.

    The first `recv` completes the joining, which needs every rank: so a rank calls it as soon as it is ready for plans.

    Args:
        address: the hub's.
        token: shared secret.
        rank: this rank.
        node: id of this host (`this_node()`).
        hello: what the hub's `wait_joined` returns for this rank.

    Attributes:
        local_ip: address of this host as the controller sees it.

    Raises:
        OSError: nobody listens at `address`.
    """

    def __init__(self, address: str, token: str, *, rank: int, node: str, hello: Mapping[str, np.ndarray]) -> None:
        self._rank = rank
        self._token = token
        self._hub = connect(address, token)
        self.local_ip = self._hub.local_ip
        self._relay = NodeSender(token)
        self._inbox: Inbox | None = None
        self._outbox: RingOutbox | None = None  # None: results go over the connection to the hub
        self._spin_s = 0.0
        self._poller = select.poll()
        reserved = {
            "_rank": np.array([rank]),
            "_node": np.frombuffer(node.encode(), np.uint8),
            "_address": np.frombuffer(self._relay.address.encode(), np.uint8),
        }
        self._hub.send({**hello, **reserved})

    def recv(self, timeout_s: float | None = None) -> dict[str, np.ndarray] | None:
        """The next plan, or None after `timeout_s` seconds (None: wait for ever).

        Raises:
            ChannelClosed: the controller is gone, or refused this rank.
        """
        timeout_s = _FOREVER_S if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        inbox = self._inbox or self._join(timeout_s)
        if inbox is None:
            return None
        while (message := inbox.take()) is None:
            remaining = max(0.0, deadline - time.monotonic())
            self._pump(inbox, wait(inbox.ready, [inbox], self._poller, remaining, self._spin_s))
            if not remaining and not inbox.ready():
                return None
        if self._relay.members:
            # Before this rank computes: the others of its node would wait for the plan, and this rank for them.
            self._relay.send(message)
            self._relay.drain(_DRAIN_S)
        return unpack(message)

    def send(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Answer the controller; only after a first `recv`.

        Raises:
            ChannelClosed: the controller is gone.
        """
        assert self._inbox, f"rank {self._rank} answers before it has joined"
        message = pack(arrays)
        if self._outbox:
            if self._outbox.send(message):
                raise ChannelClosed("the controller closed the connection")
            self._inbox.channel.drain(_DRAIN_S)
        else:
            self._hub.send_frame(message)
            self._hub.drain(_DRAIN_S)

    def fail(self, message: str, **details: np.ndarray) -> None:
        """Answer that this rank failed: the controller need not wait for the others. Raises `ChannelClosed`."""
        self.send({ERROR: np.frombuffer(message.encode(), np.uint8), **details})

    def close(self) -> None:
        """Leave: the controller sees a lost rank. Idempotent."""
        self._hub.close()
        self._relay.close()
        if self._outbox:
            self._outbox.close()
            self._outbox = None
        if self._inbox:
            self._inbox.close()
            self._inbox = None

    def _join(self, timeout_s: float) -> Inbox | None:
        """Take the place that the hub gives; where plans will arrive, or None if nothing was heard for `timeout_s`."""
        try:
            welcome = self._hub.recv(timeout_s)
        except ChannelClosed as error:
            raise ChannelClosed(
                f"the controller ended the connection (a wrong token, or it failed): {error}"
            ) from error
        if welcome is None:
            return None
        address = bytes(welcome["address"]).decode()
        if address:
            self._inbox, self._outbox, self._spin_s = attach(address, self._token, self._rank, _JOIN_S)
        else:
            self._inbox = SocketInbox(self._hub)
        followers = welcome["followers"].tolist()
        if followers:
            self._relay.gather(followers, results=False, deadline=time.monotonic() + _JOIN_S, poll=self._check_hub)
        else:
            self._relay.close()
        self._hub.send({"ready": np.array([self._rank])})
        if self._outbox:
            self._hub.close()  # the local connection takes its place
        else:
            self._poller.register(self._hub.fileno(), select.POLLIN)
        if self._inbox.channel is not self._hub:
            self._poller.register(self._inbox.channel.fileno(), select.POLLIN)
        return self._inbox

    def _check_hub(self) -> None:
        """Nothing can come from the hub at this time except its end."""
        frames = self._hub.ready_frames()
        assert not frames, f"{len(frames)} early messages"

    def _pump(self, inbox: Inbox, events: list[tuple[int, int]]) -> None:
        for descriptor, _ in events:
            if inbox.channel is self._hub:
                inbox.pump()
            elif descriptor == self._hub.fileno():
                self._check_hub()
            else:
                self._pump_local(inbox)

    def _pump_local(self, inbox: Inbox) -> None:
        try:
            inbox.pump()
        except ChannelClosed:
            if not self._outbox:
                # The node's first rank is gone. If this rank left now, the hub might see its end first and blame it.
                self._hub.recv_frame(_JOIN_S)
            raise
