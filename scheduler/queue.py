"""The waiting queue, and its limits: a request that would wait too long is rejected."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.groups import WaitingGroups
from expertwire.scheduler.outputs import Rejection
from expertwire.scheduler.request import Request

_RATE_ADMISSIONS = 64


class WaitingQueue:
    """Waiting requests sorted by `place`, equals by `order`.

    The queue sets `order`, a running number, when a request is first added. A preempted request
    keeps both and so returns to where it was. One sorted list, searched by bisection: with 10,000
    waiting, moving the entries after one takes less time than finding it.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[float, ...], int, Request]] = []  # ascending; orders are unique
        self._requests: dict[int, Request] = {}  # by key
        self._num_of: dict[str, int] = {}  # by tenant, where not 0
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: int) -> bool:
        return key in self._requests

    def __iter__(self) -> Iterator[Request]:
        """Iterate over the requests in order, lazily; do not change the queue meanwhile."""
        return (request for _, _, request in self._entries)

    def add(self, request: Request) -> None:
        """Insert a request, whose `place` is set and stays as it is while it waits."""
        assert request.key not in self._requests, f"key {request.key} is waiting already"
        self.number(request)
        insort(self._entries, (request.place, request.order, request))
        self._requests[request.key] = request
        self._num_of[request.tenant] = self.num_of(request.tenant) + 1

    def number(self, request: Request) -> None:
        """Give a request its order, if it has none."""
        if request.order < 0:
            request.order = self._num_added
            self._num_added += 1

    def get(self, key: int) -> Request:
        """Return the waiting request with this key."""
        return self._requests[key]

    def find(self, key: int) -> Request | None:
        """Return the waiting request with this key, or None."""
        return self._requests.get(key)

    def lane(self, place: tuple[float, ...]) -> Iterator[Request]:
        """Iterate over the requests of this place in order, lazily; do not change the queue meanwhile."""
        for at in range(bisect_left(self._entries, (place,)), len(self._entries)):
            if self._entries[at][0] != place:
                return
            yield self._entries[at][2]

    def remove(self, requests: Sequence[Request]) -> None:
        """Remove these waiting requests; fast if they are close to each other."""
        places = sorted((request.place, request.order) for request in requests)
        if not places:
            return
        begin, end = bisect_left(self._entries, places[0]), bisect_right(self._entries, places[-1], key=_place)
        orders = {order for _, order in places}
        stay = [entry for entry in self._entries[begin:end] if entry[1] not in orders]
        assert len(stay) == end - begin - len(requests), f"place or order has changed of one of {places}"
        self._entries[begin:end] = stay
        for request in requests:
            del self._requests[request.key]
            self._num_of[request.tenant] -= 1
            if not self._num_of[request.tenant]:
                del self._num_of[request.tenant]

    def discard(self, key: int) -> Request | None:
        """Remove and return the request with this key, or None."""
        if (request := self.find(key)) is not None:
            self.remove([request])
        return request

    def num_of(self, tenant: str) -> int:
        """Return the number of waiting requests of this tenant."""
        return self._num_of.get(tenant, 0)


def _place(entry: tuple[tuple[float, ...], int, Request]) -> tuple[tuple[float, ...], int]:
    return entry[:2]


class AdmissionRate:
    """The recent rate of admissions while requests wait, to predict waiting times."""

    def __init__(self) -> None:
        self._admitted_at: deque[float] = deque(maxlen=_RATE_ADMISSIONS)

    def reset(self) -> None:
        """Start again, as no request waits: the rate would be that of arrivals."""
        self._admitted_at.clear()

    def admitted(self, count: int, now: float) -> None:
        """Count admissions."""
        self._admitted_at.extend([now] * count)

    def wait_s(self, num_ahead: int, now: float) -> float | None:
        """Return the expected seconds until a request behind `num_ahead` others is admitted; None: nothing is known."""
        if not num_ahead:
            return 0.0
        if len(self._admitted_at) < _RATE_ADMISSIONS or now <= self._admitted_at[0]:
            return None
        return num_ahead * (now - self._admitted_at[0]) / len(self._admitted_at)


def _num_of(tenant: str, queue: WaitingQueue, groups: WaitingGroups) -> int:
    return queue.num_of(tenant) + sum(follower.tenant == tenant for follower in groups)


def reject(
    request: Request,
    config: SchedulerConfig,
    queue: WaitingQueue,
    rate: AdmissionRate,
    num_ahead: Callable[[Request, WaitingQueue], int],
    now: float,
    groups: WaitingGroups,
    num_branches: int,
) -> Rejection | None:
    """Return a rejection if the queue has too few places or the request's deadline would pass while it waits, or None.

    Args:
        request: a new request, or the leader of a group.
        config: has the limits.
        queue: the requests that wait.
        rate: of admissions.
        num_ahead: see `Policy.num_ahead`.
        now: seconds.
        groups: have requests that wait beside the queue.
        num_branches: requests that need a place.
    """
    num_waiting = len(queue) + len(groups)
    most, message, retry_after_s = config.max_queued_requests_per_tenant, None, None
    if num_waiting + num_branches > config.max_queued_requests:
        message = f"{num_waiting} requests are waiting; allowed are max_queued_requests = {config.max_queued_requests}: try later"
        retry_after_s = rate.wait_s(1, now)
    elif most is not None and (waiting := _num_of(request.tenant, queue, groups)) + num_branches > most:
        message = (
            f"{waiting} requests of tenant {request.tenant!r} are waiting; allowed are max_queued_requests_per_tenant = {most}: "
            "try later"
        )
        retry_after_s = rate.wait_s(1, now)
    elif request.deadline is not None:
        wait_s, left_s = rate.wait_s(num_ahead(request, queue), now), request.deadline - now
        if left_s <= 0 or (wait_s is not None and wait_s > left_s):
            wait_s = wait_s or 0.0
            message = (
                f"the first token would come in about {wait_s:.3g} s, with {num_waiting} requests waiting; the deadline is in "
                f"{left_s:.3g} s: try later, or with a later deadline"
            )
            retry_after_s = max(wait_s - max(left_s, 0.0), 0.0)
    return None if message is None else Rejection(request.key, "RESOURCE_EXHAUSTED", message, retry_after_s)
