"""Rebalancing: nearly even, never worse than the published algorithm, whole, apart, and with few moves."""

import numpy as np
import pytest
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from expertwire.bench.scheduler.balance_peer import balance
from expertwire.moe.eplb.algorithm import rebalance
from expertwire.moe.eplb.placement import Placement, place


def loads(layers, experts, seed, top=1000.0):
    return np.exp(np.random.default_rng(seed).random((layers, experts)) * np.log(top)).round()


def spread(placement, load):
    rows = placement.rank_load(load)
    return rows.max(axis=1) / rows.mean(axis=1)


def check_whole(before, after):
    """As many slots on every rank, every expert somewhere, none twice on a rank."""
    assert after.rank_offsets == before.rank_offsets
    for layer in range(after.num_layers):
        for rank in range(after.num_ranks):
            experts = after.experts_of(rank, layer)
            assert len(set(experts)) == len(experts), f"layer {layer}, rank {rank}: {experts}"
            gone = set(before.experts_of(rank, layer)) - set(experts)
            kept = [b == a for b, a in zip(before.experts_of(rank, layer), experts, strict=True)]
            assert sum(kept) == len(experts) - len(gone), "an expert that stays has changed its slot"


@examples(40)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 30), st.integers(0, 999), st.integers(1, 3))
def test_any_shape_stays_whole(experts, ranks, redundant, seed, domains):
    redundant = min(redundant, experts * ranks - experts)
    before = place(experts, ranks, redundant, num_layers=3)
    rng = np.random.default_rng(seed)
    before = Placement(
        num_logical=experts,
        phy2log=before.phy2log,
        rank_offsets=before.rank_offsets,
        domains=tuple(rng.integers(0, domains, ranks).tolist()),
    )
    load = np.concatenate([loads(1, experts, seed), rng.integers(0, 3, (1, experts)), np.zeros((1, experts))])
    after = rebalance(load, before, failure_domains=rng.integers(0, 3, ranks).tolist())
    check_whole(before, after)
    assert (after.rank_load(load).max(axis=1) <= 1.05 * before.rank_load(load).max(axis=1)).all()
    assert (after.phy2log[2] == before.phy2log[2]).all(), "a layer without load has moved"


@pytest.mark.parametrize("ranks", [8, 32])
def test_the_fullest_rank_is_nearly_the_mean(ranks):
    load = loads(4, 256, ranks)
    before = place(256, ranks, 32, num_layers=4)
    assert spread(before, load).min() > 1.3
    assert spread(rebalance(load, before), load).max() < 1.005


def test_equal_pieces_where_full_ones_do_not_fit():
    """By a power of their rank, the experts' loads leave no room for pieces that fill a rank."""
    load = np.round(1e5 / np.arange(1.0, 65))[None]
    assert spread(rebalance(load, place(64, 16, 16)), load).max() < 1.005


@examples(12)
@given(st.sampled_from([(16, 8, 16), (64, 8, 72), (64, 16, 80), (96, 24, 120)]), st.integers(0, 999))
def test_never_worse_than_the_published_algorithm(shape, seed):
    experts, ranks, slots = shape
    load = loads(2, experts, seed, top=10.0 ** (1 + seed % 5))
    before = place(experts, ranks, slots - experts, num_layers=2)
    theirs = Placement(
        num_logical=experts,
        phy2log=np.stack([balance(row, slots, ranks) for row in load]),
        rank_offsets=before.rank_offsets,
    )
    # Shares are rounded to 1 / (32 P), which is something of an expert that is much for several ranks.
    assert (spread(rebalance(load, before, slack=0.0), load) <= 1.01 * spread(theirs, load)).all()


def test_each_expert_has_two_homes_that_fail_apart_where_there_are_slots():
    trays, domains = [0, 0, 1, 1, 2, 2, 3, 3], (0, 0, 0, 0, 1, 1, 1, 1)
    start = place(32, 8, 40, num_layers=3)
    before = Placement(
        num_logical=32,
        phy2log=start.phy2log,
        rank_offsets=start.rank_offsets,
        domains=domains,
    )
    load = loads(3, 32, 5)
    after = rebalance(load, before, failure_domains=trays)
    after = rebalance(
        loads(3, 32, 5) * np.random.default_rng(1).uniform(0.7, 1.4, load.shape), after, failure_domains=trays
    )
    for layer in range(3):
        for expert in range(32):
            ranks = after.rank_of_X[after.layer(layer) == expert]
            assert len({trays[rank] for rank in ranks}) >= 2, f"expert {expert} of layer {layer} is on {ranks}"
            assert len({domains[rank] for rank in ranks}) == 2
    assert spread(after, load).max() < 1.3


def test_nothing_moves_for_nothing_and_little_for_little():
    load = loads(3, 64, 1)
    first = rebalance(load, place(64, 8, 8, num_layers=3))
    again = rebalance(load, first)
    assert (again.phy2log == first.phy2log).all()
    other = load.copy()
    other[1, np.argmin(load[1])] += load[1].sum() / 8  # a cold expert has become hot
    moved = rebalance(other, first).phy2log != first.phy2log
    assert not moved[[0, 2]].any(), "layers whose load is the same have moved"
    assert 0 < moved[1].sum() <= 24
    # What replicas can even out by their shares moves nothing.
    single = np.array([[3, 2, 2, 1]])
    both = place(4, 2, 4)
    after = rebalance(single, both)
    assert (after.phy2log == both.phy2log).all()
    assert spread(after, single) == pytest.approx(1)


def test_shares_send_rows_where_they_are_said_to_go():
    """Rows counted one by one, by the tables of every rank."""
    load = loads(1, 24, 3)
    after = rebalance(load, place(24, 4, 8))
    tables = [after.log2phy(home) for home in range(4)]
    rows = np.zeros(after.num_physical)
    for table in tables:
        np.add.at(rows, table, np.broadcast_to(load[0] / table.size * 24 / 4, table.shape))
    by_rank = np.add.reduceat(rows, after.rank_offsets[:-1])
    assert by_rank == pytest.approx(after.rank_load(load)[0])


def test_by_hand():
    """Four experts on two ranks of three slots: one on both, which evens out what the others are apart."""
    load = np.array([[64, 30, 20, 14]])
    after = rebalance(load, place(4, 2, 2))
    assert np.count_nonzero(after.layer(0) == 0) == 2
    assert after.rank_load(load).tolist() == [[64, 64]]
