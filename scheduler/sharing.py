"""Sharing what runs among tenants, for the policy "fair": whose prefills go first, and who gives way to whom.

A tenant's *share* is the larger of its part of the slots and its part of the blocks, by weight (dominant resource
fairness: Ghodsi et al., "Dominant Resource Fairness", NSDI 2011). A waiting request that fits nowhere may take the place
of running ones of a tenant that goes after its own, if that tenant's share is still no smaller afterwards. So an exchange
is never undone, unless requests come, end or grow meanwhile: without these there are fewer exchanges than slots, and each
starts a request in the same step. What gives way keeps its tokens and its full blocks, while the prefix cache does.

P ranks, C KV cache groups, S scheduled requests, u tenants by `Account.index`, Z slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from expertwire.scheduler._compiled import admissions as loops
from expertwire.scheduler._compiled.admissions import Budget
from expertwire.scheduler.policy import FairShare
from expertwire.scheduler.request import Request
from expertwire.scheduler.running import RunningBatch
from expertwire.scheduler.tenants import Account


class Sharing:
    """Shares slots, blocks and the token budget of a step among tenants.

    Args:
        policy: the order of tenants.
        batch: what runs.
        running: requests by key.
        suspend: stops rows' requests at once, and releases their slots.
    """

    def __init__(
        self,
        policy: FairShare,
        batch: RunningBatch,
        running: Mapping[int, Request],
        suspend: Callable[[np.ndarray], None],
    ) -> None:
        self._policy, self._batch, self._running, self._suspend = policy, batch, running, suspend
        self._num_slots = batch.config.num_ranks * min(batch.config.max_num_seqs, batch.config.max_num_batched_tokens)
        budget = batch.config.chunked_prefill_size or batch.config.max_num_batched_tokens
        policy.step_tokens = float(budget * batch.config.num_ranks)
        self._row_cost = max(policy.step_tokens / self._num_slots, 1.0)
        self._num_blocks_C = batch.pool.num_blocks_C * batch.config.num_ranks
        self._rows_u, self._blocks_Cu = np.zeros(0, np.int64), np.zeros((len(batch.specs), 0), np.int64)
        # Tokens scheduled in this step, and those without the ones of rows that are held back.
        self._num_Z, self._spent_Z = np.zeros((2, len(batch.rank_Z)), np.int64)
        self._num_counted = 0  # of the requests that start in this step

    def select(self, num_waiting: Callable[[str], int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Begin a step, in which so many requests of a tenant wait, and select its rows as `RunningBatch.select` does."""
        batch = self._batch
        rows, num, tokens_P, missing_CP = batch.select()
        self._policy.begin(num_waiting)
        self._count_running()
        rows, num = self._cut_prefills(rows, num, tokens_P)
        for missing_P, missing_S in zip(missing_CP, batch.missing_blocks(rows, num), strict=True):
            missing_P[:] = np.bincount(batch.rank_Z[rows], missing_S, len(missing_P))
        return rows, num, tokens_P, missing_CP

    def _count_running(self) -> None:
        """Count the tenants' rows and blocks."""
        batch, self._num_counted = self._batch, 0
        rows = np.flatnonzero(batch.running_Z)
        tenants = batch.tenant_Z[rows]
        num_tenants = 1 + max((account.index for account in self._policy.accounts), default=0)
        self._rows_u = np.bincount(tenants, minlength=num_tenants)
        blocks_CS = batch.num_blocks_of(rows)
        self._blocks_Cu = np.stack([np.bincount(tenants, blocks_S, num_tenants) for blocks_S in blocks_CS])

    def share(self, account: Account, more_rows: int = 0, more_blocks_C: np.ndarray | int = 0) -> float:
        """Return a tenant's share with so many more rows and blocks."""
        rows = (self._rows_u[account.index] + more_rows) / self._num_slots
        blocks = ((self._blocks_Cu[:, account.index] + more_blocks_C) / self._num_blocks_C).max()
        return float(max(rows, blocks)) / account.quota.weight

    def share_Z(self) -> np.ndarray:
        """Return the share of each running row's tenant."""
        share_u = np.zeros(len(self._rows_u))
        for account in self._policy.accounts:
            share_u[account.index] = self.share(account)
        return np.where(self._batch.running_Z, share_u[np.minimum(self._batch.tenant_Z, len(share_u) - 1)], 0.0)

    def charge(self, rows: np.ndarray, num: np.ndarray) -> None:
        """Charge what a step computes to the tenants.

        A row costs its tokens, and at least its part of a step: so a step full of outputs costs as much as one full of prompts.
        """
        cost_S = np.maximum(num, self._row_cost)
        cost_u = np.bincount(self._batch.tenant_Z[rows], cost_S, len(self._rows_u)).tolist()
        self._policy.charge({account: cost_u[account.index] for account in self._policy.accounts})

    # ---- the token budget

    def _cut_prefills(self, rows: np.ndarray, num: np.ndarray, tokens_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give the token budget of ranks where several tenants prefill to these in order; return new `rows` and `num`."""
        batch = self._batch
        left_Z = self._left_to_compute()
        prefills = np.flatnonzero(left_Z > 1)
        if (batch.tenant_Z[prefills] == batch.tenant_Z[prefills[:1]]).all():
            return rows, num
        num_Z = np.zeros_like(left_Z)
        num_Z[rows] = num
        rank_S = batch.rank_Z[prefills]
        tokens_P += np.bincount(rank_S, num_Z[prefills], len(tokens_P)).astype(np.int64)
        for row in self._in_order(prefills):
            rank = batch.rank_Z[row]
            num_Z[row] = min(left_Z[row], tokens_P[rank])
            tokens_P[rank] -= num_Z[row]
        rows = np.flatnonzero(num_Z)
        return rows, num_Z[rows]

    def hold_back(self, rows: np.ndarray, num: np.ndarray, tokens_P: np.ndarray) -> np.ndarray:
        """Free the tokens of prefills of tenants that go after one that waits; return their rows.

        These tenants admit nothing in this step, so that their running requests go before their waiting ones.
        """
        batch, policy = self._batch, self._policy
        self._num_Z[:] = self._spent_Z[:] = 0
        self._num_Z[rows] = self._spent_Z[rows] = num
        policy.closed = set()
        if (first := policy.first_waiting) is None:
            return rows[:0]
        after_u = np.zeros(len(self._rows_u), bool)
        for account in policy.accounts:
            after_u[account.index] = policy.position(account) > policy.position(first)
        held = rows[(self._left_to_compute()[rows] > 1) & after_u[batch.tenant_Z[rows]]]
        tokens_P += np.bincount(batch.rank_Z[held], self._num_Z[held], len(tokens_P)).astype(np.int64)
        self._spent_Z[held] = 0
        tenants = set(batch.tenant_Z[held].tolist())
        policy.closed = {account for account in policy.accounts if account.index in tenants}
        return held

    def give_back(self, held: np.ndarray, rows: np.ndarray, tokens_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give what admissions have left of the tokens to the rows that were held back; return new `rows` and `num`."""
        batch, num_Z = self._batch, self._num_Z
        for row in self._in_order(held[batch.running_Z[held]]):
            rank = batch.rank_Z[row]
            num_Z[row] = min(num_Z[row], tokens_P[rank])
            tokens_P[rank] -= num_Z[row]
        rows = rows[batch.running_Z[rows] & (num_Z[rows] > 0)]
        return rows, num_Z[rows]

    def _left_to_compute(self) -> np.ndarray:
        batch = self._batch
        runs_Z = batch.running_Z & ~batch.draining_Z & ~batch.paused_Z & (batch.num_tokens_Z < batch.limit_Z)
        return np.where(runs_Z, batch.num_tokens_Z - batch.num_computed_Z, 0).astype(np.int64)

    def _in_order(self, rows: np.ndarray) -> list[int]:
        """Return rows by the order of their tenants, and of their submission."""
        position_u = np.zeros(len(self._rows_u), np.int64)
        for account in self._policy.accounts:
            position_u[account.index] = self._policy.position(account)
        return rows[np.lexsort((self._batch.order_Z[rows], position_u[self._batch.tenant_Z[rows]]))].tolist()

    # ---- slots and blocks

    def make_room(self, request: Request, starting: Sequence[Request], budget: Budget) -> bool:
        """Suspend running requests so that `request` fits, and add what they leave to the budget; or return False.

        `starting`: what starts in this step already. Their tenants give no way, as they may share the blocks of running
        requests.
        """
        for other in starting[self._num_counted :]:
            self._count(other.account, 1, self._needed(other))
        self._num_counted = len(starting)
        start = {other.account for other in starting}
        needed_C, mine = self._needed(request), request.account
        share = self.share(mine, 1, needed_C)
        policy = self._policy
        for account in sorted(policy.accounts, key=policy.position, reverse=True):
            if (
                account is mine
                or account in start
                or policy.level(account) < policy.level(mine)
                or self.share(account) < share
            ):
                continue
            victims = self._victims(account, share, needed_C, budget)
            if len(victims):
                self._take(victims, budget)
                return True
        return False

    def _needed(self, request: Request) -> np.ndarray:
        needed_C = np.zeros(len(self._batch.specs), np.int64)
        loops.blocks_needed(self._batch.caches, len(request.tokens), needed_C)
        return needed_C

    def _count(self, account: Account, num_rows: int, blocks_C: np.ndarray) -> None:
        self._rows_u[account.index] += num_rows
        self._blocks_Cu[:, account.index] += blocks_C

    def _victims(self, account: Account, share: float, needed_C: np.ndarray, budget: Budget) -> np.ndarray:
        """Return the rows of a tenant to preempt, all on one rank; none if its share would get too small.

        It is the rank that loses the fewest tokens and has the most left to compute in this step.
        """
        batch = self._batch
        rows = np.flatnonzero(batch.running_Z & ~batch.draining_Z & (batch.tenant_Z == account.index))
        lost_Z = batch.num_computed_Z - batch.num_hashed_Z * batch.config.block_size * (batch.hasher is not None)
        finishing = batch.limit_Z[rows] - batch.num_tokens_Z[rows] <= batch.config.block_size
        rows = rows[np.lexsort((-batch.order_Z[rows], lost_Z[rows], finishing))]
        best, least = rows[:0], np.inf
        for rank in np.unique(batch.rank_Z[rows]).tolist():
            chosen = self._enough(account, rows[batch.rank_Z[rows] == rank], rank, share, needed_C, budget)
            if len(chosen) and (cost := lost_Z[chosen].sum() - budget.tokens_P[rank]) < least:
                best, least = chosen, cost
        return best

    def _enough(
        self, account: Account, rows: np.ndarray, rank: int, share: float, needed_C: np.ndarray, budget: Budget
    ) -> np.ndarray:
        """Return the first of a rank's rows without which a request that needs these blocks fits; none if none do."""
        batch = self._batch
        chosen: list[int] = []
        blocks_C, held_C = budget.blocks_CP[:, rank].copy(), np.zeros(len(needed_C), np.int64)
        for row in rows.tolist():
            running = self._running[int(batch.key_Z[row])]
            if running.params.expert_load and batch.in_flight_Z[row]:
                continue  # the counts of the step in flight would be lost
            own_C = batch.num_blocks_of(np.array([row]))[:, 0]
            held_C += own_C
            if self.share(account, -len(chosen) - 1, -held_C) < share:
                break
            chosen.append(row)
            blocks_C += self._freed(row)
            tokens = budget.tokens_P[rank] + self._spent_Z[chosen].sum()
            if budget.slots_P[rank] + len(chosen) > 0 and tokens > 0 and (blocks_C >= needed_C).all():
                return np.sort(np.array(chosen))
        return rows[:0]

    def _freed(self, row: int) -> np.ndarray:
        """Return how many blocks a row's end adds to the budget, at least: i64 [C]."""
        batch, rank = self._batch, self._batch.rank_Z[row]
        caches = range(len(batch.specs))
        only_C = [np.count_nonzero(batch.pool.refs_CPB[c, rank, batch.blocks_of(c, row)] == 1) for c in caches]
        return np.array(only_C) + self._due(np.array([row]))

    def _due(self, rows: np.ndarray) -> np.ndarray:
        """Return how many blocks the budget keeps for these rows' next tokens: i64 [C]."""
        batch = self._batch
        left = batch.num_tokens_Z[rows] - batch.num_computed_Z[rows]
        most_CS = batch.caches.most_C[:, None] - batch.num_blocks_of(rows) + 1
        due_CS = np.minimum(batch.missing_blocks(rows, left.astype(np.int64)), most_CS)
        return (due_CS + 1).sum(axis=1)

    def _take(self, victims: np.ndarray, budget: Budget) -> None:
        batch = self._batch
        rank, account = batch.rank_Z[victims[0]], self._running[int(batch.key_Z[victims[0]])].account
        due_C, free_C = self._due(victims), batch.pool.num_free_CP[:, rank].copy()
        self._count(account, -len(victims), -batch.num_blocks_of(victims).sum(axis=1))
        self._suspend(victims)
        budget.slots_P[rank] += len(victims)
        budget.tokens_P[rank] += self._spent_Z[victims].sum()
        budget.blocks_CP[:, rank] += batch.pool.num_free_CP[:, rank] - free_C + due_C
