"""The controller's part in EPLB: windows of load, a decision on each, and the moves of the next steps. No torch.

Decisions are computed in a thread, as one may take as long as several steps.

L layers, E logical experts, X physical experts.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from expertwire.moe.eplb.decision import CostModel, Decision, RebalancePolicy
from expertwire.moe.eplb.load import ExpertLoad
from expertwire.moe.eplb.migration import Migration
from expertwire.moe.eplb.placement import Placement
from expertwire.scheduler.plan import ExpertMoves, StepPlan, StepResult

_STEP_BYTES = 16 << 20  # most that a rank sends and receives in a step, but at least one expert
_ASSUMED_BYTES_PER_S = 1e9  # before the first move


class Rebalancer:
    """Rebalances the experts of one model, from start to end.

    Args:
        load: the load; its placement follows the one that ranks use.
        expert_bytes: size of an expert of one layer.
        window_steps: steps with tokens in a window.
        failure_domains: of each rank, the unit that fails as a whole; empty: every rank is one.
    """

    def __init__(
        self, load: ExpertLoad, expert_bytes: int, window_steps: int, failure_domains: Sequence[int] = ()
    ) -> None:
        self._load, self._window_steps = load, window_steps
        self._expert_bytes = expert_bytes
        self._policy = RebalancePolicy(load.placement, failure_domains)
        self._thread = ThreadPoolExecutor(1, "rebalance")
        self._decision: Future[Decision] | None = None
        self._migration: Migration | None = None
        self._pending: deque[Placement] = deque()  # of planned steps that are not committed
        self._moved_bytes, self._moved_us = 0, 0
        self._stats: dict[str, Any] = dict.fromkeys(
            ("windows", "rebalances", "moved_experts", "moving_steps", "moving_us", "longest_us"), 0
        )
        self._start_window()

    @property
    def moving(self) -> bool:
        """True if the next step moves experts, even if it has no tokens."""
        self._poll_decision()
        return self._migration is not None

    def next(self) -> tuple[bool, ExpertMoves | None]:
        """Return whether the next step must report the load, and its moves; call this once for each step."""
        if not self.moving or self._migration is None:
            return self._window_is_full(), None
        moves = self._migration.next_moves()
        if moves is None:
            self._migration = None
            return False, None
        switches = len(moves.logical_X) > 0
        if switches:
            self._pending.append(self._migration.placement)
        return switches, moves

    def committed(self, plan: StepPlan, results: Sequence[StepResult], rows_LE: np.ndarray | None) -> None:
        """Take in a committed step with the rows it has reported, if any; the load already includes them."""
        self._steps += bool(plan.num_tokens_P.any())
        self._forward_s += 1e-6 * max(result.forward_us for result in results)
        if rows_LE is not None:
            self._rows_LE += rows_LE
        if plan.moves is not None:
            self._moved(plan.moves, max(result.move_us for result in results))
        elif rows_LE is not None and self._window_is_full():
            self._decision = self._thread.submit(self._policy.decide, self._rows_LE, self._costs())
            self._start_window()

    def stats(self) -> dict[str, Any]:
        """Return counts since the start, pauses in µs, and the last change's predicted and actual saving."""
        return dict(self._stats)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _window_is_full(self) -> bool:
        """Return whether to decide now: the window is full, nothing moves, and no decision is pending."""
        moving = self._migration is not None or len(self._pending) > 0
        return self._steps >= self._window_steps and self._decision is None and not moving

    def _start_window(self) -> None:
        self._rows_LE, self._steps, self._forward_s = np.zeros_like(self._load.rows_LE), 0, 0.0

    def _costs(self) -> CostModel:
        """Charge a step's whole time to the fullest ranks' rows: an upper bound of what can be saved."""
        fullest = self._load.placement.rank_load(self._rows_LE).max(axis=1).sum()
        measured = 1e6 * self._moved_bytes / self._moved_us if self._moved_us else _ASSUMED_BYTES_PER_S
        return CostModel(
            s_per_row=self._forward_s / max(fullest, 1.0),
            bytes_per_expert=self._expert_bytes,
            bytes_per_s=measured,
        )

    def _poll_decision(self) -> None:
        if self._decision is None or not self._decision.done():
            return
        decision, self._decision = self._decision.result(), None
        self._stats["windows"] += 1
        if decision.actual_s is not None:
            self._report(expected_s=decision.expected_s, actual_s=decision.actual_s)
        if decision.placement is not None:
            self._stats["rebalances"] += 1
            self._report(
                moves=decision.num_moves,
                predicted_s=decision.predicted_s,
                for_windows=decision.windows,
                cost_s=decision.cost_s,
            )
            max_moves = max(1, _STEP_BYTES // self._expert_bytes)
            self._migration = Migration(self._load.placement, decision.placement, max_moves)

    def _report(self, **values: Any) -> None:
        """Write values to the log and the statistics."""
        sys.stderr.write("experts: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()) + "\n")
        sys.stderr.flush()
        self._stats |= values

    def _moved(self, moves: ExpertMoves, elapsed_us: int) -> None:
        rank_X = self._load.placement.rank_of_X
        ends = [np.bincount(rank_X[slots]).max() for slots in (moves.source_M, moves.target_M) if len(slots)]
        if ends:
            self._moved_bytes += int(max(ends)) * self._expert_bytes
            self._moved_us += elapsed_us
        self._stats["moved_experts"] += len(moves.target_M)
        self._stats["moving_steps"] += 1
        self._stats["moving_us"] += elapsed_us
        self._stats["longest_us"] = max(self._stats["longest_us"], elapsed_us)
        if len(moves.logical_X):
            self._load.placement = self._pending.popleft()
