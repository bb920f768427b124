"""Caches of recurrent states: a block holds the state after its last token; snapshots are kept."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.sim_ranks import (
    CACHES,
    CHUNK,
    STATE,
    WITH_CHUNKS,
    WITH_STATE,
    SimCluster,
    check,
    make_config,
    make_request,
    serve,
)

from expertwire.scheduler._compiled.blocks import UNHASHED

SIZES = {"num_ranks": 1, "max_model_len": 128, "max_num_batched_tokens": 8, "num_blocks": 65}
BLOCK, EVERY = 4, 8


def states(cluster):
    (used,) = cluster.scheduler.stats()["blocks_used"]["state"]
    return used


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "specs", [WITH_STATE, WITH_CHUNKS, (STATE,)], ids=["with a full cache", "with chunks", "alone"]
)
def test_a_request_holds_one_state_and_at_times_two(specs, overlap):
    cluster = SimCluster(make_config(**SIZES), specs=specs, overlap=overlap)
    request = make_request(0, 60, max_tokens=60, ignore_eos=True)
    cluster.submit(request)
    held = set()
    while not cluster.scheduler.idle:
        cluster.step()
        held.add(states(cluster))
    assert held == {0, 1, 2}
    check(cluster, request)


@pytest.mark.parametrize(
    "specs", [WITH_STATE, WITH_CHUNKS, (STATE,)], ids=["with a full cache", "with chunks", "alone"]
)
@pytest.mark.parametrize("length", [5, 8, 9, 16, 17, 20, 41])
def test_the_same_prompt_is_found_up_to_its_last_block(length, specs):
    cluster = SimCluster(make_config(**SIZES), specs=specs)
    assert [serve(cluster, key, length) for key in (0, 1)] == [0, (length - 1) // BLOCK * BLOCK]


def test_evicted_state_ends_no_prefix():
    # 7 states: of 60 tokens the last ones are left.
    cluster = SimCluster(make_config(**{**SIZES, "num_blocks": (65, 8)}), specs=WITH_STATE)
    serve(cluster, 0, 60)
    assert serve(cluster, 1, 60) == 56
    assert serve(cluster, 2, 20) == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("specs", [WITH_STATE, WITH_CHUNKS], ids=["states", "chunks"])
@pytest.mark.parametrize("num_steps", range(4, 14))
def test_fork_continues_from_its_own_state(num_steps, specs, overlap):
    """With a step in flight the state has changed; the fork continues from a snapshot, if there is one."""
    config = make_config(**{**SIZES, "max_num_seqs": 4})
    cluster = SimCluster(config, specs=specs, overlap=overlap)
    parent = make_request(0, 11, max_tokens=20, ignore_eos=True)
    cluster.submit(parent)
    for _ in range(num_steps):
        cluster.step()
    begun = tuple(cluster.tokens[0])
    assert begun
    children = [make_request(key, 11, max_tokens=20, ignore_eos=True) for key in (1, 2)]
    for child in children:
        child.prompt = parent.prompt
    cluster.fork(0, *children)
    cluster.drain()
    for request, start in ((parent, ()), (children[0], begun), (children[1], begun)):
        check(cluster, request, start)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_states", [7, 9])
def test_few_states_serve_all_requests(num_states, overlap):
    config = make_config(**{**SIZES, "num_blocks": (65, num_states), "max_num_seqs": 4})
    cluster = SimCluster(config, specs=WITH_STATE, overlap=overlap)
    requests = [make_request(key, 1 + 13 * key % 50, shared=24, max_tokens=1 + 7 * key % 40) for key in range(20)]
    cluster.submit(*requests)
    cluster.drain()
    for request in requests:
        check(cluster, request)


def test_a_chunk_with_more_states_than_there_are_is_refused():
    cluster = SimCluster(
        make_config(**{**SIZES, "num_blocks": (65, 3), "max_num_batched_tokens": 64}), specs=WITH_STATE
    )
    rejection = cluster.scheduler.submit(make_request(0, 60), 0.0)
    assert rejection.code == "INVALID_ARGUMENT"
    assert "cache blocks; a rank has 2" in rejection.message


def num_snapshots(cluster):
    """Return how many states have a hash."""
    pool = cluster.scheduler._pool
    hashed = (pool.blocks.block_B["chain"] != UNHASHED).reshape(pool.refs_CPB.shape)
    return int(hashed[-1].sum())


SPARSE = replace(STATE, snapshot_every=128, chunk_size=4)
TURNS = [pytest.param((CACHES[0], SPARSE), id="states"), pytest.param((CACHES[0], CHUNK, SPARSE), id="chunks")]


def follow(cluster, key, history, num_new, **values):
    """Serve a prompt of `history` and `num_new` more tokens; return its cached tokens, and it with its answer."""
    request = make_request(key, num_new, **{"max_tokens": 13, "ignore_eos": True, **values})
    request.prompt = request.tokens = np.concatenate((history, request.prompt)).astype(np.int32)
    cluster.submit(request)
    cluster.drain()
    check(cluster, request)
    return cluster.num_cached[key], np.concatenate((request.prompt, cluster.tokens[key]))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("specs", TURNS)
def test_a_conversation_goes_on_where_the_answer_ended(specs, overlap):
    cluster = SimCluster(make_config(**SIZES), specs=specs, overlap=overlap)
    history = np.zeros(0, np.int32)
    for key in range(4):
        known = len(history)
        cached, history = follow(cluster, key, history, 10)
        # The last token of an answer was not computed.
        assert cached == (max(known - 1, 0) // BLOCK * BLOCK if key else 0)
        # Of each turn the end of its prompt lasts, and the end of its answer.
        assert num_snapshots(cluster) <= 2 * (key + 1)


@pytest.mark.parametrize("specs", TURNS)
def test_a_shared_beginning_gets_a_snapshot_where_the_second_request_leaves_it(specs):
    cluster = SimCluster(make_config(**SIZES), specs=specs)
    found = [serve(cluster, key, 40, shared=22) for key in range(4)]
    assert found == [0, 0, 20, 20]


@pytest.mark.parametrize("specs", TURNS)
def test_an_answer_has_one_snapshot_at_a_time(specs):
    cluster = SimCluster(make_config(**SIZES), specs=specs)
    request = make_request(0, 10, max_tokens=40, ignore_eos=True)
    cluster.submit(request)
    most = 0
    while not cluster.scheduler.idle:
        cluster.step()
        most = max(most, num_snapshots(cluster))
    check(cluster, request)
    assert most == 2  # of the prompt, and of the answer so far
    _, used = cluster.scheduler.stats()["blocks_used"].popitem()
    assert used == [0]


def with_few_states(specs):
    """Return a cluster with eight states and enough of the rest."""
    num_blocks = tuple(9 if spec.kind == "state" else 400 for spec in specs)
    return SimCluster(make_config(**{**SIZES, "num_blocks": num_blocks}), specs=specs)


def talk(cluster, first_key, num_turns):
    """Serve the turns of a conversation, each of which leaves two snapshots; return it."""
    history = np.zeros(0, np.int32)
    for key in range(first_key, first_key + num_turns):
        _, history = follow(cluster, key, history, 10)
    return history


@pytest.mark.parametrize("specs", TURNS)
def test_the_end_of_a_conversation_outlives_states_that_others_have_left_behind(specs):
    cluster = with_few_states(specs)
    first = talk(cluster, 0, 1)
    talk(cluster, 10, 5)
    cached, _ = follow(cluster, 20, first, 4)
    assert cached == (len(first) - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("specs", TURNS)
def test_a_state_of_many_tokens_outlives_younger_ones_of_few_for_a_time(specs):
    """Each of the short ones would be the last to be evicted by age."""
    found = []
    for num_others in (20, 300):
        cluster = with_few_states(specs)
        _, history = follow(cluster, 0, np.zeros(0, np.int32), 90)
        for key in range(1, 1 + num_others):
            serve(cluster, key, 5, shared=0)
        found.append(follow(cluster, 1000, history, 4)[0])
    assert found == [(len(history) - 1) // BLOCK * BLOCK, 0]


@pytest.mark.parametrize("specs", TURNS)
def test_where_requests_part_a_state_is_kept_although_they_went_on(specs):
    cluster = with_few_states(specs)
    for key in range(3):
        serve(cluster, key, 40, shared=22)
    talk(cluster, 10, 5)
    assert serve(cluster, 20, 40, shared=22) == 20


@pytest.mark.parametrize("specs", TURNS)
def test_a_prompt_that_came_twice_is_kept(specs):
    cluster = with_few_states(specs)
    assert [serve(cluster, key, 30, max_tokens=10) for key in range(2)] == [0, 28]
    talk(cluster, 10, 5)
    assert serve(cluster, 20, 30) == 28


def test_requests_start_while_there_is_a_chunk_for_each():
    config = make_config(**{**SIZES, "num_blocks": (65, 4, 65), "max_num_seqs": 4, "max_num_batched_tokens": 40})
    cluster = SimCluster(config, specs=WITH_CHUNKS)
    requests = [make_request(key, 9, max_tokens=9, ignore_eos=True) for key in range(4)]
    cluster.submit(*requests)
    running = []
    while not cluster.scheduler.idle:
        cluster.step()
        running.append(cluster.scheduler.stats()["blocks_used"]["chunk"][0])
    assert running[0] == max(running) == 3
    for request in requests:
        check(cluster, request)
