"""The controller's connections to frontends.

A connection is one end of a socket pair, which the process that starts the engine makes and sends to the controller over an
inherited socket, so no stranger can connect. A frontend that reads slowly is never dropped: what waits for it is bounded by the
credit of its requests (`messages.Credit`).
"""

from __future__ import annotations

import array
import contextlib
import selectors
import socket
import time
from collections.abc import Iterable
from typing import NamedTuple

from expertwire.comm.control.channel import ChannelClosed, SocketChannel
from expertwire.engine import messages

BEAT_S = 0.5  # time between `messages.Beat`
_BATCH = 64  # messages of one frontend that are handled between two steps


def send_connection(to_controller: socket.socket) -> socket.socket:
    """Make a socket pair, send one end to the controller, and return the other.

    Raises:
        OSError: the controller has ended.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(to_controller, [b"+"], [theirs.fileno()])
    return ours


class Event(NamedTuple):
    """A message of the frontend with this number; None: its connection has ended."""

    number: int
    message: messages.Message | None


class FrontendHub:
    """Channels to frontends, by a number that is never used again.

    Args:
        newcomers: socket over which `send_connection` sends connections.
    """

    def __init__(self, newcomers: socket.socket) -> None:
        newcomers.setblocking(False)
        self._newcomers = newcomers
        self._channels: dict[int, SocketChannel] = {}
        self._watching: set[int] = set()  # frontends that asked for beats
        self._writing: set[int] = set()  # frontends with unsent data
        self._unread: set[int] = set()  # frontends with messages left by the last `poll`
        self._ended: list[int] = []
        self._next = 0
        self._last_beat, self._problem = 0.0, ""
        self._selector = selectors.DefaultSelector()
        self._selector.register(newcomers, selectors.EVENT_READ)

    def watch(self, descriptors: Iterable[int]) -> None:
        """Let `poll` also wake up when one of these descriptors of others becomes readable."""
        for descriptor in descriptors:
            self._selector.register(descriptor, selectors.EVENT_READ)

    def poll(self, timeout_s: float | None) -> tuple[list[Event], bool]:
        """Return what has arrived, and whether a watched descriptor is readable; wait up to `timeout_s` for something.

        With a frontend that watches the engine, it waits no longer than until the next beat.
        """
        if self._unread or self._ended:
            timeout_s = 0.0
        elif self._watching:
            until_beat = max(0.0, self._last_beat + BEAT_S - time.monotonic())
            timeout_s = until_beat if timeout_s is None else min(timeout_s, until_beat)
        numbers, self._unread, others = self._unread, set(), False
        for key, ready in self._selector.select(timeout_s):
            if key.fileobj is self._newcomers:
                self._accept()
            elif key.data is None:
                others = True
            else:
                if ready & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if ready & selectors.EVENT_READ:
                    numbers.add(key.data)
        events = [event for number in sorted(numbers) for event in self._receive(number)]
        ended, self._ended = self._ended, []
        return events + [Event(number, None) for number in ended], others

    def send(self, number: int, message: messages.Message) -> None:
        """Send a message, or queue it; without effect if the frontend has gone."""
        channel = self._channels.get(number)
        if channel is None:
            return
        try:
            if isinstance(message, messages.Welcome) and message.beats:
                self._watching.add(number)
            channel.send(messages.encode(message))
        except ChannelClosed:
            self.drop(number)
            return
        if channel.pending and number not in self._writing:
            self._writing.add(number)
            self._selector.modify(channel.fileno(), selectors.EVENT_READ | selectors.EVENT_WRITE, number)

    def broadcast(self, message: messages.Message) -> None:
        """Send a message to every frontend."""
        for number in list(self._channels):
            self.send(number, message)

    def beat(self, problem: str) -> None:
        """Tell the frontends that watch the engine that the controller works, when it is time or `problem` has changed.

        Args:
            problem: why the engine cannot serve at the moment, or "".
        """
        now = time.monotonic()
        if now < self._last_beat + BEAT_S and problem == self._problem:
            return
        self._last_beat, self._problem = now, problem
        for number in list(self._watching):
            self.send(number, messages.Beat(problem=problem))

    def drop(self, number: int) -> None:
        """Close a connection, if it is open; this `poll` or the next reports its end."""
        channel = self._channels.pop(number, None)
        if channel is None:
            return
        self._selector.unregister(channel.fileno())
        channel.close()
        for numbers in (self._watching, self._writing, self._unread):
            numbers.discard(number)
        self._ended.append(number)

    def close(self) -> None:
        """Close every connection, after trying to send what is unsent. Idempotent."""
        for channel in self._channels.values():
            with contextlib.suppress(ChannelClosed):
                channel.drain(1.0)
            channel.close()
        self._channels.clear()
        self._selector.close()
        self._newcomers.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data, descriptors, _, _ = socket.recv_fds(self._newcomers, 64, 64)
            if not data:  # the parent has closed its end; no frontend can follow
                self._selector.unregister(self._newcomers)
            for descriptor in array.array("i", descriptors):
                channel = SocketChannel(socket.socket(fileno=descriptor), max_pending=None)
                self._channels[self._next] = channel
                self._selector.register(channel.fileno(), selectors.EVENT_READ, self._next)
                self._next += 1

    def _receive(self, number: int) -> list[Event]:
        events: list[Event] = []
        channel = self._channels.get(number)
        if channel is None:  # its end was noticed while something was sent to it
            return events
        try:
            for _ in range(_BATCH):
                arrays = channel.recv(0)
                if arrays is None:
                    return events
                events.append(Event(number, messages.decode(arrays)))
            self._unread.add(number)
        except (ChannelClosed, ValueError):
            self.drop(number)
        return events

    def _flush(self, number: int) -> None:
        channel = self._channels[number]
        try:
            if channel.flush():
                self._writing.discard(number)
                self._selector.modify(channel.fileno(), selectors.EVENT_READ, number)
        except ChannelClosed:
            self.drop(number)
