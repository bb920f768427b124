"""Every token that an engine samples is counted once: for a group or a cascade, as late, or as dropped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

_COUNTED = ("tokens_kept", "tokens_pruned", "tokens_late", "cascade_tokens_small", "cascade_tokens_large")
_SETTLES_S = 30.0


def num_uncounted(*all_stats: dict[str, Any]) -> int:
    """Return how many sampled tokens these engines' statistics do not count, which are those of plain requests."""
    sampled = sum(stats["tokens_sampled"] - stats["tokens_dropped"] for stats in all_stats)
    return sampled - sum(stats["groups"].get(name, 0) for stats in all_stats for name in _COUNTED)


@contextlib.contextmanager
def conserved_tokens(*stats_of: Callable[[], dict[str, Any]]) -> Iterator[list[int]]:
    """Check that what groups and cascades count within the block adds up to what the engines sample.

    Args:
        stats_of: each returns the statistics of an engine.

    Yields:
        For the caller to add to: numbers of tokens of plain requests, which nobody counts.
    """

    def uncounted() -> int:
        for stats in stats_of:
            stats()  # counts that are on their way come before its answer
        return num_uncounted(*(stats() for stats in stats_of))

    before, plain = uncounted(), list[int]()
    yield plain
    deadline = time.monotonic() + _SETTLES_S
    while (found := uncounted()) != before + sum(plain) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found - before == sum(plain), (
        f"{found - before} tokens are not counted, of which {plain} are plain requests'"
    )
