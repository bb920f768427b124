"""A step is planned while the ranks compute the one before it."""

import numpy as np
import pytest
from helpers.sim_ranks import SimCluster, check, expected_output, make_config, make_request

SIZES = {"num_ranks": 1, "max_num_batched_tokens": 32, "num_blocks": 41}


def stopping_early(at_least=2, **params):
    """Return a request that ends with a stop token, and its number of output tokens."""
    for key in range(1000):
        request = make_request(key, 5, max_tokens=20, **params)
        output, _ = expected_output(request, make_config())
        if at_least <= len(output) < 15:
            return request, len(output)
    raise AssertionError("no such request")


def test_plans_come_before_the_tokens_that_they_continue():
    cluster = SimCluster(make_config(**SIZES))
    cluster.submit(make_request(0, 6, max_tokens=4, ignore_eos=True))
    plans = [cluster.plan(), cluster.plan()]
    assert [(plan.sched_start_S.tolist(), plan.sched_num_S.tolist()) for plan in plans] == [([0], [6]), ([6], [1])]
    with pytest.raises(AssertionError, match="step 0 is not committed"):
        cluster.scheduler.plan(0.0)
    assert cluster.tokens[0] == []
    cluster.commit()
    assert len(cluster.tokens[0]) == 1
    plans += [cluster.plan()]
    cluster.commit()
    plans += [cluster.plan()]
    assert [plan.sched_start_S.tolist() for plan in plans[2:]] == [[7], [8]]
    cluster.commit()
    assert cluster.plan() is None, "all that may come is in flight"
    assert cluster.commit().finish_O.tolist() == [2]
    assert not cluster.scheduler.idle
    cluster.drain()


def test_steps_are_committed_in_their_order():
    cluster = SimCluster(make_config(**SIZES))
    cluster.submit(make_request(0, 6, max_tokens=4, ignore_eos=True))
    cluster.plan()
    second = cluster.plan()
    with pytest.raises(AssertionError, match="step 1 is not the first in flight, 0 is"):
        cluster.scheduler.commit(second, [], 0.0)


def test_stopped_request_is_computed_once_more_without_output():
    request, length = stopping_early(logprobs=2)
    cluster = SimCluster(make_config(**SIZES), overlap=True)
    cluster.submit(request, make_request(5000, 5, max_tokens=20, ignore_eos=True))
    told = []
    while request.key not in cluster.finish:
        outputs = cluster.step()
        told += [] if outputs is None else outputs.key_O.tolist()
    assert told.count(request.key) == length
    (last,) = cluster.in_flight
    assert len(last.sched_slot_S) == 2, "it has been planned once more already"
    outputs = cluster.commit()
    assert outputs.key_O.tolist() == [5000]
    assert outputs.top_offsets_O1.tolist() == [0, 0]
    assert len(outputs.top_ids) == 0
    cluster.drain()
    assert cluster.tokens[request.key] == expected_output(request, cluster.config)[0]


def test_a_slot_is_used_again_while_a_step_of_its_last_owner_is_in_flight():
    request, _ = stopping_early()
    successor = make_request(5000, 7, max_tokens=5, ignore_eos=True)
    cluster = SimCluster(make_config(**SIZES, max_num_seqs=1), overlap=True)
    cluster.submit(request, successor)
    while request.key not in cluster.finish:
        cluster.step()
    plan = cluster.plan()
    assert len(cluster.in_flight) == 2
    assert cluster.admitted(plan) == [5000]
    assert plan.release_slot.tolist() == plan.admit_slot_A.tolist() == [0]
    assert len(cluster.commit().key_O) == 0
    assert cluster.commit().key_O.tolist() == [5000]
    cluster.drain()
    assert cluster.tokens[5000] == expected_output(successor, cluster.config)[0]


@pytest.mark.parametrize("num_plans", [1, 2])
def test_abort_with_steps_in_flight(num_plans):
    cluster = SimCluster(make_config(**SIZES))
    cluster.submit(*(make_request(key, 5, max_tokens=9, ignore_eos=True, prompt_logprobs=0) for key in (0, 1)))
    for _ in range(num_plans):
        cluster.plan()
    cluster.abort(0)
    for _ in range(num_plans):
        outputs = cluster.commit()
        assert outputs.key_O.tolist() == [1]
        assert 0 not in outputs.prompt_key_I
    cluster.overlap = True
    cluster.drain()
    assert {key: len(tokens) for key, tokens in cluster.tokens.items()} == {0: 0, 1: 9}


def test_a_key_may_be_used_again_while_steps_of_its_aborted_request_are_in_flight():
    cluster = SimCluster(make_config(**SIZES, max_num_seqs=1))
    cluster.submit(make_request(0, 5, max_tokens=9, ignore_eos=True))
    cluster.plan()
    cluster.abort(0)
    again = make_request(0, 7, max_tokens=3, ignore_eos=True)
    cluster.submit(again)
    plan = cluster.plan()
    assert plan.release_slot.tolist() == plan.admit_slot_A.tolist() == [0]
    assert len(cluster.commit().key_O) == 0, "this token was sampled for the aborted one"
    cluster.commit()
    cluster.drain()
    assert cluster.tokens[0] == expected_output(again, cluster.config)[0]


def test_blocks_of_a_step_in_flight_are_found_by_the_next():
    """Ranks run steps in order, so the next one reads what one writes."""
    cluster = SimCluster(make_config(**SIZES))
    cluster.submit(make_request(0, 9, shared=9, max_tokens=3))
    cluster.plan()
    cluster.submit(make_request(1, 9, shared=9, max_tokens=3))
    assert cluster.plan().sched_start_S.tolist() == [9, 8]
    cluster.commit()
    cluster.commit()
    cluster.drain()


def test_chunks_of_a_prompt_are_planned_ahead():
    cluster = SimCluster(make_config(**{**SIZES, "max_num_batched_tokens": 4}), overlap=True)
    request = make_request(0, 10, max_tokens=3, ignore_eos=True)
    cluster.submit(request)
    cluster.drain()
    assert [plan.sched_num_S.tolist() for plan in cluster.plans if len(plan.sched_num_S)] == [[4], [4], [2], [1], [1]]
    assert cluster.tokens[0] == expected_output(request, cluster.config)[0]


@pytest.mark.parametrize("budget", [1, 3, 8])
def test_overlap_changes_no_answer(budget):
    config = make_config(max_num_batched_tokens=budget, max_num_seqs=4)
    requests = [make_request(key, 1 + 5 * key % 23, max_tokens=1 + key % 9, min_tokens=key % 3) for key in range(16)]
    cluster = SimCluster(config, overlap=True)
    cluster.submit(*requests)
    cluster.drain()
    for request in requests:
        check(cluster, request)


def test_a_step_that_only_releases_slots_may_come_last():
    cluster = SimCluster(make_config(**SIZES), overlap=True)
    cluster.submit(make_request(0, 5, max_tokens=1))
    cluster.plan()
    assert cluster.plan() is None
    cluster.commit()
    plan = cluster.plan()
    assert plan.release_slot.tolist() == [0]
    assert np.count_nonzero(plan.num_tokens_P) == 0
    cluster.commit()
    assert cluster.scheduler.idle
