"""The controller's part of expert-parallel load balancing (EPLB): it collects load, decides, and moves experts step by step.

The decision on a window of load is made in a thread, as it may take as long as several steps.

L layers, E logical experts, X physical experts.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from expertwire.engine.loader.quantization import expert_bytes
from expertwire.engine.models.model_config import ModelConfig
from expertwire.moe.eplb.load import ExpertLoad
from expertwire.moe.eplb.migration import Migration
from expertwire.moe.eplb.placement import Placement
from expertwire.moe.eplb.savings import Balancer, Costs, Verdict
from expertwire.scheduler.plan import ExpertMoves, StepPlan, StepResult

_STEP_BYTES = 16 << 20  # bytes of experts that a rank sends and receives in one step; at least one expert
_GUESSED_BYTES_PER_S = 1e9  # until experts have moved


class Rebalancing:
    """Load balancing of the experts of one engine.

    Args:
        load: the load so far; its placement is kept equal to the ranks'.
        model: the model.
        quantize: `EngineConfig.quantization`.
        window_steps: number of steps with tokens in a window.
        failure_domains: number of each rank's failure domain; empty if every rank is one.
    """

    def __init__(
        self,
        load: ExpertLoad,
        model: ModelConfig,
        quantize: str | None,
        window_steps: int,
        failure_domains: Sequence[int] = (),
    ) -> None:
        self._load, self._window_steps = load, window_steps
        self._expert_bytes = expert_bytes(model, quantize)
        self._balancer = Balancer(load.placement, failure_domains)
        self._thread = ThreadPoolExecutor(1, "rebalance")
        self._verdict: Future[Verdict] | None = None
        self._migration: Migration | None = None
        self._coming: deque[Placement] = deque()  # placements of planned steps that are not committed
        self._moved_bytes, self._moved_us = 0, 0
        self._stats: dict[str, Any] = dict.fromkeys(
            ("windows", "rebalances", "moved_experts", "moving_steps", "moving_us", "longest_us"), 0
        )
        self._start_window()

    @property
    def moving(self) -> bool:
        """True if the next step moves experts, even if it has no tokens."""
        self._look_for_verdict()
        return self._migration is not None

    def next(self) -> tuple[bool, ExpertMoves | None]:
        """Return whether the next step must report its load, and the experts that move before it; call it once a step."""
        if not self.moving or self._migration is None:
            return self._window_is_full(), None
        leg = self._migration.take()
        if leg is None:
            self._migration = None
            return False, None
        published = len(leg.logical_S) > 0
        if published:
            self._coming.append(self._migration.placement)
        return published, ExpertMoves(*leg)

    def committed(self, plan: StepPlan, results: Sequence[StepResult], rows_LE: np.ndarray | None) -> None:
        """Record a committed step, with the rows that it reported, if any, which are in the load already."""
        self._steps += bool(plan.num_tokens_P.any())
        self._forward_s += 1e-6 * max(result.forward_us for result in results)
        if rows_LE is not None:
            self._rows_LE += rows_LE
        if plan.moves is not None:
            self._moved(plan.moves, max(result.move_us for result in results))
        elif rows_LE is not None and self._window_is_full():
            self._verdict = self._thread.submit(self._balancer.judge, self._rows_LE, self._costs())
            self._start_window()

    def stats(self) -> dict[str, Any]:
        """Return counts since the start, pauses in µs, and the predicted and actual savings of the last change per window."""
        return dict(self._stats)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _window_is_full(self) -> bool:
        """Return whether a window is complete, no experts are moving and no decision is pending."""
        moving = self._migration is not None or len(self._coming) > 0
        return self._steps >= self._window_steps and self._verdict is None and not moving

    def _start_window(self) -> None:
        self._rows_LE, self._steps, self._forward_s = np.zeros_like(self._load.rows_LE), 0, 0.0

    def _costs(self) -> Costs:
        """Return the cost of a row as if a step were the experts of the fullest ranks alone, an upper bound of the savings."""
        fullest = self._load.placement.rank_load(self._rows_LE).max(axis=1).sum()
        measured = 1e6 * self._moved_bytes / self._moved_us if self._moved_us else _GUESSED_BYTES_PER_S
        return Costs(
            s_per_row=self._forward_s / max(fullest, 1.0),
            bytes_per_expert=self._expert_bytes,
            bytes_per_s=measured,
        )

    def _look_for_verdict(self) -> None:
        if self._verdict is None or not self._verdict.done():
            return
        verdict, self._verdict = self._verdict.result(), None
        self._stats["windows"] += 1
        if verdict.actual_s is not None:
            self._report(expected_s=verdict.expected_s, actual_s=verdict.actual_s)
        if verdict.placement is not None:
            self._stats["rebalances"] += 1
            self._report(
                moves=verdict.num_moves,
                predicted_s=verdict.predicted_s,
                for_windows=verdict.windows,
                cost_s=verdict.cost_s,
            )
            max_moves = max(1, _STEP_BYTES // self._expert_bytes)
            self._migration = Migration(self._load.placement, verdict.placement, max_moves)

    def _report(self, **values: Any) -> None:
        """Write values to the log and to the statistics."""
        sys.stderr.write("experts: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()) + "\n")
        sys.stderr.flush()
        self._stats |= values

    def _moved(self, moves: ExpertMoves, elapsed_us: int) -> None:
        rank_X = self._load.placement.rank_of_S
        ends = [np.bincount(rank_X[slots]).max() for slots in (moves.source_M, moves.target_M) if len(slots)]
        if ends:
            self._moved_bytes += int(max(ends)) * self._expert_bytes
            self._moved_us += elapsed_us
        self._stats["moved_experts"] += len(moves.target_M)
        self._stats["moving_steps"] += 1
        self._stats["moving_us"] += elapsed_us
        self._stats["longest_us"] = max(self._stats["longest_us"], elapsed_us)
        if len(moves.logical_S):
            self._load.placement = self._coming.popleft()
