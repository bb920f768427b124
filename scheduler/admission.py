"""Admission: which waiting requests start in a step on which ranks.

`rows` are rows of the running batch. P ranks, A requests, B blocks, C KV cache groups, Q entries of
a hash table, S scheduled requests, Z slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from expertwire.scheduler._compiled import admissions as loops
from expertwire.scheduler._compiled import prefixes as prefix_loops
from expertwire.scheduler._compiled.admissions import Budget, Candidates, Decisions
from expertwire.scheduler._compiled.blocks import LEADER, NONE
from expertwire.scheduler.block_copies import TailCopies
from expertwire.scheduler.groups import WaitingGroups
from expertwire.scheduler.load_balancing import LoadBalancing
from expertwire.scheduler.policy import Policy
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import NO_HASHES, Request, records
from expertwire.scheduler.running import NO_ADMISSIONS, Admissions, RunningBatch
from expertwire.scheduler.tenants import Account

_CHUNK = 128  # requests considered at a time
# Suspends running requests so that one fits, and adds what they leave to the budget, or returns False; told what starts already.
MakeRoom = Callable[[Request, Sequence[Request], Budget], bool]


class _Part(NamedTuple):
    """Some requests that start."""

    requests: list[Request]
    columns_5A: np.ndarray  # rank_A to first_A of `Admissions`
    hash_B2: np.ndarray  # of these requests, and of others


def _joined(parts: Sequence[_Part]) -> Admissions:
    """Return all parts' requests, sorted by rank."""
    num_hashes = 0
    for part in parts:
        part.columns_5A[4] += num_hashes
        num_hashes += len(part.hash_B2)
    requests = [request for part in parts for request in part.requests]
    columns_5A = np.concatenate([part.columns_5A for part in parts], axis=1)
    order = np.argsort(columns_5A[0], kind="stable")
    requests = [requests[i] for i in order.tolist()]
    hash_B2 = np.concatenate([part.hash_B2 for part in parts])
    # Contiguous, so that the loops are compiled for one kind of array.
    rank_A, num_cached_A, num_scheduled_A, parent_A, first_A = np.ascontiguousarray(columns_5A[:, order])
    record_A = records(requests)
    return Admissions(requests, rank_A, num_cached_A, num_scheduled_A, parent_A, first_A, record_A, hash_B2)


class QuotaCheck:
    """Tells which waiting requests the quotas of their tenants let start in one step; each that it lets start counts."""

    def __init__(self, batch: RunningBatch) -> None:
        self._batch = batch
        self._num_starting: dict[Account, int] = {}
        self._used_C: dict[Account, np.ndarray] = {}  # blocks, with those of the requests that start

    def __call__(self, request: Request) -> bool:
        account, quota = request.account, request.account.quota
        num_starting = self._num_starting.get(account, 0)
        num_running = account.num_running + account.num_reserved + num_starting
        if quota.max_running is not None and num_running >= quota.max_running:
            return False
        if quota.kv_share is not None:
            used_C = self._blocks(account) + self._needed(request)
            if num_running and (used_C > quota.kv_share * self._num_blocks_C).any():
                return False
            self._used_C[account] = used_C
        self._num_starting[account] = num_starting + 1
        return True

    @property
    def _num_blocks_C(self) -> np.ndarray:
        return self._batch.pool.num_blocks_C * self._batch.config.num_ranks

    def _blocks(self, account: Account) -> np.ndarray:
        """Return how many blocks of each cache the tenant holds, i64 [C]; shared ones count for each that holds them."""
        if (used_C := self._used_C.get(account)) is None:
            rows = np.flatnonzero(self._batch.running_Z & (self._batch.tenant_Z == account.index))
            used_C = self._used_C[account] = self._batch.num_blocks_of(rows).sum(axis=1)
        return used_C

    def _needed(self, request: Request) -> np.ndarray:
        needed_C = np.zeros(len(self._batch.specs), np.int64)
        loops.blocks_needed(self._batch.caches, len(request.tokens), needed_C)
        return np.minimum(needed_C + 1, self._batch.caches.most_C)


