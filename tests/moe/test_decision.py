"""The decision whether a move pays: savings, costs, their duration, and the log of predictions and outcomes."""

import numpy as np
import pytest

from expertwire.moe.eplb.decision import CostModel, RebalancePolicy, copies
from expertwire.moe.eplb.placement import Placement, place

CHEAP = CostModel(s_per_row=1e-3, bytes_per_expert=1000, bytes_per_s=1e9)
DEAR = CostModel(s_per_row=1e-3, bytes_per_expert=1000, bytes_per_s=1e-3)
SKEWED = np.array([[80, 5, 5, 5, 5, 5, 5, 10]])


def swapped(placement, a, b):
    ids = placement.phy2log.copy()
    ids[:, [a, b]] = ids[:, [b, a]]
    return Placement(num_logical=8, phy2log=ids, rank_offsets=placement.rank_offsets)


def test_moves_come_from_ranks_that_hold_the_expert():
    before = place(8, 4, 4, num_layers=2)
    ids = before.phy2log.copy()
    ids[1] = np.roll(ids[1], 3)
    after = Placement(num_logical=8, phy2log=ids, rank_offsets=before.rank_offsets)
    found = copies(before, after)
    assert set(found.layer) == {1}
    assert sorted(found.target) == list(np.flatnonzero(ids[1] != before.phy2log[1]))
    assert (before.phy2log[1, found.source] == ids[1, found.target]).all()
    # Slots 0 to 11 hold experts 0 to 7 and 0 to 3. Rank 0 has the copies 0 to 2 besides ranks 2 and 3: they take turns.
    sent = np.bincount(before.rank_of_X[found.source], minlength=4)
    assert sent.tolist() == [3, 4, 3, 2]


def test_savings_and_costs_by_hand():
    before = place(8, 4)
    after = swapped(before, 1, 7)  # 80 + 5 and 5 + 10 become 80 + 10 and 5 + 5
    load = SKEWED.copy()
    assert CHEAP.saved_s(load, before, after) == pytest.approx(-0.005)
    assert CHEAP.saved_s(load, after, before) == pytest.approx(0.005)
    assert DEAR.moving_s(before, after) == pytest.approx(1e6)


def test_a_lasting_imbalance_moves_experts_once():
    balancer = RebalancePolicy(place(8, 4, 4))
    first = balancer.decide(SKEWED, CHEAP)
    assert (first.placement, first.windows) == (None, 0)
    second = balancer.decide(SKEWED, CHEAP)
    assert second.placement is not None
    assert second.num_moves == len(copies(place(8, 4, 4), second.placement).layer) > 0
    assert second.predicted_s * second.windows > second.cost_s > 0
    assert second.actual_s is None
    third = balancer.decide(SKEWED, CHEAP)
    assert third.num_moves == 0
    assert third.actual_s == pytest.approx(third.expected_s)
    assert third.expected_s == pytest.approx(second.predicted_s)
    half = balancer.decide(SKEWED // 5, CHEAP)
    assert 0 < half.actual_s < half.expected_s


def test_what_costs_more_than_it_saves_does_not_move():
    balancer = RebalancePolicy(place(8, 4, 4))
    for _ in range(4):
        decision = balancer.decide(SKEWED, DEAR)
        assert decision.num_moves == 0
        assert decision.placement is None or (decision.placement.phy2log == place(8, 4, 4).phy2log).all()


def test_what_does_not_last_does_not_move():
    """The hot expert is another one in every window."""
    balancer = RebalancePolicy(place(8, 4))
    moved = [balancer.decide(np.roll(SKEWED, 3 * i, axis=1), CHEAP).num_moves for i in range(6)]
    assert moved == [0] * 6


def test_only_layers_that_gain_change():
    load = np.concatenate([SKEWED, np.full((1, 8), 15)])
    balancer = RebalancePolicy(place(8, 4, 4, num_layers=2))
    balancer.decide(load, CHEAP)
    changed = balancer.decide(load, CHEAP).placement
    same = changed.phy2log == place(8, 4, 4, num_layers=2).phy2log
    assert same[1].all() or changed.rank_load(load)[1].max() < place(8, 4, 4, num_layers=2).rank_load(load)[1].max()
    assert not same[0].all()
