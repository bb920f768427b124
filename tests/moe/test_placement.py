"""Where physical experts lie: every expert somewhere, ranks even, replicas used by turns, the impossible refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.moe.placement import Placement, place

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60))


@given(SIZES)
def test_placements(sizes):
    num_experts, num_ranks, redundant = sizes
    if redundant > num_experts * num_ranks - num_experts:
        with pytest.raises(ValueError, match="redundant_experts"):
            place(num_experts, num_ranks, redundant)
        return
    placement = place(num_experts, num_ranks, redundant)
    ranks = [placement.experts_of(rank) for rank in range(num_ranks)]
    assert placement.num_ranks == num_ranks
    assert sum(ranks, ()) == placement.physical_to_logical
    assert set(placement.physical_to_logical) == set(range(num_experts))
    assert len(placement.physical_to_logical) == max(num_experts + redundant, num_ranks)
    assert all(len(set(experts)) == len(experts) for experts in ranks), "a rank holds an expert twice"
    counts = [len(experts) for experts in ranks]
    assert max(counts) - min(counts) <= 1
    copies = np.bincount(placement.physical_to_logical)
    assert copies.max() - copies.min() <= 1


@given(SIZES.filter(lambda s: s[2] <= s[0] * s[1] - s[0]))
def test_every_home_finds_a_copy_and_its_own_first(sizes):
    placement = place(*sizes)
    for home in range(sizes[1]):
        physical = placement.physical_for(home)
        assert [placement.physical_to_logical[p] for p in physical] == list(range(sizes[0]))
        first, last = placement.rank_offsets[home : home + 2]
        for logical in placement.experts_of(home):
            assert first <= physical[logical] < last


def test_ranks_without_a_copy_take_turns():
    placement = Placement(num_logical=2, physical_to_logical=(0, 1, 0, 1, 1, 1), rank_offsets=(0, 2, 3, 4, 5, 6))
    used = np.array([placement.physical_for(home) for home in range(5)])
    assert used[:, 0].tolist() == [0, 2, 0, 2, 0]
    assert used[:, 1].tolist() == [1, 3, 3, 4, 5]


def test_by_hand():
    assert place(8, 3).rank_offsets == (0, 3, 6, 8)
    assert place(2, 3).physical_to_logical == (0, 1, 0)
    assert [place(5, 2, 3).experts_of(rank) for rank in (0, 1)] == [(0, 1, 2, 3), (4, 0, 1, 2)]


@pytest.mark.parametrize(("args", "allowed"), [((8, 1, 1), "0 to 0"), ((4, 2, 5), "0 to 4"), ((1, 3, 3), "0 to 2")])
def test_what_cannot_be_placed_says_what_can(args, allowed):
    with pytest.raises(ValueError, match=f"allowed: {allowed}"):
        place(*args)


def test_a_missing_expert_is_found():
    with pytest.raises(AssertionError, match=r"\[1\] have no physical one"):
        Placement(num_logical=2, physical_to_logical=(0, 0), rank_offsets=(0, 1, 2))
