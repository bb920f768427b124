"""Preemption: which running requests give up their blocks where these are short, so that the others go on.

`rows` are rows of the running batch. C KV cache groups, P ranks, S scheduled requests, Z slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expertwire.scheduler.lifecycle import Lifecycle
from expertwire.scheduler.running import RunningBatch

_NO_ROWS = np.zeros(0, np.int64)


class Preemption:
    """Preempts running requests, which return to the queue.

    Attributes:
        num: preempted requests since the start.
        shares: returns the share of each row's tenant, [Z]; None where tenants do not matter.
    """

    def __init__(self, batch: RunningBatch, lifecycle: Lifecycle) -> None:
        self._batch, self._lifecycle = batch, lifecycle
        self.num = 0
        self.shares: Callable[[], np.ndarray] | None = None

    def serve(
        self, rows: np.ndarray, num: np.ndarray, missing_CP: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Preempt requests where blocks are short. `missing_CP`: blocks that each rank lacks for the rows.

        One with a step in flight drains first, and its blocks come with the next plan.

        Returns:
            the rows that get their missing blocks, their tokens, and the rows that were emptied.
        """
        batch = self._batch
        batch.free_outside_windows(rows)
        if (missing_CP <= batch.pool.num_free_CP).all():
            return rows, num, _NO_ROWS
        missing_CS = batch.missing_blocks(rows, num)
        served_S = self._serve_blocks(rows, missing_CS)
        short_CP = np.maximum(missing_CP - batch.pool.num_free_CP, 0)
        self._forgive_states(short_CP, rows, missing_CS, served_S)
        victims = self._choose_victims(short_CP)
        if not len(victims):
            return rows[served_S], num[served_S], _NO_ROWS
        batch.draining_Z[victims] = True
        self.num += len(victims)
        emptied = self._lifecycle.release()
        stay = ~np.isin(rows, victims)
        rows, num = rows[stay], num[stay]
        served_S = self._serve_blocks(rows, missing_CS[:, stay])
        return rows[served_S], num[served_S], emptied

    def suspend_now(self, rows: np.ndarray) -> None:
        """Suspend these rows' requests at once, and release their slots; what is in flight for them is dropped."""
        self._lifecycle.give_way(rows)
        self.num += len(rows)

    def _forgive_states(
        self, short_CP: np.ndarray, rows: np.ndarray, missing_CS: np.ndarray, served_S: np.ndarray
    ) -> None:
        """Set the recurrent states that ranks are short of to 0 where nobody has to be preempted for them.

        A row that begins a state leaves the one before in the next plan. So where all branches of a group begin one in the same
        step, and there is one for the most urgent row, the others wait a step for those that these leave.
        """
        batch = self._batch
        states_C = np.array([spec.kind == "state" for spec in batch.specs])
        for rank in np.flatnonzero(short_CP[states_C].any(axis=0)):
            here = np.flatnonzero(batch.rank_Z[rows] == rank)
            most_urgent = here[np.lexsort((batch.order_Z[rows[here]], batch.priority_Z[rows[here]]))[0]]
            begun_C = missing_CS[:, here[served_S[here]]].any(axis=1)
            if served_S[most_urgent]:
                short_CP[states_C & begun_C, rank] = 0

    def _choose_victims(self, short_CP: np.ndarray) -> np.ndarray:
        """Return the rows to preempt, ascending, so that `short_CP` more blocks become free.

        Those of the tenant with the largest share first, if shares are given; of these the least urgent,
        of these the one with the fewest tokens to recompute, then the latest. One whose next block would
        be its last is spared while there are others of the tenant. A rank's most urgent request that is not paused, the
        oldest of equals, is never preempted: it makes progress, so that all do in the end.
        """
        batch = self._batch
        share_Z = None if self.shares is None else self.shares()
        chosen: list[int] = []
        for rank in np.flatnonzero(short_CP.any(axis=0)):
            first, last = batch.bounds_P1[rank : rank + 2]
            rows = first + np.flatnonzero(batch.running_Z[first:last] & ~batch.draining_Z[first:last])
            rows = rows[np.lexsort((batch.order_Z[rows], batch.priority_Z[rows]))]
            rows = np.delete(rows, np.flatnonzero(~batch.paused_Z[rows])[:1])
            about_to_finish = batch.limit_Z[rows] - batch.num_tokens_Z[rows] <= batch.config.block_size
            over = np.zeros(len(rows)) if share_Z is None else -share_Z[rows]
            keys = (-batch.order_Z[rows], batch.num_computed_Z[rows], -batch.priority_Z[rows], about_to_finish, over)
            short_C = short_CP[:, rank].copy()
            for row in rows[np.lexsort(keys)].tolist():
                if not (short_C > 0).any():
                    break
                chosen.append(row)
                for cache in range(len(short_C)):
                    refs = batch.pool.refs_CPB[cache, rank, batch.blocks_of(cache, row)]
                    short_C[cache] -= np.count_nonzero(refs == 1)
        return np.sort(np.array(chosen, np.int64))

    def _serve_blocks(self, rows: np.ndarray, missing_CS: np.ndarray) -> np.ndarray:
        """Return which rows get their missing blocks, the most urgent and oldest first: bool [S]."""
        batch = self._batch
        free_CP = batch.pool.num_free_CP.copy()
        served_S = np.ones(len(rows), bool)
        for i in np.lexsort((batch.order_Z[rows], batch.priority_Z[rows])).tolist():
            missing_C = missing_CS[:, i]
            if not missing_C.any():
                continue
            free_C = free_CP[:, batch.rank_Z[rows[i]]]
            served_S[i] = (missing_C <= free_C).all()
            if served_S[i]:
                free_C -= missing_C
        return served_S
