"""Decision whether to change the placement: predicted savings, how long they last, and the cost of moving experts.

L layers, E logical experts, X physical experts, P ranks, M moved experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from expertwire.moe.eplb.algorithm import rebalance
from expertwire.moe.eplb.placement import Placement

_MAX_WINDOWS = 100.0  # longest predicted duration of a saving
_SLACK = 0.01  # of `rebalance`: the last percent of balance does not outlast a window


class Copies(NamedTuple):
    """Experts to copy, i64 [M] each: layer, and physical ids of source and target; a target occurs once in a layer."""

    layer: np.ndarray
    source: np.ndarray
    target: np.ndarray


def copies(before: Placement, after: Placement) -> Copies:
    """Return the copies that lead from one placement to another; ranks that hold an expert send it in turn."""
    assert before.rank_offsets == after.rank_offsets, f"{before.rank_offsets} became {after.rank_offsets}"
    layer_M, target_M = np.nonzero(before.phy2log != after.phy2log)
    source_M = np.empty(len(layer_M), np.int64)
    sent = np.zeros((before.num_layers, before.num_ranks), np.int64)
    for i, (layer, target) in enumerate(zip(layer_M, target_M, strict=True)):
        holders = np.flatnonzero(before.phy2log[layer] == after.phy2log[layer, target])
        ranks = before.rank_of_X[holders]
        least = sent[layer, ranks].argmin()
        source_M[i] = holders[least]
        sent[layer, ranks[least]] += 1
    return Copies(layer_M, source_M, target_M)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Time that rows and moved experts cost.

    Args:
        s_per_row: seconds for each further row on a layer's fullest rank.
        bytes_per_expert: size of an expert of one layer.
        bytes_per_s: rate at which a rank sends and receives experts.
    """

    s_per_row: float
    bytes_per_expert: int
    bytes_per_s: float

    def saved_s(self, load_LE: np.ndarray, before: Placement, after: Placement) -> np.ndarray:
        """Return f64 [L], the seconds that `after` saves in a window with these rows."""
        return _rows_saved(load_LE, before, after) * self.s_per_row

    def moving_s(self, before: Placement, after: Placement) -> np.ndarray:
        """Return f64 [L], the seconds for which the busiest rank of each layer sends or receives."""
        moved, rank_X = copies(before, after), before.rank_of_X
        busy = np.zeros((2, before.num_layers, before.num_ranks))
        np.add.at(busy[0], (moved.layer, rank_X[moved.source]), 1)
        np.add.at(busy[1], (moved.layer, rank_X[moved.target]), 1)
        return busy.max(axis=(0, 2)) * self.bytes_per_expert / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Outcome of a window.

    Attributes:
        placement: the new one; None: no change.
        num_moves: experts that move; 0 if only shares change.
        predicted_s: predicted saving in a window.
        windows: predicted duration of the saving, in windows.
        cost_s: cost of moving.
        actual_s: saving of the previous change in this window, if there was one.
        expected_s: the saving that was predicted for it.
    """

    placement: Placement | None
    num_moves: int
    predicted_s: float
    windows: float
    cost_s: float
    actual_s: float | None
    expected_s: float | None


class RebalancePolicy:
    """Decides, window by window of load, which layers' experts should move.

    A layer's experts move if the predicted saving in a window, times the windows for which it lasts, exceeds the
    cost of moving; shares change whenever that helps. The duration is estimated from the previous window's
    proposal: if it saves a fraction q of its prediction in this window, a saving is assumed to decay by q each
    window, which sums up to q / (1 - q) windows. So nothing moves after the first window.

    Args:
        placement: the current one.
        failure_domains: as in `rebalance`.
    """

    def __init__(self, placement: Placement, failure_domains: Sequence[int] = ()) -> None:
        self.placement = placement
        self._failure_domains = tuple(failure_domains)
        self._proposed: tuple[Placement, Placement, float] | None = None  # from, to, rows saved as predicted
        self._changed: tuple[Placement, float] | None = None  # from, seconds saved as predicted

    def decide(self, load_LE: np.ndarray, costs: CostModel) -> Decision:
        """Return the decision on a window; its placement, if any, counts as the current one from now on."""
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
        decision = Decision(
            placement=merge_layers(now, proposal, worth_L) if worth_L.any() else None,
            num_moves=int(worth_L[copies(now, proposal).layer].sum()),
            predicted_s=float(saved_L[worth_L].sum()),
            windows=windows,
            cost_s=float(moving_L[worth_L].sum()),
            actual_s=actual_s,
            expected_s=expected_s,
        )
        if decision.placement is not None:
            self._changed = now, decision.predicted_s
            self.placement = decision.placement
        return decision

    def _lasts(self, load_LE: np.ndarray) -> float:
        if self._proposed is None or self._proposed[2] <= 0:
            return 0.0
        before, after, predicted = self._proposed
        faded = min(max(float(_rows_saved(load_LE, before, after).sum()) / predicted, 0.0), 1.0)
        return min(faded / (1 - faded), _MAX_WINDOWS) if faded < 1 else _MAX_WINDOWS


def _rows_saved(load_LE: np.ndarray, before: Placement, after: Placement) -> np.ndarray:
    """Return f64 [L], the rows that `after` saves on each layer's fullest rank."""
    return before.rank_load(load_LE).max(axis=1) - after.rank_load(load_LE).max(axis=1)


def merge_layers(before: Placement, after: Placement, changed_L: np.ndarray) -> Placement:
    """Return `after` in the layers that change and `before` in the others."""
    return Placement(
        num_logical=before.num_logical,
        phy2log=np.where(changed_L[:, None], after.phy2log, before.phy2log),
        rank_offsets=before.rank_offsets,
        domains=before.domains,
        shares=np.where(changed_L[:, None], after.shares, before.shares),
    )
