"""Migration from one placement to another while ranks keep serving: a few experts a step, layer by layer. Numpy alone.

A layer's new experts are received beside those in use, over as many steps as that takes; then all ranks copy them into
their slots and use the new placement from the same step on. So at any time one placement is in force, and the memory
needed is that of one layer's moved experts.

L layers, X physical experts, M moved experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from expertwire.moe.eplb.decision import copies, merge_layers
from expertwire.moe.eplb.placement import TURNS, Placement
from expertwire.scheduler.plan import ExpertMoves


class Migration:
    """The steps from one placement to another.

    Args:
        before, after: of the same ranks and physical experts.
        max_moves: most experts that a rank sends, and that it receives, in a step.

    Attributes:
        placement: the one in force once all moves returned so far have been carried out.
    """

    def __init__(self, before: Placement, after: Placement, max_moves: int) -> None:
        assert max_moves > 0, max_moves
        self.placement = before
        self._after = after
        self._moves = _moves(before, after, max_moves)

    def next_moves(self) -> ExpertMoves | None:
        """Return the moves of the next step; None: the migration is complete."""
        moves = next(self._moves, None)
        if moves is not None and len(moves.logical_X):
            switched_L = np.arange(self._after.num_layers) == moves.layer
            self.placement = merge_layers(self.placement, self._after, switched_L)
        return moves


def _moves(before: Placement, after: Placement, max_moves: int) -> Iterator[ExpertMoves]:
    changed_LX = (before.phy2log != after.phy2log) | (before.shares != after.shares)
    found, rank_X, nothing = copies(before, after), before.rank_of_X, np.zeros(0, np.int32)
    for layer in np.flatnonzero(changed_LX.any(axis=1)).tolist():
        of_layer = found.layer == layer
        source, target = found.source[of_layer], found.target[of_layer]
        batch_M = _batches(rank_X[source], rank_X[target], max_moves)
        last = int(batch_M.max(initial=0))
        for batch in range(last + 1):
            logical_X = turns_X = nothing
            if batch == last:
                logical_X = after.phy2log[layer]
                turns_X = np.rint(after.shares[layer] * after.num_ranks * TURNS).astype(np.int32)
            source_M, target_M = (ids[batch_M == batch].astype(np.int32) for ids in (source, target))
            yield ExpertMoves(layer, source_M, target_M, logical_X, turns_X)


def _batches(from_M: np.ndarray, to_M: np.ndarray, max_moves: int) -> np.ndarray:
    """Return for each move between ranks the first batch in which neither rank is at its limit."""
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
