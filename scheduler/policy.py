"""Scheduling policies: the order in which waiting requests are admitted, one class a policy.

A policy gives every request a `place` in the queue once, at submission, so that the queue is sorted and a step only
looks at its head. Waiting time can be part of it: if all gain by the second alike, nobody ever overtakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from heapq import heapify, heappop, heapreplace
from typing import TYPE_CHECKING, Any, Literal

from expertwire.scheduler.config import is_int, is_number
from expertwire.scheduler.request import Request

if TYPE_CHECKING:
    from expertwire.scheduler.queue import WaitingQueue
    from expertwire.scheduler.tenants import Account

MayStart = Callable[[Request], bool]


class Policy:
    """Base class of policies: first come, first served.

    Results must be a function of the calls made, their `now` included, so that a run can be replayed.
    """

    def place(self, request: Request, now: float) -> tuple[float, ...]:
        """Return the place of an accepted request, whose `limit` is set: smaller is earlier.

        Requests of equal place are in order of submission. Called once for a request: after a preemption it returns to
        its old place.
        """
        return ()

    def num_ahead(self, request: Request, queue: WaitingQueue) -> int:
        """Return how many of the waiting requests are expected to be admitted before a new one, to predict its wait."""
        return len(queue)

    def order(
        self, queue: WaitingQueue, cached_tokens: Callable[[Request], int], may_start: MayStart | None = None
    ) -> Iterable[Request]:
        """Return the requests in order of admission; lazily, because a step takes few.

        Admission stops at the first request that fits on no rank: passing it over could starve it.

        Args:
            queue: in order of place.
            cached_tokens: returns how many tokens of a request's prompt are cached; costs a walk through its hashes.
            may_start: returns whether the quota of its tenant lets a request start, and counts it if so; None: always.
        """
        return queue if may_start is None else filter(may_start, queue)


@dataclass(frozen=True)
class Fcfs(Policy):
    """First come, first served."""


@dataclass(frozen=True)
class Priority(Policy):
    """Lower `priority` first; waiting counts.

    With aging nothing starves: a request is only passed by those whose priority is lower by d > 0
    and that are submitted less than d / aging seconds after it.

    Args:
        aging: units of priority that a second of waiting is worth, 0 to 1e6; with 0 the urgent can
            starve all others.
    """

    aging: float = 0.1

    def __post_init__(self) -> None:
        _check_number("aging", self.aging, 0, 1e6)

    def place(self, request: Request, now: float) -> tuple[float, ...]:
        return (request.priority + self.aging * now,)


@dataclass(frozen=True)
class ShortestRemaining(Policy):
    """Serve the request with the fewest tokens left up to its `limit` first; aging keeps long ones from starving.

    A preempted request computes its known tokens again, so it has `limit` tokens left once more and
    keeps its place. With aging a request is only passed by those that are shorter by d > 0 tokens
    and submitted less than d / aging seconds after it.

    Args:
        aging: tokens that a second of waiting is worth, 0 to 1e6; with 0 the short can starve the long.
    """

    aging: float = 100.0

    def __post_init__(self) -> None:
        _check_number("aging", self.aging, 0, 1e6)

    def place(self, request: Request, now: float) -> tuple[float, ...]:
        return (request.limit + self.aging * now,)


@dataclass(frozen=True)
class PrefixAffinity(Policy):
    """The longest cached prefix first, among those submitted close to one another.

    So prompts that share a prefix run before others push it out of the cache (the
    longest-prefix-match order of Zheng et al., "SGLang: Efficient Execution of Structured Language
    Model Programs", 2023, arXiv:2312.07104, section 3). That alone would starve prompts that nobody
    shares. Hence the choice is among the head of the queue and the `window - 1` requests submitted
    after it, and no request is passed by more than `window - 1` later ones.

    Args:
        window: numbers of submission, >= 1; 1 is first come, first served.
    """

    window: int = 128

    def __post_init__(self) -> None:
        if not is_int(self.window) or self.window < 1:
            raise ValueError(f"window must be an integer >= 1, got {self.window!r}")

    def order(
        self, queue: WaitingQueue, cached_tokens: Callable[[Request], int], may_start: MayStart | None = None
    ) -> Iterable[Request]:
        near: list[Request] = []
        for request in super().order(queue, cached_tokens, may_start):
            if near and request.order - near[0].order >= self.window:
                yield from sorted(near, key=cached_tokens, reverse=True)  # stable in reverse, too
                near = []
            near.append(request)
        yield from sorted(near, key=cached_tokens, reverse=True)


@dataclass
class FairShare(Policy):
    """Tenants share what steps compute, and what runs, by the weights of their quotas.

    Every tenant has a counter of what was computed for it while somebody waited, over its weight; one that begins to wait is
    lifted to the present, so being idle saves up nothing (virtual token counters: Sheng et al., "Fairness in Serving Large
    Language Models", OSDI 2024). The present is the least counter of those that wait, and goes on with what is computed, lest
    a stream of new tenants starve an old one. Counters that are less than `slack` from the present are taken for equal, and
    of these tenants the one goes first that has begun to wait last: one whose requests start soon may send a burst before one
    that waits all the time, and pays for it when the slack is used up. Within a tenant it is first come, first served.
    `Sharing` tells what is computed, and lets running requests give way.

    Args:
        slack: steps of full size, per weight, >= 1.
    """

    slack: int = 64
    step_tokens: float = field(default=1.0, init=False)  # of a step of full size; set by `Sharing`
    closed: set[Account] = field(default_factory=set, init=False)  # tenants that admit nothing in this step
    first_waiting: Account | None = field(default=None, init=False)
    _accounts: dict[str, Account] = field(default_factory=dict, init=False)  # of tenants with unfinished requests
    _present: float = field(default=0.0, init=False)
    _num_steps: int = field(default=0, init=False)
    _waited: set[Account] = field(default_factory=set, init=False)  # in this step
    _position: dict[Account, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if not is_int(self.slack) or self.slack < 1:
            raise ValueError(f"slack must be an integer >= 1, got {self.slack!r}")

    @property
    def accounts(self) -> Collection[Account]:
        """Tenants with unfinished requests, the newest last."""
        return self._accounts.values()

    def place(self, request: Request, now: float) -> tuple[float, ...]:
        self._accounts[request.tenant] = request.account
        return (request.account.index,)  # a tenant's requests are next to each other in the queue

    def num_ahead(self, request: Request, queue: WaitingQueue) -> int:
        """See `Policy`. Beside those of its own tenant, at most the shares of others, however many of theirs wait."""
        mine = queue.num_of(request.tenant)
        others = (account for account in self._accounts.values() if account is not request.account)
        shares = ((account, (mine + 1) * account.quota.weight / request.account.quota.weight) for account in others)
        return mine + sum(min(queue.num_of(account.tenant), math.ceil(share)) for account, share in shares)

    def begin(self, num_waiting: Callable[[str], int]) -> None:
        """Begin a step, in which so many requests of a tenant wait."""
        self._accounts = {name: account for name, account in self._accounts.items() if account.num_unfinished}
        self._num_steps += 1
        waiting = [account for name, account in self._accounts.items() if num_waiting(name)]
        for account in waiting:
            if account not in self._waited:
                account.served = max(account.served, self._present)
                account.waits_since = self._num_steps
        self._present = max(self._present, min((account.served for account in waiting), default=0.0))
        self._waited, self.closed = set(waiting), set()
        self._position = {account: i for i, account in enumerate(sorted(self.accounts, key=self._key))}
        may_start = [a for a in waiting if a.quota.max_running is None or a.num_running < a.quota.max_running]
        self.first_waiting = min(may_start, key=self.position, default=None)

    def charge(self, tokens: Mapping[Account, float]) -> None:
        """Charge what a step computes for each tenant while somebody waits."""
        for account, num_tokens in tokens.items():
            account.served += num_tokens / account.quota.weight
        self._present += sum(tokens.values()) / sum(account.quota.weight for account in tokens)

    def level(self, account: Account) -> int:
        """Return how many times `slack` a tenant has been served beyond the present; negative: how far it is behind."""
        return self._level(account.served)

    def position(self, account: Account) -> int:
        """Return a tenant's place among the tenants in this step: smaller is earlier."""
        return self._position[account]

    def order(
        self, queue: WaitingQueue, cached_tokens: Callable[[Request], int], may_start: MayStart | None = None
    ) -> Iterable[Request]:
        lanes = {a.index: (a, queue.lane((a.index,))) for a in self._waited if a not in self.closed}
        heap = [(*self._key(account), account.served) for account, _ in lanes.values()]
        heapify(heap)
        while heap:
            _, newest, index, served = heap[0]
            account, lane = lanes[index]
            request = next(lane, None)
            if request is None or (may_start is not None and not may_start(request)):
                heappop(heap)
                continue
            yield request
            served += len(request.tokens) / account.quota.weight
            heapreplace(heap, (self._level(served), newest, index, served))

    def _key(self, account: Account) -> tuple[int, int, int]:
        return self.level(account), -account.waits_since, account.index

    def _level(self, served: float) -> int:
        return int((served - self._present) / (self.slack * self.step_tokens))


PolicyName = Literal["fcfs", "priority", "shortest", "prefix", "fair"]
_POLICIES: Mapping[str, type[Any]] = {
    "fcfs": Fcfs,
    "priority": Priority,
    "shortest": ShortestRemaining,
    "prefix": PrefixAffinity,
    "fair": FairShare,
}


def make_policy(name: str, *, aging: float | None = None) -> Policy:
    """Return a new policy of one of these names, with the options that are not None.

    Raises:
        ValueError: there is no such policy, or it has no such option, or the value is not allowed.
    """
    if name not in _POLICIES:
        raise ValueError(f"scheduling_policy must be one of {', '.join(_POLICIES)}, got {name!r}")
    if aging is None:
        return _POLICIES[name]()
    aged = [other for other, policy in _POLICIES.items() if "aging" in {f.name for f in fields(policy)}]
    if name not in aged:
        raise ValueError(f"aging has no effect with scheduling_policy {name!r}; use {' or '.join(map(repr, aged))}")
    return _POLICIES[name](aging=aging)


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")
