"""Requests that are paused: they have sampled one of their `pause_ids`, and are not scheduled until somebody resumes them.

`rows` are rows of the running batch. O sampled tokens.
"""

from __future__ import annotations

import numpy as np

from expertwire.scheduler._compiled.steps import SUSPENDED
from expertwire.scheduler.lifecycle import Lifecycle
from expertwire.scheduler.outputs import FinishReason, StepOutputs
from expertwire.scheduler.running import RunningBatch
from expertwire.scheduler.tenants import TenantAccounts

PATIENCE_S = 1.0  # for so long a paused request keeps its slot while others wait


class Pauses:
    """The paused requests, and the tokens that the step in flight has sampled for them, of which nobody has been told."""

    def __init__(self, batch: RunningBatch, lifecycle: Lifecycle, tenants: TenantAccounts) -> None:
        self._batch, self._lifecycle, self._tenants = batch, lifecycle, tenants
        self._kept: dict[int, StepOutputs] = {}  # by key

    def begin(self, rows: np.ndarray, now: float) -> None:
        """Pause the requests of these rows."""
        self._batch.paused_Z[rows] = True
        for key in self._batch.key_Z[rows].tolist():
            request = self._lifecycle.running[key]
            request.is_paused, request.paused_at = True, now

    def resume(self, key: int) -> StepOutputs | None:
        """Let a paused request go on; others and unknown keys are ignored.

        Returns:
            The token that was kept back, if there is one. It may end or pause the request.
        """
        if (request := self._lifecycle.find(key)) is None or not request.is_paused:
            return None
        kept = self._kept.pop(key, None)
        finish = FinishReason.NONE if kept is None else FinishReason(kept.finish_O.item())
        if finish == FinishReason.PAUSED:
            return kept
        request.is_paused = False
        if key in self._lifecycle.running:
            self._batch.paused_Z[request.row] = False
            row = np.array([request.row])
            if finish:
                self._lifecycle.close(row)
            elif self._batch.num_known_Z[request.row] >= self._batch.limit_Z[request.row]:
                self._lifecycle.suspend(row)
            return kept
        del self._lifecycle.held[key]
        if finish:
            self._tenants.ended(request, len(request.tokens))
        else:
            self._lifecycle.enqueue(request)
        return kept

    def end_patience(self, now: float) -> None:
        """Take slots and blocks from requests that have been paused for long."""
        batch = self._batch
        rows = np.flatnonzero(batch.paused_Z & batch.running_Z & ~batch.draining_Z & (batch.in_flight_Z == 0))
        waited = [now - self._lifecycle.running[key].paused_at >= PATIENCE_S for key in batch.key_Z[rows].tolist()]
        self._lifecycle.suspend(rows[np.array(waited, bool)])

    def keep_back(self, kept_O: np.ndarray, outputs: StepOutputs) -> StepOutputs:
        """Keep the tokens of paused requests, which the step in flight had sampled, and return the other outputs."""
        rest, kept = outputs.split(kept_O)
        kept.finish_O[kept.finish_O == SUSPENDED] = FinishReason.NONE
        for key in kept.key_O.tolist():
            assert key not in self._kept, f"request {key} is paused and was scheduled"
            self._kept[key] = kept.split(kept.key_O == key)[1]
        return rest

    def forget(self, key: int) -> None:
        """Forget a request, which has ended. Unknown keys are ignored."""
        self._kept.pop(key, None)

    def check_integrity(self) -> None:
        """Assert that requests and batch agree about who is paused."""
        batch, lifecycle = self._batch, self._lifecycle
        paused = [key for key, request in lifecycle.running.items() if request.is_paused]
        assert sorted(batch.key_Z[np.flatnonzero(batch.paused_Z & batch.running_Z)].tolist()) == sorted(paused), paused
        assert all((found := lifecycle.find(key)) is not None and found.is_paused for key in self._kept), list(
            self._kept
        )
