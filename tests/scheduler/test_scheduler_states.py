"""Caches of recurrent states: a block holds the state after its last token; snapshots are kept."""

import pytest
from helpers.sim_ranks import STATE, WITH_CHUNKS, WITH_STATE, SimCluster, check, make_config, make_request, serve

SIZES = {"num_ranks": 1, "max_model_len": 128, "max_num_batched_tokens": 8, "num_blocks": 65}
EVERY = 8


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
def test_a_prefix_ends_where_a_state_was_kept(length, specs):
    cluster = SimCluster(make_config(**SIZES), specs=specs)
    assert [serve(cluster, key, length) for key in (0, 1)] == [0, (length - 1) // EVERY * EVERY]


def test_evicted_state_ends_no_prefix():
    # 5 states: of 60 tokens the last ones are left.
    cluster = SimCluster(make_config(**{**SIZES, "num_blocks": (65, 6)}), specs=WITH_STATE)
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
        child.prompt = child.tokens = parent.prompt
    cluster.fork(0, *children)
    cluster.drain()
    for request, start in ((parent, ()), (children[0], begun), (children[1], begun)):
        check(cluster, request, start)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_states", [4, 6])
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
