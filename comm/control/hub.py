"""The controller's side of the control channel: plans to every rank, results back.

Each rank has one connection to the `ControlHub`, over which it sends results and whose end means that the
rank has died. Plans take the same connections to ranks on the controller's node. To another node a plan goes
once, to its first rank, which forwards it to the others (docs/adr/0002-control-channel.md has the figures).
"""

from __future__ import annotations

import contextlib
import platform
import select
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from expertwire.comm.control.codec import pack, unpack
from expertwire.comm.control.connections import Listener
from expertwire.comm.control.errors import BEAT, ERROR, ChannelClosed, RankError, RankLost, RankTimeout
from expertwire.comm.control.socket_channel import SocketChannel

_POLL_S = 0.05
_WATCH_S = 0.25  # time between calls of `collect`'s `meanwhile`


def this_node() -> str:
    """Return an id of this host, equal in two processes only if they can share memory and local sockets.

    It differs between machines, network namespaces, and mounts of /dev/shm, of which there may be none.
    """
    if sys.platform != "linux":
        return f"{platform.node()}:{uuid.getnode()}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    network = Path("/proc/self/ns/net").stat().st_ino
    shared = Path("/dev/shm")
    return f"{boot}:{network}:{shared.stat().st_dev if shared.exists() else 'none'}"


