"""Which rank a request goes to: equal work in the next steps, and prefixes where they are if that is cheaper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sim_ranks import CACHES, make_config, make_request

from expertwire.scheduler.placement import Balanced
from expertwire.scheduler.scheduler import Scheduler

EVERY = np.ones(3, bool)
RULE = Balanced(horizon=10, kv_share=0.01)


def test_a_request_weighs_what_its_next_steps_cost():
    assert RULE.load(100, 60, 50) == pytest.approx(40 + 10 * (1 + 1.0)), (
        "its prompt's rest, then ten tokens with their cache"
    )
    assert RULE.load(100, 99, 3) == pytest.approx(1 + 3 * (1 + 1.0)), "one that is about to end weighs less"
    assert RULE.load(100, 99, 500) == RULE.load(100, 99, 10), "how much it might sample at most says nothing"
    arrays = RULE.load(np.array([100, 100]), np.array([60, 99]), np.array([50, 3]))
    assert arrays.tolist() == pytest.approx([RULE.load(100, 60, 50), RULE.load(100, 99, 3)])


def test_a_long_context_weighs_as_much_as_several_short_ones():
    assert RULE.load(1000, 999, 50) > 4 * RULE.load(10, 9, 50)


def test_the_rank_that_has_least_to_do():
    load = np.array([30.0, 10.0, 10.0])
    assert RULE.choose(EVERY, load, -1, 0) == 1, "the lowest of equals"
    assert RULE.choose(np.array([True, False, True]), load, -1, 0) == 2
    assert RULE.choose(np.array([True, False, False]), load, -1, 0) == 0
    assert RULE.choose(np.zeros(3, bool), load, 0, 100) is None


def test_a_prefix_holds_a_request_until_computing_it_again_is_cheaper():
    load = np.array([30.0, 20.0, 10.0])
    assert RULE.choose(EVERY, load, 0, 19) == 2
    assert RULE.choose(EVERY, load, 0, 20) == 0, "what is computed is not thrown away for nothing"
    assert RULE.choose(np.array([False, True, True]), load, 0, 100) == 2, "there is no room beside its prefix"
    assert load.tolist() == [30.0, 20.0, 10.0]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(-2, 5),
    st.integers(0, 60),
)
def test_no_rank_would_have_done_sooner(ranks, favoured, num_cached):
    fits, load = np.array([fit for fit, _ in ranks]), np.array([load for _, load in ranks], float)
    favoured = min(favoured, len(ranks) - 1)
    chosen = RULE.choose(fits, load, favoured, num_cached)
    if favoured >= 0:
        load[favoured] -= num_cached
    assert (chosen is None) == (not fits.any())
    if chosen is not None:
        assert fits[chosen]
        assert load[chosen] == load[fits].min()


class Last:
    """The last rank with room; remembers what it was told."""

    def __init__(self) -> None:
        self.loads: list[list[float]] = []

    def load(self, num_tokens, num_computed, num_left):
        return 1.0 * num_tokens - num_computed + 100 * num_left

    def choose(self, fits_P, load_P, favoured, num_cached):
        self.loads.append(load_P.tolist())
        return int(np.flatnonzero(fits_P)[-1]) if fits_P.any() else None


def test_the_scheduler_asks_its_placement():
    rule = Last()
    scheduler = Scheduler(make_config(max_running=2), CACHES, placement=rule)
    for key in range(3):
        assert scheduler.submit(make_request(key, 3, max_tokens=2), 0.0) is None
    plan = scheduler.plan(0.0)
    assert [plan.rank(rank).admit_sampling_A["seed"].tolist() for rank in (0, 1)] == [[2], [0, 1]]
    # What was admitted in this very step counts too: three tokens to compute and two to sample each.
    assert rule.loads == [[0.0, 0.0], [0.0, 203.0], [0.0, 406.0]]
