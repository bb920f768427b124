"""One node's shared memory: plans to its ranks through one ring, results from them through a ring each.

A `NodeSender` writes for every rank of its node (in the controller, or in the first rank of a remote node, which relays). Each
member keeps one local connection to it, which serves as doorbell for a sleeping reader, as the way around a full ring, and as
proof of life. Messages carry sequence numbers, so that those in the ring and those on the connection stay in order.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from expertwire.comm.control.ring import Ring, RingReader, RingWriter
from expertwire.comm.control.socket_channel import SocketChannel, connect, listen
from expertwire.comm.control.wire import ChannelClosed, RankLost, RankTimeout

PLAN_RING_BYTES = 2 << 20
RESULT_RING_BYTES = 1 << 19
SPIN_S = 50e-6
CORES_PER_PROCESS = 4  # from here on, waiting may spin
RECHECK_S = 0.1  # a sleeper looks again after this time, whether it was woken or not
POLL_S = 0.05


class Inbox(Protocol):
    """Where one peer's messages arrive."""

    channel: SocketChannel

    def ready(self) -> bool:
        """Whether `take` has a message, without a system call."""
        ...

    def take(self) -> bytearray | None:
        """The next message, or None when it is not here yet."""
        ...

    def pump(self) -> None:
        """Read what has arrived on the connection. Raises `ChannelClosed` at its end."""
        ...

    def set_asleep(self, asleep: bool) -> None:
        """Ask the peer for a doorbell, or no longer."""
        ...

    def close(self) -> None:
        """Close the connection and unmap. Idempotent."""
        ...


class SocketInbox:
    """Messages of a peer on another node."""

    def __init__(self, channel: SocketChannel) -> None:
        self.channel = channel
        self._frames: list[bytearray] = []

    def ready(self) -> bool:
        """See `Inbox`."""
        return bool(self._frames)

    def take(self) -> bytearray | None:
        """See `Inbox`."""
        return self._frames.pop(0) if self._frames else None

    def pump(self) -> None:
        """See `Inbox`."""
        self._frames += self.channel.ready_frames()

    def set_asleep(self, asleep: bool) -> None:
        """See `Inbox`: a connection needs no doorbell."""

    def close(self) -> None:
        """See `Inbox`."""
        self.channel.close()


class RingInbox:
    """Messages of a peer on this node: from its ring, or around it."""

    def __init__(self, ring: Ring, reader: int, channel: SocketChannel) -> None:
        self.channel = channel
        self._ring = ring
        self._reader = RingReader(ring, reader)
        self._sequence = 0
        self._around: dict[int, bytearray] = {}

    def ready(self) -> bool:
        """See `Inbox`."""
        return self._reader.holds(self._sequence) or self._sequence in self._around

    def take(self) -> bytearray | None:
        """See `Inbox`."""
        if self._reader.holds(self._sequence):
            message = self._reader.read()
        elif self._sequence in self._around:
            message = self._around.pop(self._sequence)
        else:
            return None
        self._sequence += 1
        return message

    def pump(self) -> None:
        """See `Inbox`."""
        for frame in self.channel.ready_frames():
            if frame:
                self._around[int.from_bytes(frame[:8], "little")] = frame[8:]

    def set_asleep(self, asleep: bool) -> None:
        """See `Inbox`."""
        self._reader.set_asleep(asleep)

    def close(self) -> None:
        """See `Inbox`."""
        self._ring.close()
        self.channel.close()


class RingOutbox:
    """Messages to the readers of one ring."""

    def __init__(self, ring: Ring, channels: Sequence[SocketChannel]) -> None:
        self._ring = ring
        self._writer = RingWriter(ring)
        self._channels = channels
        self._sequence = 0

    def send(self, message: bytes | bytearray) -> list[int]:
        """Send to every reader without waiting; returns the readers whose connection is gone."""
        sequence = self._sequence
        self._sequence += 1
        if self._writer.try_write(sequence, message):
            return self._send_each(self._writer.wake())
        return self._send_each(range(len(self._channels)), sequence.to_bytes(8, "little"), message)

    def _send_each(self, readers: Iterable[int], *parts: bytes | bytearray) -> list[int]:
        gone = []
        for reader in readers:
            try:
                self._channels[reader].send_frame(*parts)
            except ChannelClosed:
                gone.append(reader)
        return gone

    def close(self) -> None:
        """Unmap the ring."""
        self._ring.close()


