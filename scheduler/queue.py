"""The requests that wait, in the order of their places."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence

from expertwire.scheduler.request import Request


class WaitingQueue:
    """Requests sorted by `place`; those of equal place by `order`, the number that the queue gives a request when it first comes.

    A request that is preempted keeps both, and so returns to where it was: before all that came after it. One list in order,
    searched by bisection: with 10,000 waiting, moving what lies behind an entry takes less time than finding it.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[float, ...], int, Request]] = []  # ascending; no two have the same order
        self._requests: dict[int, Request] = {}  # by key
        self._num_of: dict[str, int] = {}  # by tenant, of those that have any
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: int) -> bool:
        return key in self._requests

    def __iter__(self) -> Iterator[Request]:
        """The requests in order, lazily: take out what was chosen when the iteration is over."""
        return (request for _, _, request in self._entries)

    def add(self, request: Request) -> None:
        """Insert a request, whose `place` is set and stays as it is while it waits."""
        assert request.key not in self._requests, f"key {request.key} is waiting already"
        if request.order < 0:
            request.order = self._num_added
            self._num_added += 1
        insort(self._entries, (request.place, request.order, request))
        self._requests[request.key] = request
        self._num_of[request.tenant] = self.num_of(request.tenant) + 1

    def get(self, key: int) -> Request:
        """The request with this key, which must be waiting."""
        return self._requests[key]

    def remove(self, requests: Sequence[Request]) -> None:
        """Take out these requests, which must be waiting: quick for one, or for those that are next to each other."""
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
        """Take out the request with this key; None if there is none."""
        request = self._requests.get(key)
        if request is not None:
            self.remove([request])
        return request

    def num_of(self, tenant: str) -> int:
        """How many requests of this tenant wait."""
        return self._num_of.get(tenant, 0)


def _place(entry: tuple[tuple[float, ...], int, Request]) -> tuple[tuple[float, ...], int]:
    return entry[:2]
