"""Plans from the controller to every rank, and their results back.

The controller has a `ControlHub`, every rank a `ControlLink`. A rank connects, says hello, and is told its place by node:

    on the controller's node   plans through the hub's ring, results through a ring of its own (`comm.control.node`)
    first rank of another node plans over its connection; it relays each one into its node's ring before it returns from `recv`
    other ranks there          plans from that ring
    all ranks on other nodes   results over their own connection to the hub

Some connection of every rank stays open and is watched: its end means that the rank is dead, and is noticed at once.
"""

from __future__ import annotations

import contextlib
import platform
import select
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from expertwire.comm.control.node import (
    POLL_S,
    Inbox,
    NodeSender,
    RingInbox,
    SocketInbox,
    receive,
    spin_s,
    wait,
)
from expertwire.comm.control.socket_channel import SocketChannel, listen
from expertwire.comm.control.wire import ERROR, ChannelClosed, RankError, RankLost, RankTimeout, pack, unpack


def this_node() -> str:
    """An id of this host that two processes share only if they can share memory and local sockets.

    It differs between machines, network namespaces, and mounts of /dev/shm.
    """
    if sys.platform != "linux":
        return f"{platform.node()}:{uuid.getnode()}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    network = Path("/proc/self/ns/net").stat().st_ino
    return f"{boot}:{network}:{Path('/dev/shm').stat().st_dev}"


