"""What every rank has left for new requests in a step, and what it has already of their prefixes. P ranks, G caches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from expertwire.scheduler import block_loops, row_loops
from expertwire.scheduler.placement import Placement
from expertwire.scheduler.request import Request
from expertwire.scheduler.table import RunningTable

_NOTHING = np.zeros((0, 2), np.uint64)


class Guess(NamedTuple):
    """How many of a request's first blocks some rank probably has, and which; `NOBODY` if none, `UNKNOWN` if it cannot be said.
    `following` tells the next block, if it is not the last."""

    rank: int
    num_blocks: int
    following: int | None


class Room:
    """Slots, tokens of the step's budget (`budget_P`) and blocks that every rank has left, and its load; `take` counts
    admissions."""

    def __init__(self, table: RunningTable, placement: Placement, budget_P: np.ndarray) -> None:
        config = table.config
        self._caches, self._placement, self._load_P = table.caches, placement, table.load_P(placement)
        slots_P = min(config.max_running, config.max_num_tokens) - table.count_P(table.occupied_N)
        self._slots, self._budget = slots_P.tolist(), budget_P.tolist()  # by rank; quicker than arrays, one at a time
        self._open_P = (slots_P > 0) & (budget_P > 0)
        # Free and not promised, less one for every running request: what the next tokens of those will need.
        self._blocks_GP = table.pool.num_free_GP - table.promised_GP() - table.count_P(table.running_N)
        self._needed_G = np.zeros(len(self._blocks_GP), np.int64)
        self._fits_P = np.zeros(len(slots_P), bool)

    @property
    def full(self) -> bool:
        """No rank can take anything."""
        return not self._open_P.any()

    def choose(self, num_tokens: int, favoured: int, num_cached: int) -> int | None:
        """The rank for a request of so many tokens; None: no rank has room. `favoured` has `num_cached` tokens of it already, if
        it is a rank and not negative."""
        row_loops.fitting(self._caches, num_tokens, self._open_P, self._blocks_GP, self._needed_G, self._fits_P)
        return self._placement.choose(self._fits_P, self._load_P, favoured, num_cached)

    def fits_beside(self, rank: int, num_tokens: int, taken_G: np.ndarray | int) -> bool:
        """Whether a rank can take a request that has so many tokens besides those that are in `taken_G` of its free blocks."""
        row_loops.fitting(self._caches, num_tokens, self._open_P, self._blocks_GP, self._needed_G, self._fits_P)
        self._needed_G += taken_G
        return bool(self._open_P[rank] and (self._blocks_GP[:, rank] >= self._needed_G).all())

    def take(self, request: Request, rank: int, num_cached: int) -> int:
        """Admit the request asked about last, and count what it takes: how many tokens it may compute now."""
        num_tokens = len(request.tokens)
        num_scheduled = min(num_tokens - num_cached, self._budget[rank])
        self._budget[rank] -= num_scheduled
        self._slots[rank] -= 1
        row_loops.occupy(self._needed_G, rank, self._blocks_GP)
        if not self._slots[rank] or not self._budget[rank]:
            self._open_P[rank] = False
        self._load_P[rank] += self._placement.load(num_tokens, num_cached, request.limit - num_tokens)
        return num_scheduled


class PrefixCache:
    """Finds what the ranks have of a request: the longest prefix that is whole in every cache.

    The last token is always left to compute, as the next one is sampled from it; a request for its prompt's log-probabilities
    needs all of it computed.
    """

    def __init__(self, table: RunningTable) -> None:
        self._table = table
        self._size = table.config.block_size

    def name(self, request: Request) -> None:
        """Give it its names, if it has none yet."""
        names = self._table.names
        if names is not None and request.names is None:
            request.names, request.prefix_sum = names.name(request.tokens, names.empty(request.tenant, request.salt))

    def guess(self, request: Request) -> Guess:
        """Who probably has how much of it; `find` makes sure."""
        self.name(request)
        names_W2 = self._useful(request)
        num_blocks, rank = block_loops.guess(self._table.pool.blocks, names_W2)
        return Guess(rank, num_blocks, int(names_W2[num_blocks, 0]) if num_blocks < len(names_W2) else None)

    def find(self, request: Request, rank: int) -> tuple[int, np.ndarray]:
        """How many of its tokens the rank has, for certain; how many free blocks sharing these takes out of its circles, [G]."""
        table = self._table
        taken_G = np.zeros(len(table.specs), np.int64)
        depth = block_loops.find_prefix(
            table.caches, table.pool.blocks, rank, self._useful(request), self._size, taken_G
        )
        return depth * self._size, taken_G

    def _useful(self, request: Request) -> np.ndarray:
        """The names of the blocks that need not be computed if a rank has them."""
        if request.names is None or request.params.prompt_logprobs is not None:
            return _NOTHING
        return request.names[: (len(request.tokens) - 1) // self._size]
