"""The caches that a model names, checked against the scheduler's sizes, and as the loops want to know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from expertwire.scheduler._compiled.blocks import Caches
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.plan import CacheKind, CacheSpec

EVERYTHING = 2**60  # tokens that a token of a cache without a window sees
_PATIENCE = 4  # blocks: some guesses are overwritten


def check(cache_specs: tuple[CacheSpec, ...], config: SchedulerConfig) -> None:
    """ValueError: there is no cache, or two of one name, or one whose fields do not fit its kind or the sizes."""
    given, num_blocks = [spec.name for spec in cache_specs], config.num_blocks
    if not given or len(set(given)) < len(given):
        raise ValueError(f"cache_specs must have at least one cache, each with a name of its own, got {given}")
    if isinstance(num_blocks, tuple) and len(num_blocks) != len(given):
        raise ValueError(f"num_blocks must be one number, or one for each of the caches {given}, got {num_blocks}")
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


def capacities(cache_specs: tuple[CacheSpec, ...], config: SchedulerConfig) -> list[int]:
    """Blocks of each cache on one rank, without the null block."""
    num = config.num_blocks
    return [each - 1 for each in (num if isinstance(num, tuple) else (num,) * len(cache_specs))]


def describe(specs: Sequence[CacheSpec], config: SchedulerConfig) -> Caches:
    """The same, as arrays."""
    size_G = np.array([spec.tokens_per_block(config.block_size) for spec in specs])
    return Caches(
        size_G=size_G,
        window_G=np.array([spec.num_seen or EVERYTHING for spec in specs]),
        names_G=size_G // config.block_size,
        most_G=np.array(
            [spec.most_blocks(config.block_size, config.max_model_len, config.max_num_batched_tokens) for spec in specs]
        ),
        # A cache that keeps everything has a prefix's first blocks, or nothing of it.
        patience=_PATIENCE if any(spec.num_seen is None for spec in specs) else EVERYTHING,
    )
