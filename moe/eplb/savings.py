"""Whether moving experts pays: what a placement saves, how long that lasts, and what moving costs. `Balancer` decides by it.

L layers, E logical experts, S slots, P ranks, M moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from expertwire.moe.eplb.placement import Placement
from expertwire.moe.eplb.rebalance import rebalance

_MAX_WINDOWS = 100.0  # for which a saving is believed to last, at most
_SLACK = 0.01  # of `rebalance`: moves cost, and the last percent is gone in the next window


class Moves(NamedTuple):
    """Experts to copy between slots, i64 [M] each; a slot gets at most one, and every source is a rank that holds the expert."""

    layer: np.ndarray
    source: np.ndarray
    target: np.ndarray


def moves(before: Placement, after: Placement) -> Moves:
    """What must be copied between ranks to get from one placement to the next; where several could send, they take turns."""
    assert before.rank_offsets == after.rank_offsets, f"{before.rank_offsets} became {after.rank_offsets}"
    layer_M, target_M = np.nonzero(before.physical_to_logical != after.physical_to_logical)
    source_M = np.empty(len(layer_M), np.int64)
    sent = np.zeros((before.num_layers, before.num_ranks), np.int64)
    for i, (layer, target) in enumerate(zip(layer_M, target_M, strict=True)):
        holders = np.flatnonzero(before.physical_to_logical[layer] == after.physical_to_logical[layer, target])
        ranks = before.rank_of_S[holders]
        least = sent[layer, ranks].argmin()
        source_M[i] = holders[least]
        sent[layer, ranks[least]] += 1
    return Moves(layer_M, source_M, target_M)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What rows and moves cost.

    Args:
        s_per_row: seconds that a row more on a layer's fullest rank takes.
        bytes_per_expert: of one layer.
        bytes_per_s: that a rank sends and receives while it moves experts.
    """

    s_per_row: float
    bytes_per_expert: int
    bytes_per_s: float

    def saved_s(self, load_LE: np.ndarray, before: Placement, after: Placement) -> np.ndarray:
        """[L]: seconds by which a window with these rows takes less under `after`."""
        return _rows_saved(load_LE, before, after) * self.s_per_row

    def moving_s(self, before: Placement, after: Placement) -> np.ndarray:
        """[L]: seconds in which the busiest rank of each layer sends or receives."""
        moved, rank_S = moves(before, after), before.rank_of_S
        busy = np.zeros((2, before.num_layers, before.num_ranks))
        np.add.at(busy[0], (moved.layer, rank_S[moved.source]), 1)
        np.add.at(busy[1], (moved.layer, rank_S[moved.target]), 1)
        return busy.max(axis=(0, 2)) * self.bytes_per_expert / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a window has led to.

    Attributes:
        placement: the one to change to; None: things stay.
        num_moves: experts that this moves; 0 if only shares change.
        predicted_s: saved in each window of that placement.
        windows: for how many this is believed to last.
        cost_s: of moving.
        actual_s: what the change before this one, if any, has saved in this window.
        expected_s: what it had been predicted to save.
    """

    placement: Placement | None
    num_moves: int
    predicted_s: float
    windows: float
    cost_s: float
    actual_s: float | None
    expected_s: float | None


class Balancer:
    """Looks at windows of load, one after another, and says when experts should move.

    A layer's experts move if what that is predicted to save in a window, times the windows for which this will last, is more than
    the move costs; shares change whenever that helps. How long it lasts is learnt from what was proposed a window ago: if that
    saves the share q of its prediction in this window, a saving is believed to fade to q each window, which sums up to
    q / (1 - q) windows. So nothing moves on the first window.

    Args:
        placement: where experts lie.
        failure_domains: as in `rebalance`.
    """

    def __init__(self, placement: Placement, failure_domains: Sequence[int] = ()) -> None:
        self.placement = placement
        self._failure_domains = tuple(failure_domains)
        self._proposed: tuple[Placement, Placement, float] | None = None  # from, to, rows saved as predicted
        self._changed: tuple[Placement, float] | None = None  # from, seconds saved as predicted

    def judge(self, load_LE: np.ndarray, costs: Costs) -> Verdict:
        """The verdict on a window; its placement, if any, is taken to be in force from now on."""
        now = self.placement
        proposal = rebalance(load_LE, now, failure_domains=self._failure_domains, slack=_SLACK)
        windows = self._lasts(load_LE)
        saved_L, moving_L = costs.saved_s(load_LE, now, proposal), costs.moving_s(now, proposal)
        worth_L = (saved_L > 0) & (saved_L * windows > moving_L)
        self._proposed = now, proposal, float(_rows_saved(load_LE, now, proposal).sum())
        actual_s = expected_s = None
        if self._changed is not None:
            before, expected_s = self._changed
            actual_s = float(costs.saved_s(load_LE, before, now).sum())
        verdict = Verdict(
            placement=mixed(now, proposal, worth_L) if worth_L.any() else None,
            num_moves=int(worth_L[moves(now, proposal).layer].sum()),
            predicted_s=float(saved_L[worth_L].sum()),
            windows=windows,
            cost_s=float(moving_L[worth_L].sum()),
            actual_s=actual_s,
            expected_s=expected_s,
        )
        if verdict.placement is not None:
            self._changed = now, verdict.predicted_s
            self.placement = verdict.placement
        return verdict

    def _lasts(self, load_LE: np.ndarray) -> float:
        if self._proposed is None or self._proposed[2] <= 0:
            return 0.0
        before, after, predicted = self._proposed
        faded = min(max(float(_rows_saved(load_LE, before, after).sum()) / predicted, 0.0), 1.0)
        return min(faded / (1 - faded), _MAX_WINDOWS) if faded < 1 else _MAX_WINDOWS


def _rows_saved(load_LE: np.ndarray, before: Placement, after: Placement) -> np.ndarray:
    """[L]: of each layer's fullest rank."""
    return before.rank_load(load_LE).max(axis=1) - after.rank_load(load_LE).max(axis=1)


def mixed(before: Placement, after: Placement, changed_L: np.ndarray) -> Placement:
    """`after` in the layers that change, `before` in the others."""
    return Placement(
        num_logical=before.num_logical,
        physical_to_logical=np.where(changed_L[:, None], after.physical_to_logical, before.physical_to_logical),
        rank_offsets=before.rank_offsets,
        domains=before.domains,
        shares=np.where(changed_L[:, None], after.shares, before.shares),
    )
