"""The caches that a model names, checked against the scheduler's sizes, and as the loops want to know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from expertwire.scheduler.block_loops import Caches
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import CacheKind, CacheSpec

EVERYTHING = 2**60  # tokens that a token of a cache without a window sees
_PATIENCE = 4  # blocks: some guesses are overwritten


def check(cache_specs: tuple[CacheSpec, ...], config: SchedulerConfig) -> None:
    """ValueError: there is no cache, or two of one name, or one whose fields do not fit its kind or the sizes."""
    given = [spec.name for spec in cache_specs]
    if not given or len(set(given)) < len(given):
        raise ValueError(f"cache_specs must have at least one cache, each with a name of its own, got {given}")
    for spec in cache_specs:
        what = f"cache {spec.name!r} is of kind {spec.kind!r}"
        if spec.kind not in get_args(CacheKind):
            raise ValueError(f"{what}; the scheduler supports these kinds: {', '.join(get_args(CacheKind))}")
        if spec.kind == "window" and (spec.window is None or spec.window < 1):
            raise ValueError(f"{what}; window must be an integer >= 1, got {spec.window!r}")
        if spec.kind != "window" and spec.window is not None:
            raise ValueError(f"{what}; window must be None, got {spec.window!r}")
        every = spec.snapshot_every
        if spec.kind == "state" and (every is None or every < 1 or every % config.block_size):
            raise ValueError(
                f"{what}; snapshot_every must be a multiple of block_size {config.block_size}, got {every!r}"
            )
        if spec.kind != "state" and every is not None:
            raise ValueError(f"{what}; snapshot_every must be None, got {every!r}")
        if spec.kind == "state" and config.num_states is None:
            raise ValueError(f"{what}; num_states must be an integer >= 2, got None")


def capacities(cache_specs: tuple[CacheSpec, ...], config: SchedulerConfig) -> list[int]:
    """Blocks of each cache on one rank, without the null block."""
    return [((config.num_states or 0) if spec.kind == "state" else config.num_blocks) - 1 for spec in cache_specs]


def describe(specs: Sequence[CacheSpec], config: SchedulerConfig) -> Caches:
    """The same, as arrays."""
    size_G = np.array([spec.tokens_per_block(config.block_size) for spec in specs])
    return Caches(
        size_G=size_G,
        window_G=np.array([spec.num_seen or EVERYTHING for spec in specs]),
        names_G=size_G // config.block_size,
        most_G=np.array([_most_blocks(spec, config) for spec in specs]),
        # A cache that keeps everything has a prefix's first blocks, or nothing of it.
        patience=_PATIENCE if any(spec.num_seen is None for spec in specs) else EVERYTHING,
    )


def _most_blocks(spec: CacheSpec, config: SchedulerConfig) -> int:
    """Blocks of a cache that one request can hold: those of the longest, or of its window and one step's tokens."""
    size, seen = spec.tokens_per_block(config.block_size), spec.num_seen
    longest = -(-config.max_model_len // size)
    return longest if seen is None else min(longest, -(-(seen + config.max_num_tokens) // size) + 1)
