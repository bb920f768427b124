"""Moving experts: moves that bound what a rank does in a step, and ranks that carry them out without changing a bit."""

import numpy as np
import pytest
import torch
from helpers.examples import examples
from helpers.ranks import Ranks
from hypothesis import given
from hypothesis import strategies as st
from test_layer import D, E, layer, tokens

from expertwire.moe.eplb import mover as movers
from expertwire.moe.eplb.migration import Migration
from expertwire.moe.eplb.mover import ExpertMover
from expertwire.moe.eplb.placement import TURNS, Placement, place


def other(placement, seed):
    """A placement to go to: some experts have changed places, and all shares."""
    rng = np.random.default_rng(seed)
    ids, rank_X = placement.phy2log.copy(), placement.rank_of_X
    for i, _ in np.ndindex(len(ids), 20):
        a, b = rng.integers(0, placement.num_physical, 2)
        row = ids[i]
        if row[b] not in row[rank_X == rank_X[a]] and row[a] not in row[rank_X == rank_X[b]]:
            row[[a, b]] = row[[b, a]]
    return Placement(
        num_logical=placement.num_logical,
        phy2log=ids,
        rank_offsets=placement.rank_offsets,
        shares=rng.random(ids.shape),
    )


@examples(30)
@given(st.integers(2, 12), st.integers(2, 5), st.integers(0, 8), st.integers(1, 3), st.integers(0, 99))
def test_moves_lead_from_one_placement_to_the_other(experts, ranks, redundant, max_moves, seed):
    before = place(experts, ranks, min(redundant, experts * ranks - experts), num_layers=3)
    after = other(before, seed)
    migration, held, rank_X = Migration(before, after, max_moves), before.phy2log.copy(), before.rank_of_X
    arrived = {}
    while (moves := migration.next_moves()) is not None:
        assert np.bincount(rank_X[moves.source_M], minlength=1).max(initial=0) <= max_moves
        assert np.bincount(rank_X[moves.target_M], minlength=1).max(initial=0) <= max_moves
        # What is copied is what the slot holds while the old placement is in force.
        arrived |= {int(t): held[moves.layer, s] for s, t in zip(moves.source_M, moves.target_M, strict=True)}
        if len(moves.logical_X):
            for slot, expert in arrived.items():
                held[moves.layer, slot] = expert
            assert (held[moves.layer] == moves.logical_X).all(), "a slot holds another expert than the placement says"
            assert (migration.placement.layer(moves.layer) == moves.logical_X).all()
            assert (np.rint(migration.placement.shares[moves.layer] * ranks * TURNS) == moves.turns_X).all()
            arrived.clear()
    assert not arrived
    assert (held == after.phy2log).all()
    assert (migration.placement.shares == after.shares).all()


def rows_while_moving(group, seeds, max_moves):
    """The layer's output before, between and after all moves through several placements."""
    moe = layer(group, torch.bfloat16, redundant=3)
    placement = place(E, group.size, 3)
    mover, x, counts = ExpertMover({0: moe}, placement, group), tokens(group.rank, 9, torch.bfloat16), [9] * group.size
    outputs, moved = [moe.forward(x, x, counts)[0]], 0
    for seed in seeds:
        migration = Migration(placement, other(placement, seed), max_moves)
        while (moves := migration.next_moves()) is not None:
            mover.move(moves)
            moved += len(moves.target_M)
            outputs.append(moe.forward(x, x, counts)[0])
        placement = migration.placement
    used = np.unique(moe.log2phy_QE.numpy(), axis=0)
    return outputs, moved, (used == np.unique(placement.log2phy(group.rank), axis=0)).all()


@pytest.fixture(scope="module")
def three_ranks():
    with Ranks(3, timeout_s=180) as ranks:
        yield ranks


def test_outputs_are_the_same_after_every_move(three_ranks):
    for outputs, moved, in_force in three_ranks.run(rows_while_moving, (1, 2, 3), 2):
        assert moved > 9
        assert in_force, "the tables are not those of the last placement"
        assert all(torch.equal(outputs[0], later) for later in outputs)


def damaged(group):
    moe = layer(group, torch.float32, redundant=3)
    placement = place(E, group.size, 3)
    intact = movers.exchange_now

    def flip_a_bit(*args):
        rows = intact(*args)
        if len(rows):
            rows[0, D // 2] ^= 4
        return rows

    movers.exchange_now = flip_a_bit
    try:
        before = [weight.clone() for weight in moe.experts.weights]
        mover, migration = ExpertMover({0: moe}, placement, group), Migration(placement, other(placement, 1), 4)
        try:
            while (moves := migration.next_moves()) is not None:
                mover.move(moves)
        except RuntimeError as error:
            return str(error), all(map(torch.equal, before, moe.experts.weights))
    finally:
        movers.exchange_now = intact
    return "", False


def test_a_damaged_copy_is_not_used(three_ranks):
    messages, untouched = zip(*three_ranks.run(damaged), strict=True)
    assert all(untouched)
    assert all("an expert of layer 0 from rank" in text and "is damaged" in text for text in messages), messages


def test_turns_travel_exactly():
    placement = Placement(
        num_logical=2,
        phy2log=np.array([0, 1, 0, 1]),
        rank_offsets=(0, 2, 4),
        shares=np.array([0.7, 1, 0.3, 0]),
    )
    turns = np.rint(placement.shares * 2 * TURNS)
    again = Placement(num_logical=2, phy2log=np.array([0, 1, 0, 1]), rank_offsets=(0, 2, 4), shares=turns)
    assert (again.shares == placement.shares).all()
