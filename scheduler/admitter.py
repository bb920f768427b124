"""Which waiting requests start in a step, and on which ranks. P ranks, G caches.

`rows` are rows of the running table.
"""

from __future__ import annotations

from itertools import islice

import numpy as np

from expertwire.scheduler.admission import Admission, PrefixCache, Room
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.placement import Placement
from expertwire.scheduler.policy import Policy
from expertwire.scheduler.prefix_index import NOBODY
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import Request
from expertwire.scheduler.table import RunningTable

_LOOK_AHEAD = 64  # waiting requests that are looked up together


class Admitter:
    """Takes requests in the policy's order, until one finds no room.

    Attributes:
        forks: the keys of waiting requests that go on from running ones, and the rows of these.
    """

    def __init__(
        self, config: SchedulerConfig, table: RunningTable, queue: WaitingQueue, policy: Policy, placement: Placement
    ) -> None:
        self._config, self._table, self._queue = config, table, queue
        self._policy, self._placement = policy, placement
        self._prefixes = PrefixCache(table.pool, table.specs, config, table.names)
        self._most_blocks = int(table.most_blocks_G.max())
        self.forks: dict[int, int] = {}

    def choose(self, budget_P: np.ndarray) -> list[Admission]:
        """The requests that start now, sorted by rank. `budget_P`: tokens of the step that every rank has left."""
        if not self._queue or not (budget_P > 0).any():
            return []
        table, config = self._table, self._config
        slots_P = min(config.max_running, config.max_num_tokens) - table.count_P(table.occupied_N)
        blocks_P = (table.pool.num_free_GP - table.promised_GP()).min(axis=0) - table.count_P(table.running_N)
        room = Room(self._placement, slots_P, budget_P, blocks_P, table.load_P(self._placement))
        if room.full:
            return []
        chosen = self._continue_forks(room)
        queue = self._policy.order(self._queue, self._num_cached)
        if chosen:
            forked = {admission.request.key for admission in chosen}
            queue = (request for request in queue if request.key not in forked)
        queue, going_on = iter(queue), True
        arriving = set(table.names_next().tolist())
        while going_on and (batch := list(islice(queue, _LOOK_AHEAD))):
            found, going_on = self._find_places(batch, room, arriving)
            chosen += found
        chosen.sort(key=lambda admission: admission.rank)
        return chosen

    def parent_left(self, row: int) -> None:
        """The request of this row runs no more: forks of it wait as any other."""
        if self.forks:
            self.forks = {child: parent_row for child, parent_row in self.forks.items() if parent_row != row}

    def _find_places(self, requests: list[Request], room: Room, arriving: set[int]) -> tuple[list[Admission], bool]:
        """Admit these requests, in this order, but for those whose next block is being computed: these do better to wait for it.

        Returns:
            The admissions, and whether every request found room.
        """
        size, everyone = self._config.block_size, True
        taken: list[tuple[Request, int, int]] = []
        hopeful = []  # places in `taken`
        for request, guess in zip(requests, self._prefixes.guess(requests), strict=True):
            if guess.following in arriving:
                continue
            num_blocks = min(self._config.blocks_for(len(request.tokens)), self._most_blocks)
            rank = room.choose(num_blocks, guess.rank, guess.num_blocks * size)
            if rank is None and guess.rank >= 0:  # there is room, perhaps, beside what it shares
                cached = self._prefixes.find([request], [guess.rank])[0]
                left = self._config.blocks_for(len(request.tokens) - cached.num_tokens)
                num_blocks = min(left, self._most_blocks) + self._prefixes.num_taken(cached, guess.rank)
                rank = guess.rank if room.fits(guess.rank, num_blocks) else None
            if rank is None:
                everyone = False
                break
            num_scheduled = room.take(request, rank, num_blocks, guess.num_blocks * size if rank == guess.rank else 0)
            if guess.rank != NOBODY:
                hopeful.append(len(taken))
            taken.append((request, rank, num_scheduled))
            if guess.following is not None:
                arriving.add(guess.following)
        cached_A = [self._prefixes.nothing] * len(taken)
        if hopeful:
            found = self._prefixes.find([taken[i][0] for i in hopeful], [taken[i][1] for i in hopeful])
            for i, cached in zip(hopeful, found, strict=True):
                cached_A[i] = cached
        admissions = [
            Admission(request, rank, min(num_scheduled, len(request.tokens) - cached.num_tokens), *cached)
            for (request, rank, num_scheduled), cached in zip(taken, cached_A, strict=True)
        ]
        return admissions, everyone

    def _continue_forks(self, room: Room) -> list[Admission]:
        """Forks that start beside the request that they continue, with its blocks; those without room there wait as any other."""
        table, chosen = self._table, []
        self._prefixes.name([self._queue.get(key) for key in self.forks])
        for key, row in self.forks.items():
            child, rank = self._queue.get(key), int(table.rank_N[row])
            num_cached = min(int(table.num_computed_N[row]), len(child.tokens) - 1)
            num_held = self._config.blocks_for(num_cached)
            needed = self._config.blocks_for(len(child.tokens)) - num_held + 1  # the last block may have to be copied
            first_G = table.num_dropped_GN[:, row]
            seen_G = [spec.first_seen(num_cached, self._config.block_size) for spec in table.specs]
            holds_all = num_cached and (first_G <= seen_G).all()
            if holds_all and not table.draining_N[row] and room.fits(rank, needed):
                blocks_G = [table.block_ids_GNB[g, row, first:num_held] for g, first in enumerate(first_G)]
                num_scheduled = room.take(child, rank, needed, num_cached)
                chosen.append(Admission(child, rank, num_scheduled, num_cached, blocks_G))
        self.forks.clear()
        return chosen

    def _num_cached(self, request: Request) -> int:
        return self._prefixes.guess([request])[0].num_blocks * self._config.block_size
