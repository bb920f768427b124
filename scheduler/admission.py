"""Waiting requests, as the compiled loops want to see them, and what ranks have of them. A requests, W names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertwire.scheduler import block_loops
from expertwire.scheduler.admission_loops import Candidates
from expertwire.scheduler.placement import Placement
from expertwire.scheduler.request import Request
from expertwire.scheduler.table import RunningTable

_NO_NAMES = np.zeros((0, 2), np.uint64)


class PrefixCache:
    """What ranks have of waiting requests.

    The last token is always left to compute, as the next one is sampled from it; a request for its prompt's log-probabilities
    needs all of it computed.
    """

    def __init__(self, table: RunningTable) -> None:
        self._table, self._size = table, table.config.block_size

    def name(self, requests: Sequence[Request]) -> None:
        """Give names to those that have none yet."""
        names = self._table.names
        new = [request for request in requests if request.names is None]
        if names is None or not new:
            return
        empty = [names.empty(request.tenant, request.salt) for request in new]
        name_W2, offsets_A1, sum_A4 = names.name([request.tokens for request in new], empty)
        bounds = offsets_A1.tolist()
        for request, begin, end, prefix_sum in zip(new, bounds, bounds[1:], sum_A4, strict=False):
            request.names, request.prefix_sum = name_W2[begin:end], prefix_sum

    def num_cached(self, request: Request) -> int:
        """How many of its tokens some rank probably has."""
        self.name([request])
        if request.names is None:
            return 0
        useful = self._useful(np.array([len(request.tokens)]), [request])[0]
        blocks, patience = self._table.pool.blocks, self._table.caches.patience
        return block_loops.guess(blocks, request.names[:useful], patience)[0] * self._size

    def candidates(self, requests: Sequence[Request], placement: Placement) -> Candidates:
        """These requests, in this order."""
        self.name(requests)
        num_tokens_A = np.fromiter((len(request.tokens) for request in requests), np.int64, len(requests))
        limit_A = np.fromiter((request.limit for request in requests), np.int64, len(requests))
        useful_A, first_A, name_W2 = np.zeros_like(limit_A), np.zeros_like(limit_A), _NO_NAMES
        if self._table.names is not None:
            names = [request.names for request in requests if request.names is not None]
            name_W2, useful_A = np.concatenate(names), self._useful(num_tokens_A, requests)
            first_A[1:] = np.cumsum(num_tokens_A // self._size)[:-1]
        return Candidates(
            num_tokens_A=num_tokens_A,
            load_A=placement.load(num_tokens_A, np.zeros_like(num_tokens_A), limit_A - num_tokens_A).astype(np.float64),
            first_A=first_A,
            useful_A=useful_A,
            name_W2=name_W2,
        )

    def _useful(self, num_tokens_A: np.ndarray, requests: Sequence[Request]) -> np.ndarray:
        """How many blocks of each need not be computed if a rank has them."""
        useful_A = (num_tokens_A - 1) // self._size
        useful_A[[request.params.prompt_logprobs is not None for request in requests]] = 0
        return useful_A
