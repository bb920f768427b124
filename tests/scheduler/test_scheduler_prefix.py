"""Prefix cache hits, sharing and eviction, through the scheduler's interface."""

import numpy as np
import pytest
from helpers.sim_ranks import SimCluster, make_config, make_request, serve

SIZES = {"num_ranks": 1, "max_num_batched_tokens": 32, "num_blocks": 33}


@pytest.mark.parametrize("length", range(1, 14))
def test_equal_prompt_hits_all_full_blocks_before_its_last_token(length):
    cluster = SimCluster(make_config(**SIZES))
    found = [serve(cluster, key, length) for key in range(3)]
    expected = (length - 1) // 4 * 4
    assert found == [0, expected, expected]
    assert cluster.ranks[0].num_computed == 3 * length - 2 * expected
    stats = cluster.scheduler.stats()
    assert (stats["prompt_tokens"], stats["cached_tokens"]) == (3 * length, 2 * expected)


@pytest.mark.parametrize(("shared", "expected"), [(0, 0), (3, 0), (4, 4), (11, 8), (13, 12), (20, 16)])
def test_hits_end_where_the_prompts_differ(shared, expected):
    cluster = SimCluster(make_config(**SIZES))
    serve(cluster, 0, 20)
    assert serve(cluster, 1, 20, shared=shared) == expected


def test_next_turn_hits_the_previous_answer():
    cluster = SimCluster(make_config(**SIZES))
    history = np.zeros(0, np.int32)
    for turn in range(4):
        said = make_request(turn, 3).prompt
        request = make_request(turn, 1, max_tokens=4, ignore_eos=True)
        request.prompt = request.tokens = np.concatenate((history, said))
        cluster.submit(request)
        cluster.drain()
        # The last token of an answer is never computed.
        assert cluster.num_cached[turn] == max(len(history) - 1, 0) // 4 * 4
        history = np.concatenate((request.prompt, np.array(cluster.tokens[turn], np.int32)))


def test_blocks_of_one_step_are_hit_in_the_next():
    cluster = SimCluster(make_config(**SIZES, max_num_seqs=4))
    for first in (0, 2):
        cluster.submit(*(make_request(first + text, 9, shared=8, text=text, max_tokens=20) for text in range(2)))
        cluster.step()
    assert cluster.num_cached == {0: 0, 1: 0, 2: 8, 3: 8}


@pytest.mark.parametrize("owner", [{"salt": "x"}, {"tenant": "x"}, {"tenant": "x", "salt": "x"}])
def test_tenants_and_salts_share_no_blocks(owner):
    cluster = SimCluster(make_config(**SIZES))
    assert [serve(cluster, 0, 20), serve(cluster, 1, 20, **owner)] == [0, 0]
    assert [serve(cluster, 2, 20), serve(cluster, 3, 20, **owner)] == [16, 16]


def test_without_a_prefix_cache_everything_is_computed():
    cluster = SimCluster(make_config(**SIZES, enable_prefix_caching=False))
    assert [serve(cluster, key, 20) for key in range(3)] == [0, 0, 0]
    assert cluster.ranks[0].num_computed == 60


def test_prompt_logprobs_compute_the_whole_prompt_and_cache_it():
    cluster = SimCluster(make_config(**SIZES))
    assert serve(cluster, 0, 20, prompt_logprobs=1) == 0
    assert serve(cluster, 1, 20) == 16
    cluster.submit(make_request(2, 20, shared=20, prompt_logprobs=1, max_tokens=1))
    assert cluster.step().prompt_position_I.tolist() == list(range(1, 20))
    assert cluster.num_cached[2] == 0


def test_full_blocks_of_running_prompts_are_shared():
    cluster = SimCluster(make_config(**SIZES))
    cluster.submit(make_request(0, 18, shared=18, max_tokens=9, ignore_eos=True))
    cluster.step()
    cluster.submit(*(make_request(key, 18, shared=18, max_tokens=1) for key in (1, 2)))
    cluster.step()
    assert (cluster.num_cached[1], cluster.num_cached[2]) == (16, 16)
    assert cluster.scheduler.stats()["blocks_used"] == {"first": [7], "second": [7]}


