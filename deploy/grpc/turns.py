"""Turns: whom the loop serves next.

An event loop runs all that is ready in one round, and gRPC needs about five rounds to hand over the next call. So a round that
serves hundreds of streams keeps new clients out five times as long. Here the work of a round is bounded, and clients take it in
turns. While calls arrive, they come before the work, which begins with the engine's news: until then nobody knows whose they
are.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable

# Costs of a step, in messages of one token, which take about 80 us each.
MESSAGE, OPENING, COSTLY = 1, 6, 24
_ROUND = 24  # cost of the steps of a round
# Rounds in which gRPC hands over a call that has waited, and seconds that its threads need for that: no more are expected
# where none has arrived in both.
_HANDOVER_ROUNDS, _QUIET_S = 6, 2e-3
_PATIENCE_S = 20e-3  # for which arriving calls may keep others waiting


class Turns:
    """Turns of the clients of a front."""

    def __init__(self) -> None:
        self._left = _ROUND
        # By client, of whom the one whose turn it is comes first: what to call for each step, and its cost.
        self._waiting: dict[str, deque[tuple[Callable[[], bool], int]]] = {}
        self._first: list[Callable[[], None]] = []  # what to call when the next round begins
        self._arrived_s = self._served_s = 0.0  # when a call has arrived, and when a round began, by `time.monotonic`
        self._handover_rounds = 0  # in which another call may be handed over
        self._is_scheduled = False

    def note_arrival(self) -> None:
        """Take note that a call has arrived, behind which others may wait in gRPC."""
        self._arrived_s = time.monotonic()
        self._handover_rounds = _HANDOVER_ROUNDS

    @property
    def calls_arrive(self) -> bool:
        """Return whether arriving calls come first now."""
        now = time.monotonic()
        may_arrive = self._handover_rounds > 0 or now < self._arrived_s + _QUIET_S
        return may_arrive and now < self._served_s + _PATIENCE_S

    def begin_round_with(self, work: Callable[[], None]) -> None:
        """Call `work` when the next round of work begins."""
        self._first.append(work)
        self._schedule()

    async def take(self, client: str, cost: int) -> None:
        """Wait until a client may do a step.

        Args:
            client: whose step it is.
            cost: `MESSAGE`, `OPENING` or `COSTLY`.
        """
        if self._left > 0 and not self._waiting and not self.calls_arrive:
            self._left -= cost
            self._schedule()
            return
        future = asyncio.get_running_loop().create_future()
        self.ask(client, cost, functools.partial(_resolve, future))
        await future

    def ask(self, client: str, cost: int, begin: Callable[[], bool]) -> None:
        """Call `begin` when a client may do a step, now or later. It returns False if the client has gone.

        Args:
            client, cost: as for `take`.
            begin: lets the client's task go on.
        """
        if self._left > 0 and not self._waiting and not self.calls_arrive:
            if begin():
                self._left -= cost
        else:
            self._waiting.setdefault(client, deque()).append((begin, cost))
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        """Begin a round: let those do a step whose turn it is."""
        self._is_scheduled = False
        if self.calls_arrive:
            self._is_scheduled, loop = True, asyncio.get_running_loop()
            if self._handover_rounds > 0:
                self._handover_rounds -= 1
                loop.call_soon(self._begin)
            else:
                loop.call_later(_QUIET_S, self._begin)
            return
        self._left, self._served_s = _ROUND, time.monotonic()
        first, self._first = self._first, []
        try:
            for work in first:
                work()
        finally:  # the loop reports an error of `work`, and clients are served all the same
            self._serve()

    def _serve(self) -> None:
        """Let clients do a step until the round has cost enough."""
        while self._waiting and self._left > 0:
            client = next(iter(self._waiting))
            steps = self._waiting.pop(client)
            begin, cost = steps.popleft()
            if steps:
                self._waiting[client] = steps
            if begin():
                self._left -= cost
        if self._left < _ROUND:
            self._schedule()


def _resolve(future: asyncio.Future[None]) -> bool:
    if future.done():  # cancelled
        return False
    future.set_result(None)
    return True
