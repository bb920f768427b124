"""Load of experts and ranks: exact counts of routed rows, and summary statistics. Numpy alone.

L layers, E logical experts, P ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from expertwire.moe.eplb.placement import Placement


class ExpertLoad:
    """Routed rows since the start.

    Attributes:
        placement: the current one; set it when that changes, after the rows of the old one have been added.
        rows_LE: i64, rows of each logical expert.
    """

    def __init__(self, placement: Placement, num_layers: int) -> None:
        self.placement = placement
        self.rows_LE = np.zeros((num_layers, placement.num_logical), np.int64)
        self._rows_LP = np.zeros((num_layers, placement.num_ranks))

    def add(self, rows_LE: np.ndarray) -> None:
        """Add rows that were routed under the current placement."""
        self.rows_LE += rows_LE
        self._rows_LP += self.placement.rank_load(rows_LE)

    def summary(self) -> dict[str, list[Any]]:
        """Return JSON values: `expert_load`, rows by [layer][expert]; `layer_spread`, by layer, the fullest rank's rows
        divided by the mean (0 without rows); `rank_rows` and `rank_tax`, by rank.

        A rank's tax is the relative slowdown of all ranks by those layers in which it is the fullest: its rows there
        beyond the mean, divided by the mean rank's rows of all layers.
        """
        mean_L, fullest_L = self._rows_LP.mean(axis=1), self._rows_LP.argmax(axis=1)
        beyond_L = self._rows_LP.max(axis=1) - mean_L
        tax_P = np.bincount(fullest_L, beyond_L, minlength=self._rows_LP.shape[1]) / max(mean_L.sum(), 1.0)
        spread_L = np.divide(beyond_L + mean_L, mean_L, out=np.zeros_like(mean_L), where=mean_L > 0)
        return {
            "expert_load": self.rows_LE.tolist(),
            "layer_spread": spread_L.tolist(),
            "rank_rows": self._rows_LP.sum(axis=0).tolist(),
            "rank_tax": tax_P.tolist(),
        }


def over_mean(rows_LE: np.ndarray) -> np.ndarray:
    """Return f64 [L, E], each expert's rows divided by its layer's mean; 0 in layers without rows."""
    mean_L1 = rows_LE.mean(axis=1, keepdims=True)
    return np.divide(rows_LE, mean_L1, out=np.zeros(rows_LE.shape), where=mean_L1 > 0)


def hottest(rows_LE: np.ndarray, count: int = 8) -> list[tuple[int, int, float]]:
    """Return (layer, expert, rows divided by the layer's mean) of the `count` largest ratios."""
    times_LE = over_mean(rows_LE)
    order = np.argsort(-times_LE, axis=None, kind="stable")[:count]
    at = zip(*np.unravel_index(order, times_LE.shape), strict=True)
    return [(int(layer), int(expert), float(times_LE[layer, expert])) for layer, expert in at]
