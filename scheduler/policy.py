"""In which order waiting requests are admitted. Priority, fair shares and prefix affinity are further policies."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from expertwire.scheduler.request import Request


class Policy(Protocol):
    """Orders the queue. Must be a function of its arguments, so that a run can be replayed."""

    def order(self, waiting: Collection[Request], now: float) -> Iterable[Request]:
        """The requests to admit first, first. `waiting` is in order of submission; best lazy, as few are taken a step.

        Admission stops at the first request that no rank has room for: passing it over could starve it.
        """
        ...


class Fcfs:
    """First come, first served."""

    def order(self, waiting: Collection[Request], now: float) -> Iterable[Request]:
        return waiting
