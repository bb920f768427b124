"""Groups: branches of one request that start together, so that what they have in common is computed once.

The first branch of a group, its *leader*, waits, starts and is preempted like any other request. The others, its
*followers*, wait with it: they have no place in the queue and no slot. When the leader starts, slots of its rank are reserved
for as many of them as there are; the rest are a group of their own behind it, which finds the prefix cache. In the step that
computes the last of the leader's known tokens the followers start: they share its blocks, and each samples its first token
from the leader's last row of hidden states.

P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from expertwire.scheduler.request import Request


@dataclass(slots=True, eq=False)
class _Group:
    """The followers of a leader.

    Args:
        followers: those that wait, in the order of their branches.
        rank: of the leader; -1 while it waits, too.
        num_reserved: slots of the rank that are kept for the first followers.
    """

    followers: list[Request]
    rank: int = -1
    num_reserved: int = 0


class WaitingGroups:
    """The groups whose followers have not started, by the keys of their leaders.

    Attributes:
        reserved_P: slots of each rank that are kept for followers, i64.
    """

    def __init__(self, num_ranks: int) -> None:
        self._groups: dict[int, _Group] = {}
        self._leaders: dict[int, int] = {}  # by the keys of followers
        self.reserved_P = np.zeros(num_ranks, np.int64)

    def __contains__(self, key: int) -> bool:
        """Return whether a request with this key leads a group."""
        return key in self._groups

    def __len__(self) -> int:
        """Return the number of followers."""
        return len(self._leaders)

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the followers."""
        return (follower for group in self._groups.values() for follower in group.followers)

    def add(self, leader: Request, followers: list[Request]) -> None:
        """Add a group, whose leader waits."""
        self._groups[leader.key] = _Group(followers)
        self._leaders |= dict.fromkeys((follower.key for follower in followers), leader.key)

    def find(self, key: int) -> Request | None:
        """Return the follower with this key, or None."""
        if (leader := self._leaders.get(key)) is None:
            return None
        return next(follower for follower in self._groups[leader].followers if follower.key == key)

    def discard(self, key: int) -> Request | None:
        """Remove and return the follower with this key, or None."""
        if (follower := self.find(key)) is None:
            return None
        leader = self._leaders.pop(key)
        group = self._groups[leader]
        num_reserved = group.num_reserved
        self._reserve(group, min(num_reserved, len(group.followers) - 1))
        group.followers.remove(follower)
        if not group.followers:
            del self._groups[leader]
        return follower

    def followers(self, key: int) -> list[Request]:
        """Return the followers of a leader."""
        return self._groups[key].followers

    def reserve(self, key: int, rank: int, num_slots: int) -> None:
        """Keep so many slots of a rank for followers of a leader that starts there."""
        group = self._groups[key]
        group.rank = rank
        self._reserve(group, num_slots)

    def running(self) -> list[int]:
        """Return the keys of the leaders that run."""
        return [key for key, group in self._groups.items() if group.rank >= 0]

    def ranks(self) -> dict[int, int]:
        """Return the ranks of the leaders by their keys, -1 of those that wait."""
        return {key: group.rank for key, group in self._groups.items()}

    def num_reserved(self, key: int) -> int:
        """Return how many slots are kept for the followers of a leader."""
        return self._groups[key].num_reserved

    def cut(self, key: int, num: int) -> list[Request]:
        """Remove and return all but the first `num` followers of a leader."""
        group = self._groups[key]
        rest = group.followers[num:]
        self._reserve(group, min(group.num_reserved, num))
        del group.followers[num:]
        for follower in rest:
            del self._leaders[follower.key]
        if not group.followers:
            del self._groups[key]
        return rest

    def stopped(self, key: int) -> None:
        """Give up the slots that are kept for a leader's followers, as it runs no more."""
        if (group := self._groups.get(key)) is not None:
            self._reserve(group, 0)
            group.rank = -1

    def check_integrity(self) -> None:
        """Assert that the groups agree with each other, and with the slots that are kept for them."""
        followers = {f.key: leader for leader, group in self._groups.items() for f in group.followers}
        assert followers == self._leaders, (followers, self._leaders)
        reserved_P = np.zeros_like(self.reserved_P)
        for group in self._groups.values():
            assert 0 <= group.num_reserved <= len(group.followers), group
            assert group.rank >= 0 or not group.num_reserved, group
            if group.rank >= 0:
                reserved_P[group.rank] += group.num_reserved
        assert np.array_equal(reserved_P, self.reserved_P), (reserved_P, self.reserved_P)

    def _reserve(self, group: _Group, num_slots: int) -> None:
        if (more := num_slots - group.num_reserved) == 0:
            return
        self.reserved_P[group.rank] += more
        group.followers[0].account.num_reserved += more
        group.num_reserved = num_slots