def test_a_prompt_waits_for_another_that_is_computing_the_same():
    cluster = SimCluster(make_config(max_num_batched_tokens=8))
    cluster.submit(*(make_request(key, 20, shared=20, max_tokens=2, ignore_eos=True) for key in (0, 1)))
    assert cluster.admitted(cluster.plan()) == [0]
    cluster.commit()
    cluster.submit(make_request(2, 5, max_tokens=1))
    assert cluster.admitted(cluster.plan()) == [2], "one that shares nothing is not held up"
    cluster.commit()
    assert cluster.admitted(cluster.plan()) == [1]
    cluster.commit()
    cluster.drain()
    assert cluster.num_cached == {0: 0, 1: 16, 2: 0}
    assert sum(rank.num_computed for rank in cluster.ranks) == 21 + 5 + 5


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_prompt_waits_no_longer_if_the_other_is_aborted(in_flight):
    cluster = SimCluster(make_config(max_num_batched_tokens=8))
    cluster.submit(*(make_request(key, 20, shared=20, max_tokens=2, ignore_eos=True) for key in (0, 1)))
    cluster.step()
    assert cluster.admitted(cluster.plan()) == []
    if not in_flight:
        cluster.commit()
    cluster.abort(0)
    if in_flight:
        cluster.commit()
    assert cluster.admitted(cluster.plan()) == [1]
    cluster.commit()
    cluster.drain()
    assert cluster.num_cached[1] == 16
    assert len(cluster.tokens[1]) == 2


def test_prompt_waits_only_for_blocks_in_progress():
    """Equal prefixes of another tenant, or that differ in the first missing block."""
    cluster = SimCluster(make_config(max_num_batched_tokens=8, max_num_seqs=4))
    cluster.submit(
        make_request(0, 20, shared=20), make_request(1, 20, shared=20, salt="x"), make_request(2, 20, shared=3)
    )
    assert sorted(cluster.admitted(cluster.plan())) == [0, 1]  # then the budgets are used up
    cluster.commit()
    cluster.abort(1)
    assert cluster.admitted(cluster.plan()) == [2]


@pytest.mark.parametrize(("max_tokens", "rank"), [(1, 1), (11, 1), (13, 0), (30, 0)])
def test_request_goes_to_its_prefix_unless_that_rank_is_too_loaded(max_tokens, rank):
    cluster = SimCluster(make_config(max_model_len=64, max_num_batched_tokens=64, num_blocks=100))
    cluster.submit(make_request(0, 21, max_tokens=1), make_request(1, 20, shared=20, max_tokens=1))
    assert cluster.plan().num_tokens_P.tolist() == [21, 20]
    cluster.commit()
    cluster.drain()
    # On rank 1 are 16 of 20 tokens; so the first request leaves 4 + max_tokens to do there.
    cluster.submit(*(make_request(key, 20, shared=20, max_tokens=max_tokens, ignore_eos=True) for key in (2, 3)))
    plan = cluster.plan()
    assert plan.rank(1).admit_sampling_A["seed"].tolist() == ([2, 3] if rank else [2])
    assert plan.num_tokens_P.tolist() == ([0, 8] if rank else [20, 4])
    cluster.commit()
    cluster.drain()


@pytest.mark.parametrize(("asks", "expected"), [("old", 4), ("young", 8), ("last", 12)])
def test_eviction_takes_the_ends_of_least_recently_used_prefixes(asks, expected):
    # Of 8 blocks, two prompts leave 3 each behind; the third takes the 2 that are empty, and 2 of the first one's.
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=16, num_blocks=9))
    prompts = {"old": (12, 0), "young": (12, 1), "last": (16, 2)}
    for key, (length, text) in enumerate(prompts.values()):
        assert serve(cluster, key, length, text=text) == 0
    length, text = prompts[asks]
    assert serve(cluster, 9, length, text=text) == expected


def test_a_prefix_that_is_used_again_outlives_younger_ones():
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=16, num_blocks=9))
    for key, text in enumerate([0, 1, 0]):
        serve(cluster, key, 9, text=text)
    serve(cluster, 3, 24, text=2)  # takes 6: the 4 that are empty, and 2
    assert serve(cluster, 4, 9, text=0) == 8


def test_cached_tokens_cost_no_budget():
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=8, num_blocks=33))
    serve(cluster, 0, 20)
    cluster.submit(*(make_request(key, 20, shared=20, max_tokens=1) for key in (1, 2)))
    plan = cluster.plan()
    assert plan.sched_start_S.tolist() == [16, 16]
    assert plan.sched_num_S.tolist() == [4, 4]
    cluster.commit()
    assert cluster.num_cached == {0: 0, 1: 16, 2: 16}
