"""Which waiting requests start in a step, and on which ranks.

`rows` are rows of the running table.
"""

from __future__ import annotations

import numpy as np

from expertwire.scheduler.admission import PrefixCache, Room
from expertwire.scheduler.placement import Placement
from expertwire.scheduler.policy import Policy
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import Request
from expertwire.scheduler.table import Admission, RunningTable


class Admitter:
    """Takes requests in the policy's order, until one finds no room.

    Attributes:
        forks: the keys of waiting requests that go on from running ones, and the rows of these.
    """

    def __init__(self, table: RunningTable, queue: WaitingQueue, policy: Policy, placement: Placement) -> None:
        self._table, self._queue = table, queue
        self._policy, self._placement = policy, placement
        self._prefixes = PrefixCache(table)
        self.forks: dict[int, int] = {}

    def choose(self, budget_P: np.ndarray) -> list[Admission]:
        """The requests that start now, sorted by rank. `budget_P`: tokens of the step that every rank has left."""
        if not self._queue or not (budget_P > 0).any():
            return []
        room = Room(self._table, self._placement, budget_P)
        if room.full:
            return []
        chosen = self._continue_forks(room)
        queue = self._policy.order(self._queue, self._num_cached)
        if chosen:
            forked = {admission.request.key for admission in chosen}
            queue = (request for request in queue if request.key not in forked)
        arriving = set(self._table.names_next().tolist())
        for request in queue:
            guess = self._prefixes.guess(request)
            if guess.following in arriving:  # its next block is being computed: it does better to wait for that
                continue
            num_tokens, rank = len(request.tokens), guess.rank
            num_cached = guess.num_blocks * self._table.config.block_size
            rank = room.choose(num_tokens, guess.rank, num_cached)
            if rank is not None:
                num_cached = self._prefixes.find(request, rank)[0] if guess.num_blocks else 0
            elif guess.rank >= 0:  # there is room, perhaps, beside what it shares
                num_cached, taken_G = self._prefixes.find(request, guess.rank)
                rank = guess.rank if room.fits_beside(guess.rank, num_tokens - num_cached, taken_G) else None
            if rank is None:
                break
            num_scheduled = room.take(request, rank, num_cached)
            chosen.append(Admission(request, rank, num_scheduled, num_cached))
            if guess.following is not None:
                arriving.add(guess.following)
        chosen.sort(key=lambda admission: admission.rank)
        return chosen

    def parents_left(self, rows: np.ndarray) -> None:
        """The requests of these rows run no more: forks of them wait as any other."""
        if self.forks:
            self.forks = {child: row for child, row in self.forks.items() if row not in rows}

    def _continue_forks(self, room: Room) -> list[Admission]:
        """Forks that start beside the request that they continue, with its blocks; those without room there wait as any other."""
        table, chosen = self._table, []
        for key, row in self.forks.items():
            child, rank = self._queue.get(key), int(table.rank_N[row])
            self._prefixes.name(child)
            num_cached = 0 if table.draining_N[row] else table.shareable(row, len(child.tokens) - 1)
            # One more than it lacks, as the last block may have to be copied.
            if num_cached and room.fits_beside(rank, len(child.tokens) - num_cached, 1):
                num_scheduled = room.take(child, rank, num_cached)
                chosen.append(Admission(child, rank, num_scheduled, num_cached, parent=row))
        self.forks.clear()
        return chosen

    def _num_cached(self, request: Request) -> int:
        return self._prefixes.guess(request).num_blocks * self._table.config.block_size
