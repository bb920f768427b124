"""Requests that need more tokens than the model's original context: told to the ranks, and apart in the prefix cache."""

import numpy as np
import pytest
from helpers.sim_ranks import SimCluster, check, make_config, make_request, serve

ORIGINAL = 12
SIZES = {"num_ranks": 1, "max_num_batched_tokens": 32, "num_blocks": 33, "original_max_position_embeddings": ORIGINAL}


def kinds(cluster):
    """For every admission, the request and whether it is long."""
    records = [record for plan in cluster.plans for record in plan.admit_sampling_A]
    return [(int(record["seed"]), bool(record["is_long"])) for record in records]


@pytest.mark.parametrize(
    ("length", "max_tokens", "is_long"),
    [(1, 12, False), (1, 13, True), (12, 1, False), (12, 2, True), (13, 1, True), (5, 100, True)],
)
@pytest.mark.parametrize("original", [ORIGINAL, None])
def test_prompt_and_max_tokens_decide(length, max_tokens, is_long, original):
    """The last output token is never computed. It is long from the beginning, and stays it."""
    cluster = SimCluster(make_config(**SIZES | {"original_max_position_embeddings": original}))
    serve(cluster, 0, length, max_tokens=max_tokens)
    assert kinds(cluster) == [(0, is_long and original is not None)]


def test_max_tokens_that_do_not_fit_do_not_count():
    cluster = SimCluster(make_config(**SIZES, max_model_len=ORIGINAL + 1))
    serve(cluster, 0, 5, max_tokens=100)
    assert kinds(cluster) == [(0, False)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("credit", [None, 2, 3, 4])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_without_max_tokens_it_is_short_until_it_outgrows_the_original_context(overlap, credit, enable_prefix_caching):
    config = make_config(**SIZES, enable_prefix_caching=enable_prefix_caching)
    cluster = SimCluster(config, overlap=overlap)
    request = make_request(0, 10, ignore_eos=True, credit=credit)
    cluster.submit(request)
    while not cluster.finish:
        cluster.step()
        if cluster.scheduler.stats()["held"]:
            cluster.grant(0, 2)
    cluster.drain()
    check(cluster, request)
    assert kinds(cluster)[0] == (0, False) and kinds(cluster)[-1] == (0, True)
    assert len(kinds(cluster)) == 2 or credit is not None
    long = next(plan for plan in cluster.plans if plan.admit_sampling_A["is_long"].any())
    assert (long.sched_start_S.tolist(), long.sched_num_S.tolist()) == ([0], [ORIGINAL + 1]), "all is computed anew"
    assert cluster.num_cached[0] == 0
    assert cluster.scheduler.stats()["preemptions"] == 0


@pytest.mark.parametrize("stops_at", [1, 2, 3])
def test_without_max_tokens_one_that_ends_in_time_stays_short(stops_at):
    """Also if the token with which it would outgrow the original context is its last one."""
    config = make_config(**SIZES)
    cluster = SimCluster(config)
    cluster.submit(make_request(0, 10, ignore_eos=True, max_tokens=3))
    cluster.drain()
    request = make_request(0, 10, ignore_eos=True, stop_token_ids=[cluster.tokens[0][stops_at - 1]])
    cluster = SimCluster(config)
    cluster.submit(request)
    cluster.drain()
    check(cluster, request)
    assert kinds(cluster) == [(0, False)]


def test_kinds_share_no_blocks():
    cluster = SimCluster(make_config(**SIZES))
    assert [serve(cluster, key, 10, max_tokens=max_tokens) for key, max_tokens in enumerate([3, 9, 3, 9])] == [
        0,
        0,
        8,
        8,
    ]
    assert [is_long for _, is_long in kinds(cluster)] == [False, True, False, True]


def test_a_long_request_does_not_wait_for_a_short_one_that_computes_the_same():
    cluster = SimCluster(make_config(**SIZES | {"max_num_batched_tokens": 6, "num_ranks": 2}))
    cluster.submit(*(make_request(key, 10, shared=10, max_tokens=most) for key, most in enumerate([3, 9])))
    assert sorted(cluster.admitted(cluster.plan())) == [0, 1]


def test_one_that_has_outgrown_the_original_context_finds_long_blocks():
    """And its next turn finds its own."""
    cluster = SimCluster(make_config(**SIZES))
    first, second = (make_request(key, 10, shared=10, ignore_eos=True) for key in (0, 1))
    second.seed = first.seed  # says the same
    cluster.submit(first)
    cluster.drain()
    cluster.submit(second)
    cluster.drain()
    starts = [plan.sched_start_S.tolist() for plan in cluster.plans if len(plan.admit_slot_A)]
    assert starts == [[0], [0], [8], [12]]
    turn = make_request(2, 1, max_tokens=1)
    turn.prompt = turn.tokens = np.concatenate((first.prompt, np.array(cluster.tokens[0][:10], np.int32)))
    cluster.submit(turn)
    cluster.drain()
    assert cluster.num_cached[2] == 16


def test_preempted_requests_keep_their_kind():
    config = make_config(**SIZES | {"num_blocks": 9, "max_num_seqs": 4})
    cluster = SimCluster(config)
    requests = [make_request(key, 3, max_tokens=10 if key % 2 else 14, ignore_eos=True) for key in range(4)]
    cluster.submit(*requests)
    cluster.drain()
    for request in requests:
        check(cluster, request)
    assert cluster.scheduler.stats()["preemptions"] > 0
    assert all(is_long == (key % 2 == 0) for key, is_long in kinds(cluster))
    assert len(kinds(cluster)) > 4


@pytest.mark.parametrize("max_tokens", [5, 20])
def test_a_fork_of_another_kind_shares_no_blocks(max_tokens):
    cluster = SimCluster(make_config(**SIZES))
    parent = make_request(0, 6, ignore_eos=True)
    cluster.submit(parent)
    cluster.step()
    begun = tuple(cluster.tokens[0])
    child = make_request(1, 6, max_tokens=max_tokens, ignore_eos=True)
    child.prompt = parent.prompt
    cluster.fork(0, child)
    plan = cluster.plan()
    start = dict(zip(plan.sched_slot_S.tolist(), plan.sched_start_S.tolist(), strict=True))
    assert start == ({0: 6, 1: 6} if max_tokens == 5 else {0: 6, 1: 0})
    cluster.commit()
    cluster.drain()
    check(cluster, parent)
    check(cluster, child, begun)
    assert kinds(cluster)[:2] == [(0, False), (1, max_tokens == 20)]


@pytest.mark.parametrize("value", [0, True, 3.5])
def test_the_original_context_is_a_number_of_tokens(value):
    with pytest.raises(ValueError, match=r"^original_max_position_embeddings must be an integer >= 1 or None, got"):
        make_config(original_max_position_embeddings=value)
