"""Micro-batches: computations that yield where they would wait for other ranks, so that others can run meanwhile."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
MicroBatch = Generator[None, None, T]  # returns its result


def run(micro_batch: MicroBatch[T]) -> T:
    """Run one micro-batch to its end; return its result."""
    [result] = interleave([micro_batch])
    return result


def interleave(micro_batches: Sequence[MicroBatch[T]]) -> list[T]:
    """Run micro-batches round robin, each up to its next yield; return their results.

    What one has sent travels while the others compute. The order depends on nothing but the number of yields, so ranks
    whose micro-batches yield equally often wait for each other at the same points.
    """
    results: dict[int, T] = {}
    while len(results) < len(micro_batches):
        for number, micro_batch in enumerate(micro_batches):
            if number not in results:
                try:
                    next(micro_batch)
                except StopIteration as end:
                    results[number] = end.value
    return [results[number] for number in range(len(micro_batches))]