class ControlHub:
    """The controller's side.

    Args:
        num_ranks: how many ranks will join.
        address: where to listen; `address` of the hub is what to give to the ranks.
        token: shared secret; connections without it are dropped.
        node: this host's id (`this_node()` unless given). Ranks with the same id get shared memory.
    """

    def __init__(
        self, num_ranks: int, *, address: str = "tcp:127.0.0.1:0", token: str, node: str | None = None
    ) -> None:
        self.num_ranks = num_ranks
        self._token = token
        self._node = node or this_node()
        self._listener = listen(address, token)
        self.address = self._listener.address
        self._connections: dict[int, SocketChannel] = {}
        self._inboxes: list[Inbox] = []
        self._answers: list[list[dict[str, np.ndarray]]] = [[] for _ in range(num_ranks)]
        self._leaders: list[int] = []
        self._sender: NodeSender | None = None
        self._spin_s = 0.0
        self._rank_of: dict[int, int] = {}  # by file descriptor
        self._poller = select.poll()

    def wait_joined(self, deadline_s: float, poll: Callable[[], None]) -> list[dict[str, np.ndarray]]:
        """Let every rank join; returns what each said in its hello, by rank.

        Args:
            deadline_s: seconds from now.
            poll: called regularly; may raise, for instance because a process has died.

        Raises:
            RankTimeout: names the ranks that are missing.
            RankLost: a rank's connection ended.
        """
        deadline = time.monotonic() + deadline_s
        hellos = self._meet(deadline, poll)
        nodes = {rank: bytes(hello.pop("_node")).decode() for rank, hello in hellos.items()}
        addresses = {rank: bytes(hello.pop("_address")) for rank, hello in hellos.items()}
        members: dict[str, list[int]] = {}
        for rank in range(self.num_ranks):
            members.setdefault(nodes[rank], []).append(rank)
        local = members.pop(self._node, [])
        self._leaders = [ranks[0] for ranks in members.values()]
        if local:
            self._spin_s = spin_s(len(local))
            self._sender = NodeSender(self._token)
            for rank in local:
                self._welcome(rank, address=self._sender.address.encode(), followers=[])
        for leader, *followers in members.values():
            self._welcome(leader, address=b"", followers=followers)
            for rank in followers:
                self._welcome(rank, address=addresses[leader], followers=[])
        inboxes = self._sender.gather(local, results=True, deadline=deadline, poll=poll) if self._sender else {}
        for rank in range(self.num_ranks):
            receive(self._connections[rank], rank, deadline, poll)  # "ready"
        self._watch(inboxes)
        return [hellos[rank] for rank in range(self.num_ranks)]

    def publish(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Send the same message to every rank, once per node, without waiting.

        Raises:
            RankLost: a rank's connection is gone.
        """
        message = pack(arrays)
        for leader in self._leaders:
            try:
                self._connections[leader].send_frame(message)
            except ChannelClosed as error:
                raise RankLost(leader, str(error)) from error
        lost = self._sender.send(message) if self._sender else []
        if lost:
            raise RankLost(lost[0], "its connection is gone")
        for inbox in self._inboxes:
            if inbox.channel.pending:
                self._poller.modify(inbox.channel.fileno(), select.POLLIN | select.POLLOUT)

    def collect(self, timeout_s: float) -> list[dict[str, np.ndarray]]:
        """One answer of every rank, by rank; later answers stay for the next call.

        Raises:
            RankLost: a rank's connection ended, even if others have not answered yet.
            RankError: a rank answered by `ControlLink.fail`, likewise.
            RankTimeout: names the ranks that have not answered after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self._all_answered():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                missing = tuple(rank for rank, answers in enumerate(self._answers) if not answers)
                raise RankTimeout(missing, f"did not answer within {timeout_s:g} s")
            self._pump(wait(self._all_answered, self._inboxes, self._poller, remaining, self._spin_s))
        return [answers.pop(0) for answers in self._answers]

    def poll_lost(self) -> None:
        """Look after the connections without waiting; an idle controller calls it when one of `filenos` is readable.

        Raises:
            RankLost: a rank's connection ended.
        """
        self._pump(self._poller.poll(0))

    def filenos(self) -> list[int]:
        """File descriptors that become readable when a rank dies (or sends something)."""
        return [inbox.channel.fileno() for inbox in self._inboxes]

    def close(self) -> None:
        """Close every connection, which the ranks see as the end. Idempotent."""
        self._listener.close()
        for connection in self._connections.values():
            connection.close()
        for inbox in self._inboxes:
            inbox.close()
        if self._sender:
            self._sender.close()
        self._inboxes = []

    def _meet(self, deadline: float, poll: Callable[[], None]) -> dict[int, dict[str, np.ndarray]]:
        hellos: dict[int, dict[str, np.ndarray]] = {}
        newcomers: list[SocketChannel] = []
        while len(hellos) < self.num_ranks:
            poll()
            if time.monotonic() > deadline:
                missing = tuple(rank for rank in range(self.num_ranks) if rank not in hellos)
                raise RankTimeout(missing, "did not connect to the controller in time")
            if channel := self._listener.accept(POLL_S):
                newcomers.append(channel)
            for channel in list(newcomers):
                with contextlib.suppress(ChannelClosed):
                    hello = channel.recv(0)
                    if hello is None:
                        continue
                    rank = int(hello.pop("_rank")[0])
                    assert rank in range(self.num_ranks), f"rank {rank} of {self.num_ranks}"
                    assert rank not in hellos, f"a second rank {rank}"
                    hellos[rank] = hello
                    self._connections[rank] = channel
                newcomers.remove(channel)
            for rank, channel in self._connections.items():
                try:
                    channel.ready_frames()
                except ChannelClosed as error:
                    raise RankLost(rank, str(error)) from error
        return hellos

    def _welcome(self, rank: int, *, address: bytes, followers: list[int]) -> None:
        try:
            self._connections[rank].send(
                {"address": np.frombuffer(address, np.uint8), "followers": np.array(followers, np.int64)}
            )
        except ChannelClosed as error:
            raise RankLost(rank, str(error)) from error

    def _watch(self, inboxes: Mapping[int, RingInbox]) -> None:
        """From now on one connection a rank: the local one where there is one."""
        self._listener.close()
        for rank in range(self.num_ranks):
            if rank in inboxes:
                self._connections.pop(rank).close()
                self._inboxes.append(inboxes[rank])
            else:
                self._inboxes.append(SocketInbox(self._connections[rank]))
            descriptor = self._inboxes[rank].channel.fileno()
            self._rank_of[descriptor] = rank
            self._poller.register(descriptor, select.POLLIN)

    def _all_answered(self) -> bool:
        complete = True
        for rank, (inbox, answers) in enumerate(zip(self._inboxes, self._answers, strict=True)):
            if not answers:
                message = inbox.take()
                if message is None:
                    complete = False
                    continue
                answers.append(unpack(message))
                if ERROR in answers[0]:
                    details = {name: array for name, array in answers[0].items() if name != ERROR}
                    raise RankError(rank, bytes(answers[0][ERROR]).decode(), details)
        return complete

    def _pump(self, events: list[tuple[int, int]]) -> None:
        for descriptor, event in events:
            rank = self._rank_of[descriptor]
            try:
                if event & select.POLLOUT and self._inboxes[rank].channel.flush():
                    self._poller.modify(descriptor, select.POLLIN)
                if event & ~select.POLLOUT:
                    self._inboxes[rank].pump()
            except ChannelClosed as error:
                raise RankLost(rank, str(error)) from error
