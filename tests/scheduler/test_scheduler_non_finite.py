"""Requests whose logits are not finite end alone, and leave nothing in the prefix cache."""

import pytest
from helpers.sim_ranks import (
    CACHES,
    WINDOWED,
    WITH_CHUNKS,
    SimCluster,
    check,
    expected_output,
    make_config,
    make_request,
)

LONG = {"max_tokens": 20, "ignore_eos": True}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_one_request_fails_and_others_go_on(overlap, num_tokens):
    cluster = SimCluster(make_config(), overlap=overlap)
    requests = [make_request(key, 6, logprobs=key, **LONG) for key in range(4)]
    cluster.submit(*requests)
    cluster.break_at(1, 6 + num_tokens)
    cluster.drain()
    assert {key: position for key, (position, _) in cluster.failed.items()} == {1: 6 + num_tokens}
    assert cluster.tokens[1] == expected_output(requests[1], cluster.config)[0][:num_tokens]
    for request in (requests[0], *requests[2:]):
        check(cluster, request)
    assert cluster.scheduler.stats()["non_finite"] == 1
    assert cluster.scheduler.unfinished() == []


def test_the_rank_is_named():
    cluster = SimCluster(make_config(num_ranks=3))
    cluster.submit(*(make_request(key, **LONG) for key in range(3)))
    for key in range(3):
        cluster.break_at(key, 7)
    cluster.drain()
    assert sorted(rank for _, rank in cluster.failed.values()) == [0, 1, 2]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("specs", [CACHES, WINDOWED, WITH_CHUNKS], ids=["full", "window", "state"])
def test_its_tokens_are_not_found_in_the_prefix_cache(overlap, specs):
    """Nor those that it has found there itself; other prefixes are."""
    cluster = SimCluster(make_config(num_ranks=1, num_blocks=30), overlap=overlap, specs=specs)
    shared = {"shared": 16, "max_tokens": 2, "ignore_eos": True}
    other = make_request(9, 17, text=1, **shared)
    cluster.submit(make_request(0, 17, **shared), other)
    cluster.drain()
    cluster.submit(make_request(1, 25, **{**shared, "max_tokens": 9}))
    cluster.break_at(1, 25 + 5)
    cluster.drain()
    assert cluster.failed[1][0] == 30
    assert cluster.num_cached[1] == 16
    again = make_request(1, 25, **shared)
    again.key = again.seed = 2
    another = make_request(3, 17, text=1, **shared)
    cluster.submit(again, another)
    cluster.drain()
    assert (cluster.num_cached[2], cluster.num_cached[3]) == (0, 16)
    check(cluster, again)


def test_blocks_shared_with_running_requests_leave_the_cache_too():
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=32))
    requests = [make_request(key, 13, shared=12, **LONG) for key in range(2)]
    cluster.submit(requests[0])
    cluster.step()
    cluster.submit(requests[1])
    cluster.step()
    cluster.break_at(1, 17)
    while 1 not in cluster.failed:
        cluster.step()
    cluster.submit(third := make_request(2, 13, shared=12, **LONG))
    cluster.drain()
    assert [cluster.num_cached[key] for key in range(3)] == [0, 12, 0]
    check(cluster, requests[0])
    check(cluster, third)


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_log_probabilities(overlap):
    """The first position is named, and there is no token, though its logits are finite."""
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=6), overlap=overlap)
    requests = [make_request(key, 9, prompt_logprobs=2, **LONG) for key in range(2)]
    cluster.submit(*requests)
    cluster.break_at(0, 3)
    rows = []
    while not cluster.scheduler.idle:
        if (outputs := cluster.step()) is not None:
            rows += zip(outputs.prompt_key_I.tolist(), outputs.prompt_position_I.tolist(), strict=True)
            assert len(outputs.prompt_top_ids) == 2 * len(outputs.prompt_key_I)
    assert cluster.failed == {0: (3, 0)}
    assert cluster.tokens[0] == []
    assert rows == [(1, position) for position in range(1, 9)]
    check(cluster, requests[1])


def test_a_fork_of_one_that_fails_waits_and_answers():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=1))
    parent = make_request(0, **LONG)
    cluster.submit(parent)
    cluster.step()
    child = make_request(1, branch=1, **LONG)
    child.prompt = parent.prompt
    cluster.fork(0, child)
    cluster.break_at(0, 7)
    cluster.drain()
    assert set(cluster.failed) == {0}
    check(cluster, child, tuple(cluster.tokens[0][:1]))


def test_aborted_or_ended_meanwhile():
    """A step in flight says nothing more of them."""
    cluster = SimCluster(make_config(num_ranks=1), overlap=True)
    cluster.submit(make_request(0, **LONG), make_request(1, max_tokens=1))
    cluster.plan()
    cluster.abort(0)
    cluster.break_at(0, 5)
    cluster.break_at(1, 6)
    cluster.drain()
    assert cluster.failed == {}
    assert set(cluster.finish) == {1}