class Admission:
    """Admits requests in the policy's order, until one fits on no rank.

    Args:
        groups: whose leaders wait or run.
        quotas_hold: whether tenants have quotas that let requests wait.

    Attributes:
        forks: the keys of waiting forks, with the rows of the requests that they continue and how many tokens are the same.
        complete: the leaders whose known tokens this step computes, and how many of their followers start.
    """

    def __init__(
        self,
        batch: RunningBatch,
        copies: TailCopies,
        queue: WaitingQueue,
        policy: Policy,
        balancing: LoadBalancing,
        groups: WaitingGroups,
        *,
        quotas_hold: bool = False,
    ) -> None:
        self._batch, self._copies, self._queue, self._groups = batch, copies, queue, groups
        self._policy, self._balancing = policy, balancing
        self._quotas_hold = quotas_hold
        config = batch.config
        self._never_used = max(config.max_num_seqs - config.max_num_batched_tokens, 0)  # slots of a rank
        self.make_room: MakeRoom | None = None  # for a request that fits nowhere
        self._starting: list[Request] = []  # in this step
        self._in_progress = np.zeros(1 << len(batch.rank_Z).bit_length(), np.uint64)
        self.forks: dict[int, tuple[int, int]] = {}
        self.complete: dict[int, int] = {}

    def choose(self, tokens_P: np.ndarray) -> Admissions:
        """Choose the requests that start now. `tokens_P`: what every rank's token budget has left."""
        if not self._queue:
            return NO_ADMISSIONS
        slots_P = self._batch.num_free_P - self._groups.reserved_P - self._never_used
        if not ((tokens_P > 0) & ((slots_P > 0) | (self.make_room is not None))).any():
            return NO_ADMISSIONS
        budget = self._compute_budget(slots_P, tokens_P)
        may_start = QuotaCheck(self._batch) if self._quotas_hold else None
        forks = self._admit_forks(budget, may_start)
        self._starting = [part.requests[0] for part in forks]
        parts = [*forks, *self._admit_queued(budget, {part.requests[0].key for part in forks}, may_start)]
        return _joined(parts) if any(part.requests for part in parts) else NO_ADMISSIONS

    def add_fork(self, request: Request, parent: Request, tokens: np.ndarray) -> None:
        """Let a waiting request start beside a running one, which has `tokens`, in the next plan if it fits."""
        if request.is_long != parent.is_long or (request.tenant, request.salt) != (parent.tenant, parent.salt):
            return
        mine = request.tokens
        most = min(len(mine), len(tokens))
        differs = mine[:most] != tokens[:most]
        num_common = int(differs.argmax()) if differs.any() else most
        self.forks[request.key] = parent.row, num_common

    def forget_parents(self, rows: np.ndarray) -> None:
        """Let forks of these rows, which run no more, wait like any other request."""
        if self.forks:
            self.forks = {child: (row, num) for child, (row, num) in self.forks.items() if row not in rows}

    def _compute_budget(self, slots_P: np.ndarray, tokens_P: np.ndarray) -> Budget:
        batch, config, balancing = self._batch, self._batch.config, self._balancing
        load_Z = balancing.load(batch.num_tokens_Z, batch.num_computed_Z, batch.limit_Z - batch.num_tokens_Z)
        budget = Budget(
            slots_P=slots_P,
            tokens_P=tokens_P,
            blocks_CP=batch.pool.num_free_CP.copy(),
            load_P=balancing.load_P(batch.sum_P(load_Z), batch.num_admitted_P).astype(np.float64),
            fits_P=np.zeros(config.num_ranks, bool),
        )
        due_Z = np.empty(len(batch.rank_Z), np.int32)
        loops.charge_running(batch.caches, batch.arrays, budget, self._in_progress, due_Z)
        if self._groups:
            budget.blocks_CP[:] -= self._groups.reserved_P
        return budget

    def _reserve(self, leader: Request, rank: int, budget: Budget, may_start: QuotaCheck | None) -> None:
        """Keep slots for the followers of a leader that starts: as many as the rank and the tenant's quota have left."""
        followers, count = self._groups.followers(leader.key), 0
        most = min(len(followers), int(budget.slots_P[rank]), *budget.blocks_CP[:, rank].tolist())
        while count < most and (may_start is None or may_start(followers[count])):
            count += 1
        budget.slots_P[rank] -= count
        budget.blocks_CP[:, rank] -= count
        num_tokens = len(leader.tokens)
        load = self._balancing.load(*np.array([[num_tokens], [num_tokens], [leader.limit - num_tokens]]))
        budget.load_P[rank] += count * float(load[0])
        self._groups.reserve(leader.key, rank, count)

    def _admit_forks(self, budget: Budget, may_start: QuotaCheck | None) -> list[_Part]:
        """Start forks beside the requests that they continue, sharing their blocks; the others wait on."""
        batch, parts = self._batch, []
        needed_C = np.zeros(len(batch.specs), np.int64)
        for key, (row, num_common) in self.forks.items():
            child, rank = self._queue.get(key), int(batch.rank_Z[row])
            num_tokens = len(child.tokens)
            num_cached = (
                0 if batch.draining_Z[row] else self._copies.num_shareable(row, min(num_common, num_tokens - 1))
            )
            loops.blocks_needed(batch.caches, num_tokens - num_cached, needed_C)
            needed_C = np.minimum(needed_C + 1, batch.caches.most_C)  # as the last block may have to be copied
            if num_cached and loops.fits(budget, rank, needed_C) and (may_start is None or may_start(child)):
                load = self._balancing.load(*np.array([[num_tokens], [num_cached], [child.limit - num_tokens]]))
                num = loops.charge(batch.caches, budget, rank, needed_C, num_tokens - num_cached, float(load[0]))
                columns = np.array([[rank], [num_cached], [num], [row], [0]])
                parts.append(_Part([child], columns, child.block_hashes))
                if key in self._groups:
                    self._reserve(child, rank, budget, may_start)
        self.forks.clear()
        return parts

    def _admit_queued(self, budget: Budget, forked: set[int], may_start: QuotaCheck | None) -> Iterator[_Part]:
        """Start requests of the queue other than `forked`, a chunk at a time."""
        queue = self._policy.order(self._queue, self._num_cached, may_start)
        queue = (request for request in queue if request.key not in forked) if forked else iter(queue)
        while (most := self._chunk(budget)) and (requests := self._next(queue, most)):
            candidates = self._candidates(requests)
            columns = np.full((5, len(requests)), NONE)
            columns[4] = candidates.first_A
            count = self._choose(requests, candidates, columns, budget)
            starts = np.flatnonzero(columns[0] != NONE)
            if columns[0, -1] != NONE and requests[-1].key in self._groups:
                self._reserve(requests[-1], int(columns[0, -1]), budget, may_start)
            yield _Part([requests[i] for i in starts.tolist()], columns[:, starts], candidates.hash_B2)
            if count < len(requests):
                break

    def _next(self, queue: Iterator[Request], most: int) -> list[Request]:
        """Return the next requests of the queue, at most up to a leader, whose group takes slots of a rank when it starts."""
        if not self._groups:
            return list(islice(queue, most))
        requests = []
        for request in islice(queue, most):
            requests.append(request)
            if request.key in self._groups:
                break
        return requests

    def with_followers(self, admissions: Admissions, rows: np.ndarray, num: np.ndarray) -> Admissions:
        """Add the followers whose leaders compute the last of their known tokens in this step, as far as there are blocks.

        `complete` has these leaders from now on. `rows`, `num`: those that are computed and their tokens.
        """
        self.complete.clear()
        batch, groups = self._batch, self._groups
        if not (leaders := groups.running()):
            return admissions
        starting = {request.key: i for i, request in enumerate(admissions.requests)}
        computed = {key: i for i, key in enumerate(batch.key_Z[rows].tolist())}
        free_CP: np.ndarray | None = None
        parts = []
        for key in leaders:
            if (i := starting.get(key)) is not None:
                rank, num_tokens = int(admissions.rank_A[i]), int(admissions.record_A["num_tokens"][i])
                end = admissions.num_cached_A[i] + admissions.num_scheduled_A[i]
            elif (i := computed.get(key)) is not None:
                rank, num_tokens = int(batch.rank_Z[rows[i]]), int(batch.num_tokens_Z[rows[i]])
                end = batch.num_computed_Z[rows[i]] + num[i]
            else:
                continue
            if end < num_tokens:
                continue
            if free_CP is None:
                free_CP = self._free_beside(admissions, rows, num)
            has_tail_C = num_tokens % batch.caches.size_C > 0
            most = min([groups.num_reserved(key), *free_CP[has_tail_C, rank].tolist()])
            started = groups.followers(key)[: max(int(most), 0)]
            free_CP[has_tail_C, rank] -= len(started)
            self.complete[key] = len(started)
            for follower in started:
                follower.record = follower.pack(batch.config.vocab_size)
                columns = np.array([[rank], [num_tokens], [0], [LEADER], [0]])
                parts.append(_Part([follower], columns, follower.block_hashes))
        if not parts:
            return admissions
        columns = np.stack(admissions[1:6])
        if admissions.requests:
            parts.insert(0, _Part(admissions.requests, columns, admissions.hash_B2))
        return _joined(parts)

    def _free_beside(self, admissions: Admissions, rows: np.ndarray, num: np.ndarray) -> np.ndarray:
        """Return how many blocks are left, at least, beside those that a step's requests take: i64 [C, P]."""
        batch = self._batch
        free_CP = batch.pool.num_free_CP.copy()
        needed_C = np.zeros(len(batch.specs), np.int64)
        for cache, missing_S in enumerate(batch.missing_blocks(rows, num)):
            free_CP[cache] -= np.bincount(batch.rank_Z[rows], missing_S, free_CP.shape[1]).astype(np.int64)
        ends_A = admissions.num_cached_A + admissions.num_scheduled_A
        for rank, end in zip(admissions.rank_A.tolist(), ends_A.tolist(), strict=True):
            loops.blocks_needed(batch.caches, end, needed_C)
            free_CP[:, rank] -= np.minimum(
                needed_C + 1, batch.caches.most_C
            )  # one that a fork's last block may be copied to
        return free_CP

    def _chunk(self, budget: Budget) -> int:
        """Return the number of requests to look at next."""
        return min(_CHUNK, int(budget.slots_P.sum())) or int(self.make_room is not None)

    def _choose(self, requests: list[Request], candidates: Candidates, columns_5A: np.ndarray, budget: Budget) -> int:
        """Decide about candidates in order, until one fits nowhere and no room is made for it; return their number."""
        done = 0
        while True:
            begin, done = done, done + self._decide(candidates, columns_5A, done, budget)
            if self.make_room is None:
                return done
            self._starting += [requests[i] for i in range(begin, done) if columns_5A[0, i] != NONE]
            if done == len(requests) or not self.make_room(requests[done], self._starting, budget):
                return done

    def _decide(self, candidates: Candidates, columns_5A: np.ndarray, first: int, budget: Budget) -> int:
        """Decide about the candidates from `first` on, until one fits nowhere; return the number of decisions."""
        batch, credit = self._batch, self._balancing.credit
        return loops.choose(
            batch.caches,
            batch.pool.blocks,
            batch.config.block_size,
            budget,
            candidates.after(first) if first else candidates,
            -1.0 if credit is None else credit,
            self._in_progress,
            Decisions(*columns_5A[:3, first:]),
            *np.zeros((2, len(batch.specs)), np.int64),
        )

    def _num_cached(self, request: Request) -> int:
        """Return how many of a request's tokens some rank probably has cached."""
        if self._batch.hasher is None:
            return 0
        num_hashes = self._num_hashes(records([request]))[0]
        blocks, max_misses = self._batch.pool.blocks, self._batch.caches.max_misses
        depth, _ = prefix_loops.guess_prefix(blocks, request.block_hashes[:num_hashes], max_misses)
        return depth * self._batch.config.block_size

    def _candidates(self, requests: Sequence[Request]) -> Candidates:
        record_A = records(requests)
        num_tokens_A = record_A["num_tokens"].astype(np.int64)
        num_hashes_A, first_A, hash_B2 = np.zeros_like(num_tokens_A), np.zeros_like(num_tokens_A), NO_HASHES
        if self._batch.hasher is not None:
            hash_B2 = np.concatenate([request.block_hashes for request in requests])
            num_hashes_A = self._num_hashes(record_A)
            first_A[1:] = np.cumsum(num_tokens_A // self._batch.config.block_size + 2)[:-1]
        load_A = self._balancing.load(num_tokens_A, np.zeros_like(num_tokens_A), record_A["limit"] - num_tokens_A)
        return Candidates(
            num_tokens_A=num_tokens_A,
            load_A=load_A.astype(np.float64),
            first_A=first_A,
            num_hashes_A=num_hashes_A,
            hash_B2=hash_B2,
        )

    def _num_hashes(self, record_A: np.ndarray) -> np.ndarray:
        """Return how many of each request's leading blocks may be taken from the cache: i64.

        The last token is always computed, because the next one is sampled from it; a request for
        its prompt's log-probabilities needs all of its prompt computed.
        """
        return np.where(record_A["reads_cache"], (record_A["num_tokens"] - 1) // self._batch.config.block_size, 0)
