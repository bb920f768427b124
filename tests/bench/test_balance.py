"""`bench balance`: its bound against all placements, its counting against a loop, its routing, the peer, and a whole run."""

import argparse
import itertools
import json

import numpy as np
import pytest

from expertwire.bench.scheduler import balance, balance_peer, balance_routing
from expertwire.moe.eplb.algorithm import rebalance
from expertwire.moe.eplb.placement import Placement, place


def test_the_peer_by_hand():
    load = np.array([90.0, 40.0, 30.0, 20.0])
    experts, counts = balance_peer.replicate(load, 6)
    assert (experts.tolist(), counts.tolist()) == ([0, 1, 2, 3, 0, 0], [3, 1, 1, 1])
    assert balance_peer.pack(np.array([5.0, 4.0, 3.0, 3.0, 2.0, 1.0]), 3) == [[0, 5], [1, 4], [2, 3]]
    # 40 | 30, 30 beside the 30, 30 beside the 40, and as the first now has 70 and the second 60, a 30 and the 20.
    assert balance_peer.balance(load, 6, 2).tolist() == [1, 0, 3, 0, 2, 0]
    # Groups (0, 1) and (2, 3) each have a node, which replicates its own.
    assert balance_peer.balance(load, 6, 2, num_groups=2, num_nodes=2).tolist() == [0, 0, 1, 3, 2, 2]


def test_no_placement_beats_the_bound():
    """All placements of four experts in six slots of two or three ranks, with the best shares."""
    rng = np.random.default_rng(0)
    for ranks, _ in itertools.product((2, 3), range(4)):
        load = rng.integers(1, 100, (1, 4)) ** 2
        offsets = tuple(range(0, 7, 6 // ranks))
        best = np.inf
        for ids in itertools.product(range(4), repeat=6):
            ranks_of = [set(ids[a:b]) for a, b in itertools.pairwise(offsets)]
            if set(ids) == set(range(4)) and sum(map(len, ranks_of)) == 6:
                best = min(best, least_full(load[0], ranks_of))
        bound = balance.lower_bound(load, 6, ranks)[0] * load.sum() / ranks
        assert bound <= best * (1 + 1e-9)
        found = rebalance(load, place(4, ranks, 2)).rank_load(load).max()
        assert best * (1 - 1e-9) <= found <= 1.25 * best


def test_the_bound_knows_what_lies_beside_hot_experts():
    """Three replicas at most of an expert of 100 rows, each beside one of ten: no rank can have less than 130 / 3."""
    load = np.array([[100, 10, 10, 10, 10, 10]])
    assert balance.lower_bound(load, 8, 4) == pytest.approx([130 / 3 / 37.5])
    assert rebalance(load, place(6, 4, 2)).rank_load(load).max() == pytest.approx(130 / 3, rel=0.01)


def least_full(load, ranks_of):
    """The fullest rank's rows with the best shares: for every set of ranks, what only they hold must fit there (Hall)."""
    full = 0.0
    for size in range(1, len(ranks_of) + 1):
        for chosen in itertools.combinations(range(len(ranks_of)), size):
            others = set().union(*(ranks_of[r] for r in range(len(ranks_of)) if r not in chosen))
            full = max(full, sum(load[e] for e in range(len(load)) if e not in others) / size)
    return full


def test_rows_are_counted_where_they_go():
    placement = place(8, 4, 4, num_layers=2)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(8), (2, 1100, 1)), axis=2)[:, :, :2]
    counted = balance._routed(ids, placement)
    expected = np.zeros((2, 4), int)
    tables = [[placement.log2phy(home, layer) for home in range(4)] for layer in range(2)]
    tokens = balance.STEP_TOKENS
    for layer, t, k in np.ndindex(2, 1100 // (4 * tokens) * 4 * tokens, 2):
        home, turn = t // tokens % 4, t % tokens % balance.TURNS
        expected[layer, placement.rank_of_X[tables[layer][home][turn, ids[layer, t, k]]]] += 1
    assert (counted == expected).all()
    by_step = balance._routed(ids, placement, steps=True)
    assert by_step.shape == (2, 2, 4)
    assert (by_step.sum(axis=1) == counted).all()


@pytest.mark.parametrize("draw", [balance_routing.power_law, balance_routing.zipf])
def test_drawn_routing(draw):
    ids = draw(1.2, (2, 4096, 4), 32, seed=3)
    assert ids.shape == (2, 2, 4096, 4)
    assert (np.diff(np.sort(ids, axis=-1), axis=-1) > 0).all(), "a token has an expert twice"
    load = np.array([[np.bincount(layer.ravel(), minlength=32) for layer in window] for window in ids])
    assert load.max() > 4 * load.mean()
    assert np.abs(load[0] - load[1]).max() < 8 * load.max() ** 0.5, "the windows are not alike"
    assert (draw(1.2, (2, 4096, 4), 32, seed=3) == ids).all()


def test_zipf_draws_by_its_weights():
    [[first, _]] = balance_routing.zipf(1.0, (1, 20000, 1), 4, seed=0).swapaxes(0, 1)
    shares = np.sort(np.bincount(first.ravel(), minlength=4))[::-1] / 20000
    assert shares == pytest.approx(np.array([12, 6, 4, 3]) / 25, abs=0.015)


def test_recorded_routing_is_the_models():
    ids = balance_routing.recorded(400, seed=0)
    assert ids.shape == (2, 3, 400, 2)
    assert (ids[..., 0] != ids[..., 1]).all()
    load = np.array([np.bincount(layer.ravel(), minlength=8) for layer in ids[0]])
    assert (load.max(axis=1) > 1.1 * load.mean(axis=1)).all(), "a trained router is not uniform"


def test_a_whole_run(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    balance.add_arguments(parser)
    file = tmp_path / "balance.json"
    options = ["--tokens", "2048", "--layers", "1", "--ranks", "8", "--json", str(file)]
    assert balance.main(parser.parse_args(options)) == 0
    result = json.loads(file.read_text())
    rows = {row["routing"]: row for row in result["rows"]}
    assert set(rows) == {"power law 1.01", "power law 1.2", "zipf 1.01", "zipf 1.2", "demo model"}
    for row in rows.values():
        assert row["slots"] == (16 if row["routing"] == "demo model" else 288)
        assert 1 <= row["bound"]["mean"] <= row["ours"]["mean"] < row["static"]["mean"]
        assert row["over_theirs_planned"] < 1.005
    assert result["rebalance_s"]["8"] > 0
    assert "power law 1.01" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--tokens must be at least 1024, got 5"):
        balance.main(parser.parse_args(["--tokens", "5"]))


def test_equal_shares_are_what_the_peer_gets():
    theirs = Placement(num_logical=3, phy2log=np.array([0, 1, 0, 2]), rank_offsets=(0, 2, 4))
    assert theirs.rank_load(np.array([[10, 3, 5]])).tolist() == [[8, 10]]
