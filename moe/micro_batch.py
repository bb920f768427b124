"""Computations that stop where they would wait for other ranks, so that others can go on meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Stages = Generator[None, None, T]


def run(stages: Stages[T]) -> T:
    """One alone, to its end."""
    [result] = take_turns([stages])
    return result


def take_turns(parts: Sequence[Stages[T]]) -> list[T]:
    """Several, each one stage at a time, in their order; their results.

    So what a part sends travels while the others compute. The order depends on nothing else: ranks whose parts have equally many
    stages wait for each other in the same places.
    """
    results: dict[int, T] = {}
    while len(results) < len(parts):
        for number, stages in enumerate(parts):
            if number not in results:
                try:
                    next(stages)
                except StopIteration as end:
                    results[number] = end.value
    return [results[number] for number in range(len(parts))]
