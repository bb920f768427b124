"""Limits of one request: how many tokens it may have, and whether a rank can ever serve it.

C KV cache groups.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from expertwire.scheduler._compiled.blocks import Caches
from expertwire.scheduler._compiled.prefixes import all_below
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.request import Request


def token_limit(request: Request, config: SchedulerConfig) -> int:
    """Return the most prompt and output tokens: `max_tokens` is cut to what `max_model_len` leaves for it."""
    length = len(request.prompt)
    return length + request.params.most_output_tokens(length, config.max_model_len)


def is_long(request: Request, config: SchedulerConfig) -> bool:
    """Return whether the request, whose `limit` is set, computes more tokens than the model's original context has.

    The last token is never computed. Without `max_tokens` nobody knows how many there will be: the known ones count.
    """
    if config.original_max_position_embeddings is None:
        return False
    num_tokens = len(request.tokens) if request.params.max_tokens is None else request.limit - 1
    return num_tokens > config.original_max_position_embeddings


class Capacity(NamedTuple):
    """The most tokens of one request that a rank can keep, and the cache that limits them."""

    num_tokens: int
    cache: int


def capacity(caches: Caches, num_blocks_C: np.ndarray) -> Capacity:
    """Return the least of the caches' capacities. `num_blocks_C`: usable blocks of each cache on one rank."""
    return min(
        Capacity(num_blocks * size if most > num_blocks else sys.maxsize, cache)
        for cache, (num_blocks, size, most) in enumerate(
            zip(num_blocks_C.tolist(), caches.size_C.tolist(), caches.most_C.tolist(), strict=True)
        )
    )


def why_invalid(request: Request, config: SchedulerConfig, caches: Caches, most: Capacity) -> str | None:
    """Return why the request, whose `limit` is set, can never be served, or None. Fronts have checked its token ids."""
    length = len(request.prompt)
    assert all_below(request.tokens, config.vocab_size), f"request {request.key} has ids not in the vocabulary"
    if length == 0:
        return "prompt must have at least 1 token, got 0"
    if length >= config.max_model_len:
        return (
            f"prompt has {length} tokens; allowed are at most {config.max_model_len - 1} "
            f"(max_model_len = {config.max_model_len}, of which one is for the output)"
        )
    if len(request.tokens) >= request.limit:
        return (
            f"prompt ({length} tokens) and the output that it begins with ({len(request.output)}) must be less than "
            f"{request.limit} tokens (prompt and max_tokens, or max_model_len)"
        )
    if request.limit - 1 > most.num_tokens:  # the last token is never computed
        size, most_blocks = int(caches.size_C[most.cache]), int(caches.most_C[most.cache])
        return (
            f"prompt ({length} tokens) and max_tokens ({request.limit - length} after max_model_len) need "
            f"{min(-(-(request.limit - 1) // size), most_blocks)} cache blocks; a rank has {most.num_tokens // size}, which is "
            f"enough for {most.num_tokens + 1} tokens in all"
        )
    return None
