"""Placements: every expert has a place, ranks and replicas are used evenly, the impossible is refused."""

import numpy as np
import pytest
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from expertwire.moe.eplb.placement import TURNS, Placement, place

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60))


@given(SIZES)
def test_placements(sizes):
    num_experts, num_ranks, redundant = sizes
    if redundant > num_experts * num_ranks - num_experts:
        with pytest.raises(ValueError, match="num_redundant_experts"):
            place(num_experts, num_ranks, redundant)
        return
    placement = place(num_experts, num_ranks, redundant)
    ranks = [placement.experts_of(rank) for rank in range(num_ranks)]
    assert placement.num_ranks == num_ranks
    assert sum(ranks, ()) == tuple(placement.layer(0))
    assert set(placement.layer(0)) == set(range(num_experts))
    assert placement.num_physical == max(num_experts + redundant, num_ranks)
    assert all(len(set(experts)) == len(experts) for experts in ranks), "a rank holds an expert twice"
    counts = [len(experts) for experts in ranks]
    assert max(counts) - min(counts) <= 1
    copies = np.bincount(placement.layer(0))
    assert copies.max() - copies.min() <= 1


@examples(12)
@given(SIZES.filter(lambda s: s[2] <= s[0] * s[1] - s[0]))
def test_every_home_finds_a_copy_and_its_own_first(sizes):
    placement = place(*sizes)
    logical = placement.layer(0)
    for home in range(sizes[1]):
        log2phy_QE = placement.log2phy(home)
        assert (logical[log2phy_QE] == np.arange(sizes[0])).all()
        first, last = placement.rank_offsets[home : home + 2]
        for expert in placement.experts_of(home):
            assert ((first <= log2phy_QE[:, expert]) & (log2phy_QE[:, expert] < last)).all()


@st.composite
def placements(draw):
    """Draw placements of two layers, with any experts as replicas, and ranks in any domains."""
    num_experts, num_ranks = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    per_rank = [rng.permutation(num_experts)[: rng.integers(0, num_experts + 1)] for _ in range(num_ranks - 1)]
    per_rank.append(np.setdiff1d(np.arange(num_experts), np.concatenate([[-1], *per_rank])))
    return Placement(
        num_logical=num_experts,
        phy2log=np.tile(np.concatenate(per_rank), (2, 1)),
        rank_offsets=(0, *np.cumsum([len(experts) for experts in per_rank]).tolist()),
        domains=tuple(rng.integers(0, draw(st.integers(1, 3)), num_ranks).tolist()),
        shares=rng.random((2, sum(map(len, per_rank)))) ** 3 if draw(st.booleans()) else np.ones(1),
    )


@examples(40)
@given(placements())
def test_replicas_get_their_shares_of_an_experts_rows(placement):
    table_PQE = np.stack([placement.log2phy(home, 1) for home in range(placement.num_ranks)])
    used_X = np.bincount(table_PQE.ravel(), minlength=placement.num_physical) / (
        table_PQE.shape[0] * table_PQE.shape[1]
    )
    assert used_X == pytest.approx(placement.shares[1])
    assert table_PQE.shape[1] == (1 if placement.num_physical == placement.num_logical else TURNS)


def test_shares_are_rounded_to_turns():
    ids, offsets = np.array([0, 1, 0, 1, 0, 1]), (0, 2, 4, 6)
    even = Placement(num_logical=2, phy2log=ids, rank_offsets=offsets)
    assert even.shares.tolist() == [[1 / 3] * 6]
    given = np.array([[5, 0, 3, 0, 2, 0]])
    placement = Placement(num_logical=2, phy2log=ids, rank_offsets=offsets, shares=given)
    assert placement.shares[0, ::2] == pytest.approx([0.5, 0.3, 0.2], abs=1 / (3 * TURNS))
    assert placement.shares[0, 1::2].tolist() == [1 / 3] * 3, "nothing is known of expert 1"
    assert placement.shares.sum() == pytest.approx(2)


def test_a_replica_in_the_domain_is_used_as_far_as_evenness_allows():
    def used(domains, *holders):
        """By home rank, the share of its turns at each of the replicas."""
        logical = [[1 + 10 * rank, *([0] if rank in holders else [])] for rank in range(6)]
        ids = np.unique(np.concatenate(logical), return_inverse=True)[1]
        offsets = (0, *np.cumsum([len(experts) for experts in logical]).tolist())
        placement = Placement(num_logical=7, phy2log=ids, rank_offsets=offsets, domains=domains)
        physical = np.flatnonzero(ids == 0)
        tables = [placement.log2phy(home)[:, 0] for home in range(6)]
        return [[float((table == p).mean()) for p in physical] for table in tables]

    two = (0, 0, 0, 1, 1, 1)
    assert used(two, 0, 3) == [[1, 0]] * 3 + [[0, 1]] * 3
    assert used((), 0, 3) == [[1, 0], [0.5, 0.5], [0.5, 0.5], [0, 1], [0.5, 0.5], [0.5, 0.5]]
    # Three replicas take a third each: two in one domain need a sixth of the rows from the other.
    shares = used(two, 0, 1, 3)
    assert shares[:3] == [[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]]
    assert [sum(row[:2]) for row in shares[3:]] == [0, 0, 1]
    assert np.sum(shares, axis=0).tolist() == [2, 2, 2]


def test_by_hand():
    assert place(8, 3).rank_offsets == (0, 3, 6, 8)
    assert place(2, 3).layer(0).tolist() == [0, 1, 0]
    assert [place(5, 2, 3).experts_of(rank) for rank in (0, 1)] == [(0, 1, 2, 3), (4, 0, 1, 2)]


@pytest.mark.parametrize(("args", "allowed"), [((8, 1, 1), "0 to 0"), ((4, 2, 5), "0 to 4"), ((1, 3, 3), "0 to 2")])
def test_what_cannot_be_placed_says_what_can(args, allowed):
    with pytest.raises(ValueError, match=f"allowed: {allowed}"):
        place(*args)


def test_a_missing_expert_is_found():
    with pytest.raises(AssertionError, match=r"\[1\] of layer 1 have no physical one"):
        Placement(num_logical=2, phy2log=np.array([[0, 1], [0, 0]]), rank_offsets=(0, 1, 2))
