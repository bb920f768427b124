"""Forks: requests that continue another one and share its blocks."""

import numpy as np
import pytest
from helpers.sim_ranks import CACHES, WINDOWED, WITH_CHUNKS, SimCluster, check, make_config, make_request

SIZES = {"num_ranks": 1, "max_num_batched_tokens": 32, "num_blocks": 41, "max_num_seqs": 6}


def make_child(parent, key, **values):
    """Return a fork of `parent` with its own draws."""
    child = make_request(key, 1, **{"max_tokens": 20, "ignore_eos": True, **values})
    child.prompt = parent.prompt
    child.tenant, child.salt = parent.tenant, parent.salt
    return child


def start(length, num_steps, **options):
    """Return a cluster that has run request 0 for `num_steps`, and the request."""
    sizes = {
        name: options.pop(name)
        for name in list(options)
        if name in ("enable_prefix_caching", "max_num_seqs", "num_blocks")
    }
    cluster = SimCluster(make_config(**{**SIZES, **sizes}), **options)
    parent = make_request(0, length, max_tokens=20, ignore_eos=True)
    cluster.submit(parent)
    for _ in range(num_steps):
        cluster.step()
    return cluster, parent


@pytest.mark.parametrize("specs", [CACHES, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", [3, 4, 5, 6, 7, 8])
def test_fork_gives_the_output_of_a_request_alone(length, overlap, enable_prefix_caching, specs):
    cluster, parent = start(length, 3, overlap=overlap, enable_prefix_caching=enable_prefix_caching, specs=specs)
    children = [make_child(parent, key, branch=key) for key in (1, 2)]
    cluster.fork(0, *children)
    begun = tuple(cluster.tokens[1])
    assert begun == tuple(cluster.tokens[0])
    cluster.step()
    grandchild = make_child(parent, 3)
    cluster.fork(1, grandchild)
    begun_later = tuple(cluster.tokens[3])
    cluster.drain()
    check(cluster, parent)
    for child in children:
        check(cluster, child, begun)
    check(cluster, grandchild, begun_later)
    assert cluster.tokens[1] != cluster.tokens[2]


@pytest.mark.parametrize("num_children", [1, 3])
def test_fork_recomputes_nothing(num_children):
    cluster, parent = start(10, 3)  # 12 tokens are computed
    cluster.fork(0, *(make_child(parent, key, max_tokens=4) for key in range(1, 1 + num_children)))
    plan = cluster.plan()
    # The children are a group: the first computes the last token, and the others sample as it does.
    assert plan.sched_start_S.tolist() == [12, 12, *[13] * (num_children - 1)]
    assert plan.sched_num_S.tolist() == [1, 1, *[0] * (num_children - 1)]
    cluster.commit()
    assert [cluster.num_cached[key] for key in range(1, 1 + num_children)] == [10] * num_children
    assert cluster.scheduler.stats()["cached_tokens"] == 10 * num_children


def test_whole_blocks_are_shared_and_never_copied():
    cluster, parent = start(10, 3)  # 12 tokens: 3 whole blocks
    cluster.fork(0, make_child(parent, 1, max_tokens=10))
    before = len(cluster.plans)
    assert len(cluster.plan().copy_to_M) == 0
    cluster.commit()
    assert cluster.scheduler.stats()["blocks_used"] == {"first": [5], "second": [5]}
    cluster.drain()
    assert all(len(plan.copy_to_M) == 0 for plan in cluster.plans[before:])


@pytest.mark.parametrize("num_children", [1, 3])
def test_partial_block_is_copied_for_all_but_one(num_children):
    cluster, parent = start(10, 2)  # 11 tokens: 2 whole blocks, and one of 3 tokens
    for key in range(1, 1 + num_children):
        cluster.fork(0, make_child(parent, key, max_tokens=10))
    before = len(cluster.plans)
    plan = cluster.plan().rank(0)
    assert plan.copy_cache_M.tolist() == sorted([0, 1] * num_children)
    assert len(set(plan.copy_from_M.tolist())) == 1
    cluster.commit()
    assert cluster.scheduler.stats()["blocks_used"] == {"first": [3 + num_children], "second": [3 + num_children]}
    cluster.drain()
    assert all(len(plan.copy_to_M) == 0 for plan in cluster.plans[before + 1 :])
    check(cluster, parent)


def test_a_fork_of_a_waiting_request_waits_too():
    cluster = SimCluster(make_config(**{**SIZES, "max_num_seqs": 1}))
    first, parent = make_request(9, max_tokens=2, ignore_eos=True), make_request(0, 9, max_tokens=3, ignore_eos=True)
    cluster.submit(first, parent)
    cluster.step()
    child = make_child(parent, 1, max_tokens=3)
    cluster.fork(0, child)
    assert cluster.tokens[1] == []
    cluster.drain()
    check(cluster, parent)
    check(cluster, child)
    assert list(cluster.finish) == [9, 0, 1]


def test_a_fork_without_a_slot_waits_and_then_finds_the_blocks():
    cluster, parent = start(10, 4, max_num_seqs=1)
    child = make_child(parent, 1)
    cluster.fork(0, child)
    begun = tuple(cluster.tokens[1])
    assert len(begun) == 4
    assert cluster.admitted(cluster.plan()) == []
    cluster.commit()
    cluster.drain()
    check(cluster, parent)
    check(cluster, child, begun)
    assert cluster.num_cached[1] == 10, "of its 14 tokens, 3 whole blocks"


@pytest.mark.parametrize("when", ["before the plan", "in flight", "after the step"])
def test_fork_outlives_its_parent(when):
    cluster, parent = start(10, 2)
    child = make_child(parent, 1)
    cluster.fork(0, child)
    begun = tuple(cluster.tokens[1])
    if when == "before the plan":
        cluster.abort(0)
    cluster.plan()
    if when == "in flight":
        cluster.abort(0)
    cluster.commit()
    cluster.abort(0)
    cluster.drain()
    check(cluster, child, begun)
    assert 0 not in cluster.finish


def test_an_aborted_fork_leaves_the_others_alone():
    cluster, parent = start(10, 2)
    child = make_child(parent, 2)
    cluster.fork(0, make_child(parent, 1), child)
    begun = tuple(cluster.tokens[2])
    cluster.abort(1)
    cluster.drain()
    check(cluster, parent)
    check(cluster, child, begun)


def test_fork_of_a_request_that_is_gone():
    cluster, parent = start(10, 3)
    cluster.abort(0)
    cluster.step()
    child = make_child(parent, 1)
    cluster.fork(0, child)
    begun = tuple(cluster.tokens[1])
    assert len(begun) == 3
    cluster.drain()
    check(cluster, child, begun)


def test_forks_are_rejected_together_when_the_queue_is_full():
    cluster = SimCluster(make_config(**{**SIZES, "max_queued_requests": 2}))
    parent = make_request(0, max_tokens=5)
    cluster.submit(parent)
    cluster.step()
    cluster.submit(make_request(8), make_request(9))
    rejection = cluster.scheduler.submit_group([make_child(parent, key) for key in (1, 2, 3)], cluster.now, 0)
    assert (rejection.key, rejection.code) == (1, "RESOURCE_EXHAUSTED")
    assert sorted(cluster.scheduler.unfinished()) == [0, 8, 9]


def test_a_fork_with_nothing_left_to_sample_is_rejected():
    cluster, parent = start(10, 3)
    child = make_child(parent, 1, max_tokens=3)
    child.output = np.array(cluster.tokens[0], np.int32)
    child.tokens = np.concatenate((child.prompt, child.output))
    rejection = cluster.scheduler.submit_group([child], cluster.now, 0)
    assert rejection.code == "INVALID_ARGUMENT"
    assert "output that it begins with (3)" in rejection.message


@pytest.mark.parametrize("specs", [CACHES, WINDOWED, WITH_CHUNKS], ids=["full", "window", "chunk"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("num_kept", "forced"), [(0, ()), (1, ()), (3, (7, 8, 9)), (5, (7,)), (6, ()), (6, (5, 6))])
def test_fork_in_the_middle_with_forced_tokens(num_kept, forced, overlap, specs):
    cluster, parent = start(10, 7, overlap=overlap, specs=specs, num_blocks=81)
    assert len(cluster.tokens[0]) >= 6
    child = make_child(parent, 1, branch=2)
    cluster.tokens[1] = [*cluster.tokens[0][:num_kept], *forced]
    child.output = np.array(cluster.tokens[1], np.int32)
    child.tokens = np.concatenate((child.prompt, child.output))
    assert cluster.scheduler.submit_group([child], cluster.now, 0) is None
    begun = tuple(cluster.tokens[1])
    cluster.drain()
    check(cluster, parent)
    check(cluster, child, begun)


@pytest.mark.parametrize("overlap", [False, True])
def test_forks_in_a_small_pool(overlap):
    cluster, parent = start(10, 3, num_blocks=10, overlap=overlap)
    children = [make_child(parent, key) for key in range(1, 5)]
    cluster.fork(0, *children)
    begun = tuple(cluster.tokens[1])
    cluster.drain()
    assert cluster.scheduler.stats()["preemptions"] > 0
    check(cluster, parent)
    for child in children:
        check(cluster, child, begun)


def test_forks_stop_independently():
    cluster, parent = start(10, 3)
    cluster.fork(0, make_child(parent, 1, max_tokens=4))
    cluster.drain()
    assert {key: len(tokens) for key, tokens in cluster.tokens.items()} == {0: 20, 1: 4}