class ControlHub:
    """Connections from the controller to all ranks.

    Args:
        num_ranks: P.
        address: where to listen. The attribute `address` is what to give to the ranks.
        token: shared secret; connections without it are dropped.
        node: this host's id, `this_node()` by default.
    """

    def __init__(
        self, num_ranks: int, *, address: str = "tcp:127.0.0.1:0", token: str, node: str | None = None
    ) -> None:
        self.num_ranks = num_ranks
        self._node = node or this_node()
        self._listener = Listener(address, token)
        self.address = self._listener.address
        self._channels: dict[int, SocketChannel] = {}  # by rank
        self._answers: list[deque[dict[str, np.ndarray]]] = [deque() for _ in range(num_ranks)]
        self._receivers: list[int] = []  # ranks that get plans from here
        self._rank_of: dict[int, int] = {}  # by file descriptor
        self._heard_s = [0.0] * num_ranks  # when something arrived last, by rank
        self._poller = select.poll()

    def wait_joined(self, deadline_s: float, poll: Callable[[], None]) -> list[dict[str, np.ndarray]]:
        """Wait until every rank has joined, and return their hello messages by rank.

        Args:
            deadline_s: seconds from now.
            poll: called regularly; may raise, for instance because a process has died.

        Raises:
            RankTimeout: names the ranks that are missing.
            RankLost: a rank's connection ended.
        """
        deadline = time.monotonic() + deadline_s
        hellos = self._accept_ranks(deadline, poll)
        ranks_of_node: dict[str, list[int]] = {}
        for rank in range(self.num_ranks):
            ranks_of_node.setdefault(bytes(hellos[rank].pop("_node")).decode(), []).append(rank)
        addresses = {rank: bytes(hello.pop("_address")) for rank, hello in hellos.items()}
        for node, ranks in ranks_of_node.items():
            receivers = ranks if node == self._node else ranks[:1]
            self._receivers += receivers
            for rank in ranks:
                leader = b"" if rank in receivers else addresses[ranks[0]]
                followers = len(ranks) - 1 if rank in receivers and len(receivers) == 1 else 0
                self._welcome(rank, leader, followers)
        for rank in range(self.num_ranks):
            self._wait_ready(rank, deadline, poll)
        self._listener.close()
        for rank, channel in self._channels.items():
            self._rank_of[channel.fileno()] = rank
            self._poller.register(channel.fileno(), select.POLLIN)
        self._heard_s = [time.monotonic()] * self.num_ranks
        return [hellos[rank] for rank in range(self.num_ranks)]

    def publish(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Send the same message to every rank, once per remote node, without waiting.

        Raises:
            RankLost: a rank's connection has ended.
        """
        message = pack(arrays)
        for rank in self._receivers:
            channel = self._channels[rank]
            try:
                channel.send_frame(message)
            except ChannelClosed as error:
                raise RankLost(rank, str(error)) from error
            if channel.pending:
                self._poller.modify(channel.fileno(), select.POLLIN | select.POLLOUT)

    def collect(self, timeout_s: float, meanwhile: Callable[[], None] | None = None) -> list[dict[str, np.ndarray]]:
        """Return one answer of every rank, by rank; later answers stay for the next call.

        Args:
            timeout_s: seconds from now.
            meanwhile: called a few times a second while answers are missing.

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
            if meanwhile is None:
                self._handle(self._poller.poll(remaining * 1000))
            elif events := self._poller.poll(min(remaining, _WATCH_S) * 1000):
                self._handle(events)
            else:
                meanwhile()
        return [answers.popleft() for answers in self._answers]

    def poll_lost(self) -> None:
        """Handle what has arrived, without waiting; an idle controller calls this when one of `filenos` is readable.

        Raises:
            RankLost: a rank's connection ended.
        """
        self._handle(self._poller.poll(0))

    def silent(self, limit_s: float) -> list[int]:
        """Return the ranks from which nothing has arrived for `limit_s` seconds; ranks send beats (`ControlLink.beat`).

        Messages that wait to be read count only after `collect` or `poll_lost`.
        """
        oldest = time.monotonic() - limit_s
        return [rank for rank, heard in enumerate(self._heard_s) if heard < oldest]

    def filenos(self) -> list[int]:
        """Return the file descriptors that become readable when a rank dies or sends something."""
        return list(self._rank_of)

    def close(self) -> None:
        """Close every connection; ranks then raise `ChannelClosed`. Idempotent."""
        self._listener.close()
        for channel in self._channels.values():
            channel.close()
        self._rank_of = {}

    def _accept_ranks(self, deadline: float, poll: Callable[[], None]) -> dict[int, dict[str, np.ndarray]]:
        """Return the hello message of each rank."""
        hellos: dict[int, dict[str, np.ndarray]] = {}
        newcomers: list[SocketChannel] = []
        while len(hellos) < self.num_ranks:
            poll()
            if time.monotonic() > deadline:
                missing = tuple(rank for rank in range(self.num_ranks) if rank not in hellos)
                raise RankTimeout(missing, "did not connect to the controller in time")
            if channel := self._listener.accept(_POLL_S):
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
                    self._channels[rank] = channel
                newcomers.remove(channel)
            for rank, channel in self._channels.items():
                try:
                    channel.ready_frames()
                except ChannelClosed as error:
                    raise RankLost(rank, str(error)) from error
        return hellos

    def _welcome(self, rank: int, leader: bytes, followers: int) -> None:
        """Tell a rank where its plans come from (empty: here), and to how many ranks it forwards them."""
        try:
            self._channels[rank].send(
                {"leader": np.frombuffer(leader, np.uint8), "num_followers": np.array([followers])}
            )
        except ChannelClosed as error:
            raise RankLost(rank, str(error)) from error

    def _wait_ready(self, rank: int, deadline: float, poll: Callable[[], None]) -> None:
        while True:
            poll()
            try:
                if self._channels[rank].recv(_POLL_S) is not None:
                    return
            except ChannelClosed as error:
                raise RankLost(rank, str(error)) from error
            if time.monotonic() > deadline:
                raise RankTimeout((rank,), "did not answer in time while the ranks were being joined")

    def _all_answered(self) -> bool:
        """Return whether each rank's next answer is here; raise `RankError` if one reports a failure."""
        for rank, answers in enumerate(self._answers):
            if answers and ERROR in answers[0]:
                details = {name: array for name, array in answers[0].items() if name != ERROR}
                raise RankError(rank, bytes(answers[0][ERROR]).decode(), details)
        return all(self._answers)

    def _handle(self, events: list[tuple[int, int]]) -> None:
        for descriptor, event in events:
            rank = self._rank_of[descriptor]
            channel = self._channels[rank]
            try:
                if event & select.POLLOUT and channel.flush():
                    self._poller.modify(descriptor, select.POLLIN)
                if event & ~select.POLLOUT:
                    self._heard_s[rank] = time.monotonic()
                    arrived = map(unpack, channel.ready_frames())
                    self._answers[rank] += (answer for answer in arrived if BEAT not in answer)
            except ChannelClosed as error:
                raise RankLost(rank, str(error)) from error