def spin_s(num_ranks: int) -> float:
    """How long to spin on a node with so many ranks: nothing where cores are few.

    There, whoever spins may keep off the core the very process it waits for: measured on 2 cores with 1-4 ranks, spinning made
    steps up to twice as long and as costly.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return SPIN_S if cores >= CORES_PER_PROCESS * (num_ranks + 1) else 0.0


def wait(
    ready: Callable[[], bool], inboxes: Sequence[Inbox], poller: select.poll, timeout_s: float, spin_s: float
) -> list[tuple[int, int]]:
    """Return when `ready`, when a connection has news, or after at most `timeout_s` (and `RECHECK_S`) seconds.

    Spins for `spin_s`, then sleeps on the connections: a writer that finds the reader's flag set rings. Returns the
    events of `poller`.
    """
    spin_until = time.perf_counter() + min(spin_s, timeout_s)
    while time.perf_counter() < spin_until:
        if ready():
            return []
        os.sched_yield()
    for inbox in inboxes:
        inbox.set_asleep(True)
    events = [] if ready() else poller.poll(max(0.0, min(timeout_s, RECHECK_S)) * 1000)
    for inbox in inboxes:
        inbox.set_asleep(False)
    return events


class NodeSender:
    """The writing side of one node. Its members are ranks; it meets them in `gather`."""

    def __init__(self, token: str) -> None:
        name = f"expertwire-{secrets.token_hex(8)}"
        self._listener = listen(f"unix:@{name}" if sys.platform == "linux" else "tcp:127.0.0.1:0", token)
        self.address = self._listener.address
        self.members: list[int] = []
        self.channels: list[SocketChannel] = []
        self._outbox: RingOutbox | None = None

    def gather(
        self, members: Sequence[int], *, results: bool, deadline: float, poll: Callable[[], None]
    ) -> dict[int, RingInbox]:
        """Let every member connect and map the rings; afterwards no file is left.

        Args:
            members: the ranks of this node.
            results: make a ring for the results of each member, and return its reading end by rank.
            deadline: `time.monotonic()`.
            poll: called every `POLL_S`; may raise.

        Raises:
            RankTimeout: members that have not come.
            RankLost: a member's connection ended.
        """
        self.members = list(members)
        by_rank = self._accept(set(members), deadline, poll)
        self.channels = [by_rank[rank] for rank in members]
        plans = Ring.create(len(members), PLAN_RING_BYTES)
        answers: dict[int, Ring] = {}
        try:
            for reader, rank in enumerate(members):
                if results:
                    answers[rank] = Ring.create(1, RESULT_RING_BYTES)
                paths = f"{plans.path}\n{answers[rank].path if results else ''}".encode()
                place = {"reader": np.array([reader, len(members)]), "paths": np.frombuffer(paths, np.uint8)}
                by_rank[rank].send(place)
            for rank in members:
                receive(by_rank[rank], rank, deadline, poll)
        finally:
            for ring in (plans, *answers.values()):
                ring.unlink()
            self._listener.close()
        self._outbox = RingOutbox(plans, self.channels)
        return {rank: RingInbox(ring, 0, by_rank[rank]) for rank, ring in answers.items()}

    def send(self, message: bytes | bytearray) -> list[int]:
        """Send to every member without waiting; returns the ranks whose connection is gone."""
        assert self._outbox is not None, "gather() comes first"
        return [self.members[reader] for reader in self._outbox.send(message)]

    def drain(self, timeout_s: float) -> None:
        """Wait until everything is on its way; a lost connection is for the hub to notice."""
        for channel in self.channels:
            if channel.pending:
                with contextlib.suppress(ChannelClosed):
                    channel.drain(timeout_s)

    def close(self) -> None:
        """Close every connection and unmap the ring. Idempotent."""
        self._listener.close()
        for channel in self.channels:
            channel.close()
        if self._outbox:
            self._outbox.close()
            self._outbox = None

    def _accept(self, missing: set[int], deadline: float, poll: Callable[[], None]) -> dict[int, SocketChannel]:
        by_rank: dict[int, SocketChannel] = {}
        while missing:
            poll()
            if time.monotonic() > deadline:
                raise RankTimeout(tuple(sorted(missing)), "did not connect to the shared memory of the node in time")
            channel = self._listener.accept(POLL_S)
            if channel:
                hello = channel.recv(timeout_s=max(0.0, deadline - time.monotonic()))
                if hello is None:
                    continue
                rank = int(hello["rank"][0])
                assert rank in missing, f"rank {rank} is none of {sorted(missing)}"
                by_rank[rank] = channel
                missing.discard(rank)
        return by_rank


def receive(channel: SocketChannel, rank: int, deadline: float, poll: Callable[[], None]) -> dict[str, np.ndarray]:
    """A rank's next message; calls `poll` (which may raise) while it waits. Raises `RankTimeout` and `RankLost`."""
    while True:
        poll()
        try:
            message = channel.recv(POLL_S)
        except ChannelClosed as error:
            raise RankLost(rank, str(error)) from error
        if message is not None:
            return message
        if time.monotonic() > deadline:
            raise RankTimeout((rank,), "did not answer in time while the ranks were being joined")


def attach(address: str, token: str, rank: int, timeout_s: float) -> tuple[RingInbox, RingOutbox | None, float]:
    """A member's side of `NodeSender.gather`.

    Returns where plans arrive, where results go (None: not through this node), and for how long to spin.

    Raises:
        ChannelClosed: the sender is gone, or silent for `timeout_s`.
    """
    channel = connect(address, token)
    channel.send({"rank": np.array([rank])})
    place = channel.recv(timeout_s)
    if place is None:
        raise ChannelClosed(f"no answer from {address} after {timeout_s:.0f} s")
    plans, answers = bytes(place["paths"]).decode().split("\n")
    reader, num_readers = place["reader"].tolist()
    inbox = RingInbox(Ring.attach(plans, num_readers), reader, channel)
    outbox = RingOutbox(Ring.attach(answers, 1), [channel]) if answers else None
    channel.send({"mapped": np.array([rank])})
    return inbox, outbox, spin_s(num_readers)
