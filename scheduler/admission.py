"""What every rank has left for new requests in a step, and what it has already of their prefixes. P ranks, G caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertwire.scheduler import ragged
from expertwire.scheduler.block_pool import BlockPool
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.placement import Placement
from expertwire.scheduler.plan import CacheSpec
from expertwire.scheduler.prefix import PrefixNames, names
from expertwire.scheduler.prefix_index import NOBODY
from expertwire.scheduler.request import Request

_CLOSED = -1  # free blocks of a rank that has no slot or no tokens left, as every request needs one
_NO_NAMES = np.zeros((0, 2), np.uint64)


class Cached(NamedTuple):
    """A beginning of a request that a rank has: its tokens, and in every cache the last blocks of it (all, but for windows)."""

    num_tokens: int
    blocks_G: Sequence[np.ndarray]


class Guess(NamedTuple):
    """How many of a request's first blocks some rank probably has, and which; `NOBODY` if none, `UNKNOWN` if it cannot be said.
    `following` tells the next block, if it is not the last."""

    rank: int
    num_blocks: int
    following: int | None


class Admission(NamedTuple):
    """A request that starts on a rank in this step."""

    request: Request
    rank: int
    num_scheduled: int  # tokens to compute in this step
    num_cached: int  # tokens that need not be computed
    blocks_G: Sequence[np.ndarray]  # that hold them


class Room:
    """Slots, tokens of the step's budget and blocks that every rank has left, and its load; `take` counts admissions.

    Args:
        slots_P: further requests that may run.
        budget_P: tokens.
        blocks_P: free and not promised, less one for every running request: what the next tokens of those will need.
        load_P: f64, as `placement` measures it.
    """

    def __init__(
        self, placement: Placement, slots_P: np.ndarray, budget_P: np.ndarray, blocks_P: np.ndarray, load_P: np.ndarray
    ) -> None:
        self._placement, self._load_P = placement, load_P
        self._slots, self._budget = slots_P.tolist(), budget_P.tolist()  # by rank; quicker than arrays, one at a time
        self._blocks_P = np.where((slots_P > 0) & (budget_P > 0), blocks_P, _CLOSED)

    @property
    def full(self) -> bool:
        """No rank can take anything."""
        return not any(slots > 0 and budget > 0 for slots, budget in zip(self._slots, self._budget, strict=True))

    def choose(self, num_blocks: int, favoured: int, num_cached: int) -> int | None:
        """The rank for a request that needs `num_blocks` free blocks; None: no rank has room. `favoured` has `num_cached` tokens
        of it already, if it is a rank and not -1."""
        return self._placement.choose(self._blocks_P >= num_blocks, self._load_P, favoured, num_cached)

    def fits(self, rank: int, num_blocks: int) -> bool:
        """Whether a rank can take a request that needs `num_blocks` free blocks."""
        return bool(self._blocks_P[rank] >= num_blocks)

    def take(self, request: Request, rank: int, num_blocks: int, num_cached: int) -> int:
        """Admit a request that needs `num_blocks` free blocks, and count what it takes: how many tokens it may compute now."""
        num_tokens = len(request.tokens)
        num_scheduled = min(num_tokens - num_cached, self._budget[rank])
        self._budget[rank] -= num_scheduled
        self._slots[rank] -= 1
        self._blocks_P[rank] -= num_blocks + 1
        if not self._slots[rank] or not self._budget[rank]:
            self._blocks_P[rank] = _CLOSED
        self._load_P[rank] += self._placement.load(num_tokens, num_cached, request.limit - num_tokens)
        return num_scheduled


class PrefixCache:
    """Finds what the ranks have of a request: the longest prefix that is whole in every cache.

    The last token is always left to compute, as the next one is sampled from it; a request for its prompt's log-probabilities
    needs all of it computed.
    """

    def __init__(
        self, pool: BlockPool, specs: Sequence[CacheSpec], config: SchedulerConfig, prefix_names: PrefixNames | None
    ) -> None:
        self._prefix_names = prefix_names
        self._pool, self._block_size, self._num_groups = pool, config.block_size, len(specs)
        self._windows = {group: spec for group, spec in enumerate(specs) if spec.window is not None}
        self._full = [group for group in range(len(specs)) if group not in self._windows]
        self.nothing = Cached(0, [np.zeros(0, np.int64)] * len(specs))

    def name(self, requests: Sequence[Request]) -> None:
        """Give names to those that have none yet."""
        requests = [request for request in requests if request.names is None]
        if self._prefix_names is None or not requests:
            return
        empty_A4 = np.array([self._prefix_names.empty(request.tenant, request.salt) for request in requests])
        sums_B4, offsets = self._prefix_names.prefixes([request.tokens for request in requests], empty_A4)
        names_B2, offsets = names(sums_B4), offsets.tolist()
        for request, empty_4, start, end in zip(requests, empty_A4, offsets[:-1], offsets[1:], strict=True):
            request.names = names_B2[start:end]
            request.prefix_sum = sums_B4[end - 1] if end > start else empty_4

    def guess(self, requests: Sequence[Request]) -> list[Guess]:
        """Who probably has how much of each request; `find` makes sure."""
        self.name(requests)
        names, offsets = self._pack(requests)
        if not len(names):
            return [Guess(NOBODY, 0, None)] * len(requests)
        rank_M = self._pool.guess(names)
        hit_M = np.flatnonzero(rank_M != NOBODY)
        last = np.searchsorted(hit_M, offsets[1:]) - 1  # of each request, the deepest name that anybody has
        has = (last >= 0) & (np.searchsorted(hit_M, offsets[:-1]) <= last)
        deepest = hit_M[last] if len(hit_M) else last
        rank_A = np.where(has, rank_M[deepest], NOBODY)
        depth_A = np.where(has, deepest + 1 - offsets[:-1], 0)
        next_A = offsets[:-1] + depth_A
        following = names[np.minimum(next_A, len(names) - 1), 0].tolist()
        ends = (next_A == offsets[1:]).tolist()
        return [
            Guess(rank, depth, None if end else name)
            for rank, depth, end, name in zip(rank_A.tolist(), depth_A.tolist(), ends, following, strict=True)
        ]

    def find(self, requests: Sequence[Request], ranks: Sequence[int]) -> list[Cached]:
        """What the rank chosen for each request has, for certain."""
        names, offsets = self._pack(requests)
        rank_M = np.repeat(np.array(ranks, np.int64), np.diff(offsets))
        ids_GM = np.array([self._pool.find(group, rank_M, names) for group in range(self._num_groups)])
        ends = offsets[1:].copy()
        for group in self._full:
            missing = np.flatnonzero(ids_GM[group] < 0)
            first = np.append(missing, len(names))[np.searchsorted(missing, offsets[:-1])]
            ends = np.minimum(ends, np.maximum(first, offsets[:-1]))
        return [
            self._cached(ids_GM[:, start:end]) for start, end in zip(offsets[:-1].tolist(), ends.tolist(), strict=True)
        ]

    def _cached(self, ids_GB: np.ndarray) -> Cached:
        """The longest beginning of these blocks at whose end every window is whole."""
        num_blocks = ids_GB.shape[1]
        while self._windows and num_blocks and not self._windows_are_whole(ids_GB, num_blocks):
            num_blocks -= 1
        if not num_blocks:
            return self.nothing
        blocks_G = [
            ids[self._first(group, num_blocks) if group in self._windows else 0 : num_blocks]
            for group, ids in enumerate(ids_GB)
        ]
        return Cached(num_blocks * self._block_size, blocks_G)

    def _windows_are_whole(self, ids_GB: np.ndarray, num_blocks: int) -> bool:
        return all((ids_GB[g, self._first(g, num_blocks) : num_blocks] >= 0).all() for g in self._windows)

    def _pack(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """The names of the blocks that need not be computed if a rank has them, u64 [M, 2], of all requests, one behind the
        other, and where each one's lie."""
        parts = [self._useful(request) for request in requests]
        return np.concatenate(parts), ragged.offsets(np.fromiter(map(len, parts), np.int64, len(parts)))

    def _useful(self, request: Request) -> np.ndarray:
        if request.names is None or request.params.prompt_logprobs is not None:
            return _NO_NAMES
        return request.names[: (len(request.tokens) - 1) // self._block_size]

    def num_taken(self, cached: Cached, rank: int) -> int:
        """How many free blocks sharing these takes out of the rank's queue, in the cache where it is most."""
        refs_GPB = self._pool.refs_GPB
        return max(np.count_nonzero(refs_GPB[g, rank, ids] == 0) for g, ids in enumerate(cached.blocks_G))

    def _first(self, group: int, num_blocks: int) -> int:
        """The first block that the token behind `num_blocks` blocks can see in a window."""
        return int(self._windows[group].first_seen(num_blocks * self._block_size, self._block_size))
