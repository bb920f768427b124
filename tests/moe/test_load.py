"""The account of expert load: exact, under the placement that was in force, in few numbers."""

import numpy as np
import pytest

from expertwire.moe.eplb.load import ExpertLoad, hottest
from expertwire.moe.eplb.placement import Placement, place


def test_spread_and_tax_by_hand():
    load = ExpertLoad(place(4, 2), num_layers=3)
    load.add(np.array([[10, 10, 20, 20], [30, 0, 0, 10], [0, 0, 0, 0]]))
    load.add(np.array([[0, 0, 20, 20], [10, 0, 0, 10], [0, 0, 0, 0]]))
    found = load.summary()
    assert found["expert_load"] == [[10, 10, 40, 40], [40, 0, 0, 20], [0, 0, 0, 0]]
    # Layer 0: 20 and 80, so rank 1 has 30 beyond the mean; layer 1: 40 and 20, rank 0 has 10.
    assert found["layer_spread"] == pytest.approx([1.6, 40 / 30, 0])
    assert found["rank_rows"] == [60, 100]
    assert found["rank_tax"] == pytest.approx([10 / 80, 30 / 80])


def test_rows_belong_to_the_placement_in_force():
    before = place(2, 2)
    load = ExpertLoad(before, num_layers=1)
    load.add(np.array([[9, 1]]))
    load.placement = Placement(num_logical=2, phy2log=np.array([1, 0]), rank_offsets=before.rank_offsets)
    load.add(np.array([[9, 1]]))
    assert load.summary()["rank_rows"] == [10, 10]
    assert load.summary()["expert_load"] == [[18, 2]]


def test_replicas_share_rows():
    load = ExpertLoad(place(2, 3), num_layers=1)  # expert 0 is on ranks 0 and 2
    load.add(np.array([[8, 6]]))
    assert load.summary()["rank_rows"] == [4, 6, 4]


def test_the_hottest():
    assert hottest(np.array([[1, 1, 4], [0, 0, 0], [6, 2, 4]]), 2) == [(0, 2, 2.0), (2, 0, 1.5)]
