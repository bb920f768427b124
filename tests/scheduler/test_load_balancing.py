"""Data-parallel load balancing: equal work in the coming steps, and cached prefixes where they are if that is cheaper."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.sim_ranks import CACHES, make_config, make_request
from hypothesis import given
from hypothesis import strategies as st

from expertwire.scheduler._compiled.admissions import pick_rank
from expertwire.scheduler.load_balancing import LeastLoaded
from expertwire.scheduler.scheduler import Scheduler

EVERY = np.ones(3, bool)
RULE = LeastLoaded(horizon=10, kv_share=0.01)


def load(*requests):
    """Return the load of requests (tokens, computed, left)."""
    return RULE.load(*np.array(requests).T).tolist()


def test_load_is_the_work_of_the_coming_steps():
    whole, ending, endless, ten = load((100, 60, 50), (100, 99, 3), (100, 99, 500), (100, 99, 10))
    assert whole == pytest.approx(40 + 10 * (1 + 1.0)), "its prompt's rest, then ten tokens with their cache"
    assert ending == pytest.approx(1 + 3 * (1 + 1.0)), "one that is about to end weighs less"
    assert endless == ten, "how much it might sample at most says nothing"


def test_long_context_loads_more_than_short_ones():
    long, short = load((1000, 999, 50), (10, 9, 50))
    assert long > 4 * short


def test_cached_token_reduces_the_load_by_the_credit():
    none, some = load((100, 0, 50), (100, 64, 50))
    assert none - some == 64 * RULE.credit


def test_least_loaded_rank_is_picked():
    load = np.array([30.0, 10.0, 10.0])
    assert pick_rank(EVERY, load, -1, 0) == 1, "the lowest of equals"
    assert pick_rank(np.array([True, False, True]), load, -1, 0) == 2
    assert pick_rank(np.array([True, False, False]), load, -1, 0) == 0
    assert pick_rank(np.zeros(3, bool), load, 0, 100) == -1


def test_cached_prefix_is_kept_until_recomputing_is_cheaper():
    load = np.array([30.0, 20.0, 10.0])
    assert pick_rank(EVERY, load, 0, 19) == 2
    assert pick_rank(EVERY, load, 0, 20) == 0, "the cached prefix is worth the difference"
    assert pick_rank(np.array([False, True, True]), load, 0, 100) == 2, "the rank of its prefix cannot take it"
    assert load.tolist() == [30.0, 20.0, 10.0]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(-2, 5),
    st.integers(0, 60),
)
def test_picked_rank_has_the_least_load_less_credit(ranks, holder, num_cached):
    fits, load = np.array([fit for fit, _ in ranks]), np.array([load for _, load in ranks], float)
    holder = min(holder, len(ranks) - 1)
    chosen = pick_rank(fits, load, holder, num_cached)
    if holder >= 0:
        load[holder] -= num_cached
    assert (chosen < 0) == (not fits.any())
    if chosen >= 0:
        assert fits[chosen]
        assert load[chosen] == load[fits].min()


class Crowded:
    """Prefers the most loaded rank, and records its calls."""

    credit = None

    def __init__(self) -> None:
        self.calls: list[list[list[float]]] = []

    def load(self, num_tokens, num_computed, num_left):
        return -1.0 * num_tokens - 100 * num_left

    def load_P(self, running_P, admitted_P):
        self.calls.append([running_P.tolist(), admitted_P.tolist()])
        return running_P


def test_scheduler_uses_its_load_balancing():
    rule = Crowded()
    scheduler = Scheduler(make_config(max_num_seqs=2), CACHES, balancing=rule)
    for key in range(3):
        assert scheduler.submit(make_request(key, 3, max_tokens=2), 0.0) is None
    plan = scheduler.plan(0.0)
    # Requests admitted in the same step count too.
    assert [plan.rank(rank).admit_sampling_A["seed"].tolist() for rank in (0, 1)] == [[0, 1], [2]]
    scheduler.submit(make_request(3, 3, max_tokens=2), 0.0)
    scheduler.plan(0.0)
    # Four tokens are known of each, the one in flight included, and one more may come.
    assert rule.calls == [[[0.0, 0.0], [0, 0]], [[-2 * 104.0, -104.0], [2, 1]]]
