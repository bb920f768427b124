"""How one placement becomes another while ranks go on: a few experts a step, layer by layer. Numpy alone.

A layer's experts are copied beside those in use, in as many steps as that takes; then all ranks put them into their slots and use
the new placement from the same step on. So at any time there is one placement, and room for one layer's new experts is enough.

S slots (physical experts), M moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from expertwire.moe.eplb.placement import TURNS, Placement
from expertwire.moe.eplb.savings import mixed, moves


class Leg(NamedTuple):
    """What happens before a step's tokens are computed."""

    layer: int
    source_M: np.ndarray  # i32, slots to copy from
    target_M: np.ndarray  # i32, slots to copy for
    logical_S: np.ndarray  # i32, the layer's experts from now on; empty: not yet
    turns_S: np.ndarray  # i32, likewise, how many of P * TURNS turns each of an expert's replicas gets


class Migration:
    """The way from one placement to another.

    Args:
        before, after: of the same ranks and slots.
        max_moves: that a rank sends in a step, and that it receives.

    Attributes:
        placement: in force once all legs taken so far have been done.
    """

    def __init__(self, before: Placement, after: Placement, max_moves: int) -> None:
        assert max_moves > 0, max_moves
        self.placement = before
        self._after = after
        self._legs = _legs(before, after, max_moves)

    def take(self) -> Leg | None:
        """The next leg; None: it is done."""
        leg = next(self._legs, None)
        if leg is not None and len(leg.logical_S):
            published = np.arange(self._after.num_layers) == leg.layer
            self.placement = mixed(self.placement, self._after, published)
        return leg


def _legs(before: Placement, after: Placement, max_moves: int) -> Iterator[Leg]:
    changed_LS = (before.physical_to_logical != after.physical_to_logical) | (before.shares != after.shares)
    found, rank_S, nothing = moves(before, after), before.rank_of_S, np.zeros(0, np.int32)
    for layer in np.flatnonzero(changed_LS.any(axis=1)).tolist():
        of_layer = found.layer == layer
        source, target = found.source[of_layer], found.target[of_layer]
        batch_M = _batches(rank_S[source], rank_S[target], max_moves)
        last = int(batch_M.max(initial=0))
        for batch in range(last + 1):
            logical_S = turns_S = nothing
            if batch == last:
                logical_S = after.physical_to_logical[layer]
                turns_S = np.rint(after.shares[layer] * after.num_ranks * TURNS).astype(np.int32)
            source_M, target_M = (ids[batch_M == batch].astype(np.int32) for ids in (source, target))
            yield Leg(layer, source_M, target_M, logical_S, turns_S)


def _batches(from_M: np.ndarray, to_M: np.ndarray, max_moves: int) -> np.ndarray:
    """Of moves between ranks, the first batch in which neither rank is busy yet."""
    busy: dict[tuple[int, int, int], int] = {}
    batch_M = np.zeros(len(from_M), np.int64)
    for i, ends in enumerate(zip(from_M.tolist(), to_M.tolist(), strict=True)):
        batch = 0
        while any(busy.get((batch, end, rank), 0) >= max_moves for end, rank in enumerate(ends)):
            batch += 1
        for end, rank in enumerate(ends):
            busy[batch, end, rank] = busy.get((batch, end, rank), 0) + 1
        batch_M[i] = batch
    return batch_M
