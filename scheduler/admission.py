"""What every rank has left for new requests in a step, and what it has already of their prefixes. P ranks, G caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.placement import place
from expertwire.scheduler.plan import CacheSpec
from expertwire.scheduler.request import Request


class Cached(NamedTuple):
    """A beginning of a request that a rank has: its tokens, and in every cache the last blocks of it (all, but for windows)."""

    num_tokens: int
    blocks_G: Sequence[Sequence[int]]


class Admission(NamedTuple):
    """A request that starts on a rank in this step."""

    request: Request
    rank: int
    num_scheduled: int  # tokens to compute in this step
    num_cached: int  # tokens that need not be computed
    blocks_G: Sequence[Sequence[int]]  # that hold them


class Room:
    """Slots, tokens of the step's budget and blocks that every rank has left, and its load; `take` counts admissions.

    Args:
        slots_P: further requests that may run.
        budget_P: tokens.
        blocks_P: free and not promised, less one for every running request: what the next tokens of those will need.
        load_P: as in `placement.place`.
    """

    def __init__(self, slots_P: np.ndarray, budget_P: np.ndarray, blocks_P: np.ndarray, load_P: np.ndarray) -> None:
        self._slots_P, self._budget_P, self._blocks_P, self._load_P = slots_P, budget_P, blocks_P, load_P
        self._open_P = (slots_P > 0) & (budget_P > 0)

    @property
    def full(self) -> bool:
        """No rank can take anything."""
        return not self._open_P.any()

    def choose(self, num_blocks: int, cached_P: np.ndarray | None, block_size: int) -> int | None:
        """The rank for a request of `num_blocks` blocks, of which the ranks have the first `cached_P`; None: no rank has room."""
        if cached_P is None:
            return place(self._open_P & (self._blocks_P >= num_blocks), self._load_P)
        return place(self._open_P & (self._blocks_P >= num_blocks - cached_P), self._load_P - cached_P * block_size)

    def fits(self, rank: int, num_blocks: int) -> bool:
        """Whether a rank can take a request that needs `num_blocks` free blocks."""
        return bool(self._open_P[rank] and self._blocks_P[rank] >= num_blocks)

    def take(self, request: Request, rank: int, num_blocks: int, cached: Cached) -> Admission:
        """Admit a request that needs `num_blocks` free blocks, and count what it takes."""
        num_scheduled = min(len(request.tokens) - cached.num_tokens, int(self._budget_P[rank]))
        self._budget_P[rank] -= num_scheduled
        self._slots_P[rank] -= 1
        self._open_P[rank] = self._slots_P[rank] > 0 and self._budget_P[rank] > 0
        self._blocks_P[rank] -= num_blocks + 1
        self._load_P[rank] += request.limit - cached.num_tokens
        return Admission(request, rank, num_scheduled, *cached)


class PrefixCache:
    """Finds what the ranks have of a request: the longest prefix that is whole in every cache.

    The last token is always left to compute, as the next one is sampled from it; a request for its prompt's log-probabilities
    needs all of it computed.
    """

    def __init__(self, pool: BlockPool, specs: Sequence[CacheSpec], config: SchedulerConfig) -> None:
        self._pool, self._block_size, self._num_ranks = pool, config.block_size, config.num_ranks
        self._windows = {group: spec.window for group, spec in enumerate(specs) if spec.window is not None}
        self._full = [group for group in range(len(specs)) if group not in self._windows]
        self.nothing = Cached(0, [()] * len(specs))

    def names(self, request: Request) -> list[bytes]:
        """Of the blocks that need not be computed if a rank has them."""
        if request.params.prompt_logprobs is not None:
            return []
        return request.names[: (len(request.tokens) - 1) // self._block_size]

    def estimate(self, request: Request) -> np.ndarray | None:
        """How many of the request's first blocks each rank has, probably: i64 [P]; None if nobody has any.

        It is so if a rank that has a block has all those before it, as blocks are given up from the end; `find` makes sure.
        """
        names, group = self.names(request), self._full[0] if self._full else 0
        low, high = 0, len(names)
        while self._full and low < high:  # the first name that nobody has
            middle = (low + high) // 2
            if self._pool.holders(group, names[middle]):
                low = middle + 1
            else:
                high = middle
        cached_P = np.zeros(self._num_ranks, np.int64)
        seen = 0
        for num_blocks in range(high, 0, -1):
            for rank in self._pool.holders(group, names[num_blocks - 1]):
                if not cached_P[rank]:
                    cached_P[rank] = num_blocks
                    seen += 1
            if seen == self._num_ranks:
                break
        return cached_P if seen else None

    def find(self, request: Request, rank: int) -> Cached:
        """What this rank has, for certain."""
        names = self.names(request)
        blocks: dict[int, list[int]] = {}
        for group in self._full:
            blocks[group] = []
            for name in names:
                block = self._pool.holders(group, name).get(rank)
                if block is None:
                    break
                blocks[group].append(block)
            names = names[: len(blocks[group])]
        held = {group: [self._pool.holders(group, name).get(rank) for name in names] for group in self._windows}
        num_blocks = len(names)
        while num_blocks and any(None in held[g][self._first(g, num_blocks) : num_blocks] for g in held):
            num_blocks -= 1
        if not num_blocks:
            return self.nothing
        for group, ids in held.items():
            blocks[group] = [block for block in ids[self._first(group, num_blocks) : num_blocks] if block is not None]
        blocks_G = [blocks[group][:num_blocks] for group in range(len(blocks))]
        return Cached(num_blocks * self._block_size, blocks_G)

    def num_taken(self, cached: Cached, rank: int) -> int:
        """How many free blocks sharing these takes out of the rank's queue, in the cache where it is most."""
        refs_GPB = self._pool.refs_GPB
        return max(int((refs_GPB[g, rank, np.array(ids, int)] == 0).sum()) for g, ids in enumerate(cached.blocks_G))

    def _first(self, group: int, num_blocks: int) -> int:
        """The first block that the token behind `num_blocks` blocks can see in a window."""
        return max(num_blocks * self._block_size - self._windows[group] + 1, 0) // self._block_size
