"""Which waiting requests start in a step, and on which ranks.

`rows` are rows of the running table. P ranks, A requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from expertwire.scheduler._compiled import admissions
from expertwire.scheduler._compiled.admissions import Chosen, Room
from expertwire.scheduler._compiled.blocks import NOBODY
from expertwire.scheduler.admission import PrefixCache
from expertwire.scheduler.policy import Policy
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.rank_placement import Placement
from expertwire.scheduler.request import Request, facts
from expertwire.scheduler.running import NO_ADMISSIONS, NO_NAMES, Admissions, RunningTable

_AT_ONCE = 128  # requests looked at together


class _Part(NamedTuple):
    """Some that start."""

    requests: list[Request]
    columns_5A: np.ndarray  # what `Admissions` says of each, but for the facts
    name_W2: np.ndarray  # theirs, and others'


def _joined(parts: Sequence[_Part]) -> Admissions:
    """All of them, sorted by rank."""
    num_names = 0
    for part in parts:
        part.columns_5A[4] += num_names
        num_names += len(part.name_W2)
    requests = [request for part in parts for request in part.requests]
    columns_5A = np.concatenate([part.columns_5A for part in parts], axis=1)
    order = np.argsort(columns_5A[0], kind="stable")
    requests = [requests[i] for i in order.tolist()]
    name_W2 = np.concatenate([part.name_W2 for part in parts])
    return Admissions(requests, *columns_5A[:, order], facts(requests), name_W2)


class Admitter:
    """Takes requests in the policy's order, until one finds no room.

    Attributes:
        forks: the keys of waiting requests that go on from running ones, and the rows of these.
    """

    def __init__(self, table: RunningTable, queue: WaitingQueue, policy: Policy, placement: Placement) -> None:
        self._table, self._queue = table, queue
        self._policy, self._placement = policy, placement
        self._prefixes = PrefixCache(table)
        self._arriving_U = np.zeros(1 << len(table.rank_N).bit_length(), np.uint64)
        self.forks: dict[int, int] = {}

    def choose(self, budget_P: np.ndarray) -> Admissions:
        """The requests that start now. `budget_P`: tokens of the step that every rank has left."""
        if not self._queue or not (budget_P > 0).any():
            return NO_ADMISSIONS
        room = self._room(budget_P)
        if not ((room.slots_P > 0) & (budget_P > 0)).any():
            return NO_ADMISSIONS
        forks = self._continue_forks(room)
        parts = [*forks, *self._from_queue(room, {part.requests[0].key for part in forks})]
        return _joined(parts) if any(part.requests for part in parts) else NO_ADMISSIONS

    def parents_left(self, rows: np.ndarray) -> None:
        """The requests of these rows run no more: forks of them wait as any other."""
        if self.forks:
            self.forks = {child: row for child, row in self.forks.items() if row not in rows}

    def _room(self, budget_P: np.ndarray) -> Room:
        table, config = self._table, self._table.config
        room = Room(
            slots_P=np.full(config.num_ranks, min(config.max_num_seqs, config.max_num_batched_tokens)),
            budget_P=budget_P,
            blocks_GP=table.pool.num_free_GP.copy(),
            load_P=self._placement.load_P(table.load_P(self._placement), table.num_given_P).astype(np.float64),
            fits_P=np.zeros(config.num_ranks, bool),
        )
        due_N = np.empty(len(table.rank_N), np.int32)
        admissions.take_stock(table.caches, table.for_loops, room, self._arriving_U, due_N)
        return room

    def _continue_forks(self, room: Room) -> list[_Part]:
        """Forks that start beside the request that they continue, with its blocks, one by one; those without room there wait as
        any other."""
        table, parts = self._table, []
        needed_G = np.zeros(len(table.specs), np.int64)
        for key, row in self.forks.items():
            child, rank = self._queue.get(key), int(table.rank_N[row])
            num_tokens = len(child.tokens)
            num_cached = 0 if table.draining_N[row] else table.shareable(row, num_tokens - 1)
            admissions.needs(table.caches, num_tokens - num_cached, needed_G)
            needed_G += 1  # as the last block may have to be copied
            if num_cached and admissions.fits(room, rank, needed_G):
                load = self._placement.load(*np.array([[num_tokens], [num_cached], [child.limit - num_tokens]]))
                num = admissions.take(room, rank, needed_G, num_tokens - num_cached, float(load[0]))
                names_W2 = NO_NAMES if child.names is None else child.names
                parts.append(_Part([child], np.array([[rank], [num_cached], [num], [row], [0]]), names_W2))
        self.forks.clear()
        return parts

    def _from_queue(self, room: Room, forked: set[int]) -> Iterator[_Part]:
        """Others, a few at a time."""
        table, credit = self._table, self._placement.credit
        queue = self._policy.order(self._queue, self._prefixes.num_cached)
        queue = (request for request in queue if request.key not in forked) if forked else iter(queue)
        while (most := min(_AT_ONCE, int(room.slots_P.sum()))) and (requests := list(islice(queue, most))):
            candidates = self._prefixes.candidates(requests, self._placement)
            columns = np.full((5, len(requests)), NOBODY)
            columns[4] = candidates.first_A
            count = admissions.choose(
                table.caches,
                table.pool.blocks,
                table.config.block_size,
                room,
                candidates,
                -1.0 if credit is None else credit,
                self._arriving_U,
                Chosen(*columns[:3]),
                *np.zeros((2, len(table.specs)), np.int64),
            )
            starts = np.flatnonzero(columns[0] != NOBODY)
            yield _Part([requests[i] for i in starts.tolist()], columns[:, starts], candidates.name_W2)
            if count < len(requests):
                break
