"""Which rank a request goes to: equal work in the next steps, and prefixes where they are if that is cheaper."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.sim_ranks import CACHES, make_config, make_request
from hypothesis import given
from hypothesis import strategies as st

from expertwire.scheduler._compiled.admissions import place
from expertwire.scheduler.rank_placement import Balanced
from expertwire.scheduler.scheduler import Scheduler

EVERY = np.ones(3, bool)
RULE = Balanced(horizon=10, kv_share=0.01)


def load(*requests):
    """Of requests as (tokens, computed, left)."""
    return RULE.load(*np.array(requests).T).tolist()


def test_a_request_weighs_what_its_next_steps_cost():
    whole, ending, endless, ten = load((100, 60, 50), (100, 99, 3), (100, 99, 500), (100, 99, 10))
    assert whole == pytest.approx(40 + 10 * (1 + 1.0)), "its prompt's rest, then ten tokens with their cache"
    assert ending == pytest.approx(1 + 3 * (1 + 1.0)), "one that is about to end weighs less"
    assert endless == ten, "how much it might sample at most says nothing"


def test_a_long_context_weighs_as_much_as_several_short_ones():
    long, short = load((1000, 999, 50), (10, 9, 50))
    assert long > 4 * short


def test_a_token_that_is_there_weighs_less_by_the_credit():
    none, some = load((100, 0, 50), (100, 64, 50))
    assert none - some == 64 * RULE.credit


def test_the_rank_that_has_least_to_do():
    load = np.array([30.0, 10.0, 10.0])
    assert place(EVERY, load, -1, 0) == 1, "the lowest of equals"
    assert place(np.array([True, False, True]), load, -1, 0) == 2
    assert place(np.array([True, False, False]), load, -1, 0) == 0
    assert place(np.zeros(3, bool), load, 0, 100) == -1


def test_a_prefix_holds_a_request_until_computing_it_again_is_cheaper():
    load = np.array([30.0, 20.0, 10.0])
    assert place(EVERY, load, 0, 19) == 2
    assert place(EVERY, load, 0, 20) == 0, "what is computed is not thrown away for nothing"
    assert place(np.array([False, True, True]), load, 0, 100) == 2, "there is no room beside its prefix"
    assert load.tolist() == [30.0, 20.0, 10.0]


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 50)), min_size=1, max_size=6),
    st.integers(-2, 5),
    st.integers(0, 60),
)
def test_no_rank_would_have_done_sooner(ranks, favoured, num_cached):
    fits, load = np.array([fit for fit, _ in ranks]), np.array([load for _, load in ranks], float)
    favoured = min(favoured, len(ranks) - 1)
    chosen = place(fits, load, favoured, num_cached)
    if favoured >= 0:
        load[favoured] -= num_cached
    assert (chosen < 0) == (not fits.any())
    if chosen >= 0:
        assert fits[chosen]
        assert load[chosen] == load[fits].min()


class Crowded:
    """The rank with the most load, of which it remembers what it was told."""

    credit = None

    def __init__(self) -> None:
        self.told: list[list[list[float]]] = []

    def load(self, num_tokens, num_computed, num_left):
        return -1.0 * num_tokens - 100 * num_left

    def load_P(self, running_P, given_P):
        self.told.append([running_P.tolist(), given_P.tolist()])
        return running_P


def test_the_scheduler_asks_its_placement():
    rule = Crowded()
    scheduler = Scheduler(make_config(max_num_seqs=2), CACHES, placement=rule)
    for key in range(3):
        assert scheduler.submit(make_request(key, 3, max_tokens=2), 0.0) is None
    plan = scheduler.plan(0.0)
    # What was admitted in this very step counts too.
    assert [plan.rank(rank).admit_sampling_A["seed"].tolist() for rank in (0, 1)] == [[0, 1], [2]]
    scheduler.submit(make_request(3, 3, max_tokens=2), 0.0)
    scheduler.plan(0.0)
    # Four tokens are known of each, the one in flight included, and one more may come.
    assert rule.told == [[[0.0, 0.0], [0, 0]], [[-2 * 104.0, -104.0], [2, 1]]]
