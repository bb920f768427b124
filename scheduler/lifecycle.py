"""The states of unfinished requests, and how they go from one to another: waiting, following, running, held, ended.

`rows` are rows of the running batch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence

import numpy as np

from expertwire.scheduler.admission import Admission
from expertwire.scheduler.config import SchedulerConfig
from expertwire.scheduler.groups import WaitingGroups
from expertwire.scheduler.limits import is_long
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import Request
from expertwire.scheduler.running import RunningBatch
from expertwire.scheduler.tenants import TenantAccounts


class Lifecycle:
    """The unfinished requests of a scheduler by their states.

    Attributes:
        queue: those that wait.
        groups: those that wait for a leader to compute what they have in common with it.
        running: those in rows of the batch, by key.
        held: those without credit, and those that are paused and have lost their rows, by key.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        batch: RunningBatch,
        queue: WaitingQueue,
        groups: WaitingGroups,
        tenants: TenantAccounts,
        admission: Admission,
    ) -> None:
        self.queue, self.groups = queue, groups
        self.running: dict[int, Request] = {}
        self.held: dict[int, Request] = {}
        self._config, self._batch, self._tenants, self._admission = config, batch, tenants, admission
        self._ended: list[int] = []  # rows to release in the next plan
        self._gave_way: list[Request] = []  # to those that this plan admits

    @property
    def has_ended(self) -> bool:
        """Return whether rows wait to be released."""
        return bool(self._ended)

    def find(self, key: int) -> Request | None:
        """Return the waiting, running or held request with this key, or None."""
        return self.running.get(key) or self.held.get(key) or self.queue.find(key) or self.groups.find(key)

    def unfinished(self) -> list[int]:
        """Return the keys of all requests that are waiting, running or held."""
        waiting = itertools.chain(self.queue, self.groups)
        return [*(request.key for request in waiting), *self.running, *self.held]

    def lead(self, requests: Sequence[Request]) -> None:
        """Let the first of these branches, which have computed nothing, wait in the queue and lead the others."""
        if not requests:
            return
        leader, *followers = requests
        self.enqueue(leader)
        if leader.key in self.held:
            for follower in followers:
                self.enqueue(follower)
        elif followers:
            for follower in followers:
                self.queue.number(follower)
            self.groups.add(leader, followers)

    def lead_others(self, key: int) -> None:
        """Let the followers of a request, which has ended, wait without it."""
        if key in self.groups:
            self.lead(self.groups.cut(key, 0))

    def classify(self, request: Request) -> None:
        """Set whether the request is long (LongRoPE), and hash its prompt blocks apart from those of the other kind."""
        original = self._config.original_max_position_embeddings
        request.is_long = is_long(request, self._config)
        request.outgrows_at = sys.maxsize if original is None or request.is_long else original + 1
        if self._batch.hasher is not None:
            kind = request.tenant, request.salt, request.is_long
            request.block_hashes = self._batch.hasher.hash(request.tokens, *kind)

    def enqueue(self, request: Request) -> None:
        """Put a request in its place in the queue, and pack its record; hold it if it has no credit."""
        if request.held:
            self.held[request.key] = request
            return
        self.queue.add(request)
        request.record = request.pack(self._config.vocab_size)

    def release(self) -> np.ndarray:
        """Empty the rows of ended requests, and of preempted ones with nothing in flight; return them."""
        batch = self._batch
        if batch.draining_Z.any():
            draining = np.flatnonzero(batch.draining_Z & batch.running_Z)
            self.suspend(draining[batch.in_flight_Z[draining] == 0])
        ended, self._ended = self._ended, []
        rows = np.array(sorted(ended), np.int64)
        if len(rows):
            batch.release(rows)
        return rows

    def close(self, rows: np.ndarray) -> None:
        """End these rows' requests for good."""
        for request, num_tokens in zip(self._end(rows), self._batch.num_known_Z[rows].tolist(), strict=True):
            self._tenants.ended(request, num_tokens)
            self.lead_others(request.key)

    def suspend(self, rows: np.ndarray) -> None:
        """Stop running these rows' requests, which have nothing in flight; they continue later with their output so far."""
        self._put_back(self._saved(rows, self._end(rows)))

    def give_way(self, rows: np.ndarray) -> None:
        """Suspend these rows' requests at once, and release their slots; what is in flight for them is dropped."""
        self._gave_way += self._saved(rows, self._stop(rows))
        self._batch.release(rows)

    def take_suspended(self) -> np.ndarray:
        """Return to the queue what has given way since the last call; return the rows."""
        gave_way, self._gave_way = self._gave_way, []
        suspended = np.array([request.row for request in gave_way], np.int64)
        self._put_back(gave_way)
        return suspended

    def check_integrity(self) -> None:
        """Assert that queue, batch and groups agree."""
        batch = self._batch
        rows = np.flatnonzero(batch.running_Z)
        keys = batch.key_Z[rows].tolist()
        assert sorted(keys) == sorted(self.running), (keys, list(self.running))
        assert not any(request.key in self.running or request.held for request in self.queue)
        assert all(request.held and key not in self.running for key, request in self.held.items())
        ended = np.flatnonzero(batch.occupied_Z & ~batch.running_Z).tolist()
        assert ended == sorted(self._ended), (ended, self._ended)
        self.groups.check_integrity()
        assert all((key in self.running) == (rank >= 0) for key, rank in self.groups.ranks().items())
        assert all(key in self.running or key in self.queue for key in self.groups.ranks()), self.groups.ranks()
        assert (batch.num_free_P >= self.groups.reserved_P).all(), self.groups.reserved_P

    def _end(self, rows: np.ndarray) -> list[Request]:
        """Stop running these rows' requests, and return them; the next plan releases their slots."""
        self._ended += rows.tolist()
        return self._stop(rows)

    def _stop(self, rows: np.ndarray) -> list[Request]:
        self._admission.forget_parents(rows)
        self._batch.running_Z[rows] = False
        requests = [self.running.pop(key) for key in self._batch.key_Z[rows].tolist()]
        for request in requests:
            request.account.num_running -= 1
            self.groups.stopped(request.key)
        return requests

    def _saved(self, rows: np.ndarray, requests: list[Request]) -> list[Request]:
        """Return the requests that these rows have run, with their output so far."""
        batch = self._batch
        for row, request in zip(rows.tolist(), requests, strict=True):
            request.tokens = batch.tokens(row, request)
            request.block_hashes = batch.block_hashes(row)
            request.num_cached = int(batch.num_cached_Z[row])
            request.num_counted = max(request.num_counted, int(batch.num_computed_Z[row]))
        return requests

    def _put_back(self, requests: list[Request]) -> None:
        for request in requests:
            request.row = -1
            if len(request.tokens) >= request.outgrows_at:
                self.classify(request)
            self.enqueue(request)
