"""Completion of a step: its tokens let their requests go on, end, pause, or leave their slots.

`rows` are rows of the running batch. O sampled tokens, V vocabulary, Z slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertwire.scheduler._compiled.steps import CHECK_IDS, SUSPENDED, StepSchedule
from expertwire.scheduler.lifecycle import Lifecycle
from expertwire.scheduler.outputs import FinishReason, StepOutputs, gather
from expertwire.scheduler.pauses import Pauses
from expertwire.scheduler.plan import StepResult
from expertwire.scheduler.running import RunningBatch


class Completion:
    """Takes in the results of steps.

    Args:
        eos_ids: tokens that end a request.
        special_V: at which tokens some requests stop or pause: `MAY_STOP` and `MAY_PAUSE`.

    Attributes:
        num_failed: requests that ended because their logits were not finite.
    """

    def __init__(
        self, batch: RunningBatch, lifecycle: Lifecycle, pauses: Pauses, eos_ids: np.ndarray, special_V: np.ndarray
    ) -> None:
        self._batch, self._lifecycle, self._pauses = batch, lifecycle, pauses
        self._eos_ids, self._special_V = eos_ids, special_V
        self.num_failed = 0

    def take_in(self, step: StepSchedule, results: Sequence[StepResult], now: float) -> StepOutputs:
        """Append the tokens that all ranks have sampled in a step, in the ranks' order; return the step's outputs."""
        rows_O, outputs = gather(step, results, self._batch, self._eos_ids, self._special_V)
        if len(outputs.failed_keys):
            self._fail(outputs.failed_keys.tolist())
        self._check_ids(rows_O, outputs)
        paused_Z = self._batch.paused_Z
        if paused_Z.any() and (kept_O := paused_Z[rows_O]).any():
            rows_O, outputs = rows_O[~kept_O], self._pauses.keep_back(kept_O, outputs)
        self._finish(rows_O, outputs, now)
        return outputs

    def _check_ids(self, rows_O: np.ndarray, outputs: StepOutputs) -> None:
        """Set the finish reasons of tokens at which some request stops or pauses."""
        batch, finish_O = self._batch, outputs.finish_O
        for i in np.flatnonzero(finish_O == CHECK_IDS):
            row, token = rows_O[i], int(outputs.token_O[i])
            request, num_known = self._lifecycle.running[int(batch.key_Z[row])], batch.num_known_Z[row]
            if token in request.stop_ids and num_known >= batch.stop_from_Z[row]:
                finish_O[i] = FinishReason.STOP
            elif num_known >= batch.limit_Z[row] and not batch.suspends_Z[row]:
                finish_O[i] = FinishReason.LENGTH
            elif request.pauses_at(token):
                finish_O[i] = FinishReason.PAUSED
            else:
                finish_O[i] = FinishReason.NONE if num_known < batch.limit_Z[row] else SUSPENDED

    def _finish(self, rows_O: np.ndarray, outputs: StepOutputs, now: float) -> None:
        """End the requests that these outputs complete, pause others, and suspend those that cannot go on."""
        batch, stops = self._batch, np.flatnonzero(outputs.finish_O)
        rows, finish = rows_O[stops], outputs.finish_O[stops]
        paused, suspended = finish == FinishReason.PAUSED, finish == SUSPENDED
        outputs.finish_O[stops[suspended]] = FinishReason.NONE
        if paused.any():
            self._pauses.begin(rows[paused], now)
            suspended |= paused & (batch.num_known_Z[rows] >= batch.limit_Z[rows])
        self._lifecycle.close(rows[~paused & ~suspended])
        self._lifecycle.suspend(rows[suspended])

    def _fail(self, keys: list[int]) -> None:
        """End requests whose logits are not finite. Nobody is to find what they have computed."""
        rows = np.array([self._lifecycle.running[key].row for key in keys])
        for key in keys:
            self._pauses.forget(key)
        self._batch.forget(rows)
        self._lifecycle.close(rows)
        self.num_failed += len(keys)
