"""Waiting requests, as the compiled loops want to see them, and what ranks have of them. A requests, W names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertwire.scheduler._compiled import blocks as block_loops
from expertwire.scheduler._compiled.admissions import Candidates
from expertwire.scheduler.rank_placement import Placement
from expertwire.scheduler.request import Request, facts
from expertwire.scheduler.running import NO_NAMES, RunningTable


class PrefixCache:
    """What ranks have of waiting requests.

    The last token is always left to compute, as the next one is sampled from it; a request for its prompt's log-probabilities
    needs all of it computed.
    """

    def __init__(self, table: RunningTable) -> None:
        self._table, self._size = table, table.config.block_size

    def num_cached(self, request: Request) -> int:
        """How many of its tokens some rank probably has."""
        if request.names is None:
            return 0
        useful = self._useful(facts([request]))[0]
        blocks, patience = self._table.pool.blocks, self._table.caches.patience
        return block_loops.guess(blocks, request.names[:useful], patience)[0] * self._size

    def candidates(self, requests: Sequence[Request], placement: Placement) -> Candidates:
        """These requests, in this order."""
        fact_A = facts(requests)
        num_tokens_A = fact_A["num_tokens"].astype(np.int64)
        useful_A, first_A, name_W2 = np.zeros_like(num_tokens_A), np.zeros_like(num_tokens_A), NO_NAMES
        if self._table.names is not None:
            name_W2 = np.concatenate([request.names for request in requests])
            useful_A = self._useful(fact_A)
            first_A[1:] = np.cumsum(num_tokens_A // self._size + 2)[:-1]
        load_A = placement.load(num_tokens_A, np.zeros_like(num_tokens_A), fact_A["limit"] - num_tokens_A)
        return Candidates(
            num_tokens_A=num_tokens_A,
            load_A=load_A.astype(np.float64),
            first_A=first_A,
            useful_A=useful_A,
            name_W2=name_W2,
        )

    def _useful(self, fact_A: np.ndarray) -> np.ndarray:
        """How many blocks of each need not be computed if a rank has them: i64."""
        return np.where(fact_A["may_begin_cached"], (fact_A["num_tokens"] - 1) // self._size, 0)
