"""Calls of the parts of a group's strategy: small ones at once, large ones beside the frontend's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from expertwire.strategies.base import Strategy

T = TypeVar("T")

# Up to this size a part is computed at once, in less than a millisecond. The size is that of the tokens that it may look at; a
# branch counts as 16 tokens, a character that is searched as 64.
_SMALL, _BRANCH, _CHARACTER = 8192, 16, 64


class StrategyFailed(Exception):
    """A strategy, or a part of it, has raised an exception or asked for what cannot be.

    Attributes:
        code: the gRPC status of the request that ends by it.
    """

    code = "INTERNAL"


class TooManyBranches(StrategyFailed):
    """A strategy has asked for more branches than a group may have; what it does is right, but not here."""

    code = "FAILED_PRECONDITION"


class Aside(Protocol):
    """Something that computes beside the frontend's thread."""

    def __call__(self, call: Callable[[], T], then: Callable[[Future[T]], None], /) -> None:
        """Call `call` in another thread, and later `then` in this one with the outcome."""
        ...


class StrategyParts:
    """The parts of one strategy, of which one at a time is computed.

    Args:
        strategy: the strategy.
        aside: computes what is large; None: everything is computed in this thread.

    Attributes:
        name: of the strategy's class.
        is_busy: whether a part is being computed aside.
    """

    def __init__(self, strategy: Strategy, aside: Aside | None) -> None:
        self.name = type(strategy).__name__
        self.is_busy = False
        self._aside = aside

    def call(self, part: str, call: Callable[[], T]) -> T:
        """Return what a part of the strategy returns.

        Raises:
            StrategyFailed: it has raised an exception.
        """
        try:
            return call()
        except Exception as error:
            text = f"the strategy {self.name} has failed in {part}: {type(error).__name__}: {error}"
            raise StrategyFailed(text[:2000]) from error

    def compute(self, part: str, size: int, call: Callable[[], T], then: Callable[[Callable[[], T]], None]) -> None:
        """Compute a part, and call `then`, at once or later, with what returns the result or raises as `call` does."""
        if size <= _SMALL or self._aside is None:
            then(lambda: self.call(part, call))
            return

        def computed(future: Future[T]) -> None:
            self.is_busy = False
            then(future.result)

        self.is_busy = True
        self._aside(lambda: self.call(part, call), computed)


def size_of_branches(count: int, num_tokens: int) -> int:
    """Return the size of a part that looks at branches, which have so many tokens together."""
    return num_tokens + count * _BRANCH


def size_of_texts(texts: Sequence[str]) -> int:
    """Return the size of a part that searches these texts."""
    return _CHARACTER * sum(map(len, texts))
