"""Scheduling policies: the order in which waiting requests are admitted, one class a policy.

A policy gives every request a `place` in the queue once, at submission, so that the queue is sorted and a step only
looks at its head. Waiting time can be part of it: if all gain by the second alike, nobody ever overtakes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from expertwire.scheduler.config import is_int, is_number
from expertwire.scheduler.request import Request

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

    def order(
        self, queue: Iterable[Request], cached_tokens: Callable[[Request], int], may_start: MayStart | None = None
    ) -> Iterable[Request]:
        """Return the requests in order of admission; lazily, because a step takes few.

        Admission stops at the first request that fits on no rank: passing it over could starve it.

        Args:
            queue: in order of place.
            cached_tokens: returns how many tokens of a request's prompt are cached; costs a walk through its hashes.
            may_start: returns whether the quota of its tenant lets a request start, and counts it if so; None: always.
        """
        return queue if may_start is None else filter(may_start, queue)

    def admitted(self, request: Request) -> None:
        """Called when a request leaves the queue to run, also after each preemption."""

    def dropped(self, request: Request) -> None:
        """Called when a request leaves the queue for good: it was aborted."""


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
    """The request with the fewest tokens left first, counted up to its `limit`; waiting counts.

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
        self, queue: Iterable[Request], cached_tokens: Callable[[Request], int], may_start: MayStart | None = None
    ) -> Iterable[Request]:
        near: list[Request] = []
        for request in super().order(queue, cached_tokens, may_start):
            if near and request.order - near[0].order >= self.window:
                yield from sorted(near, key=cached_tokens, reverse=True)  # stable in reverse, too
                near = []
            near.append(request)
        yield from sorted(near, key=cached_tokens, reverse=True)


@dataclass
class _Busy:
    """A tenant's requests since it last had none waiting."""

    began: float  # in virtual time
    num_tokens: int = 0
    waiting: set[int] = field(default_factory=set)  # keys of those that have not run yet


@dataclass
class FairShare(Policy):
    """Tenants share the tokens by their weights: self-clocked fair queueing.

    In virtual time, a tenant's request starts where its last one ends, or at the present if that is later, and ends
    `limit / weight` after its start: with all tokens that it may have, because nobody knows how many it will have.
    The request with the smallest end is admitted first, and its end becomes the present. It follows that:

    - The tokens per weight that two tenants with waiting requests are admitted differ by at most one request's.
    - While a request of n tokens waits, another tenant of equal weight is admitted at most n tokens and one request,
      however many it submits.
    - Being idle saves up nothing, and a stream of new tenants starves no old one (if starts were the clock, it would).

    Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM 1994. Beyond that, requests may
    leave the queue out of order: a dropped request returns its tokens, so that the tenant's next ones end earlier; one
    that is admitted early, beside the request that it forks, moves the present by its own tokens only.

    Weights are those of the tenants' quotas; only their ratios count.
    """

    _present: float = field(default=0.0, init=False)
    _busy: dict[str, _Busy] = field(default_factory=dict, init=False)  # by tenant, of those with requests waiting

    def place(self, request: Request, now: float) -> tuple[float, ...]:
        weight = request.account.quota.weight
        busy = self._busy.get(request.tenant)
        if busy is None or busy.began + busy.num_tokens / weight < self._present:
            busy = self._busy[request.tenant] = _Busy(self._present)
        busy.num_tokens += request.limit
        busy.waiting.add(request.key)
        return (busy.began + busy.num_tokens / weight,)

    def admitted(self, request: Request) -> None:
        latest = self._present + request.limit / request.account.quota.weight
        self._present = max(self._present, min(request.place[0], latest))
        self._leave(request)

    def dropped(self, request: Request) -> None:
        self._leave(request, refund=request.limit)

    def _leave(self, request: Request, refund: int = 0) -> None:
        """Remove a request from its tenant's waiting ones, unless it has run before or the tenant was idle since."""
        busy = self._busy.get(request.tenant)
        if busy is None or request.key not in busy.waiting:
            return
        busy.waiting.remove(request.key)
        busy.num_tokens -= refund
        if not busy.waiting:
            del self._busy[request.tenant]


_POLICIES: Mapping[str, type[Any]] = {
    "fcfs": Fcfs,
    "priority": Priority,
    "shortest": ShortestRemaining,
    "prefix": PrefixAffinity,
    "fair": FairShare,
}


def make_policy(name: str, *, aging: float | None = None) -> Policy:
    """Return a new policy: "fcfs", "priority", "shortest", "prefix" or "fair", with the options that are not None.

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
