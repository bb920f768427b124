"""Pauses: requests that stop being scheduled at a token id, and go on as if nothing had been."""

import numpy as np
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

from expertwire.scheduler.outputs import FinishReason
from expertwire.scheduler.pauses import PATIENCE_S

SIZES = {"num_ranks": 1, "max_num_batched_tokens": 32, "num_blocks": 41, "max_num_seqs": 6}
SPECS = pytest.mark.parametrize("specs", [CACHES, WINDOWED, WITH_CHUNKS], ids=["full", "window", "chunk"])
OVERLAP = pytest.mark.parametrize("overlap", [False, True])
ALL = np.arange(50, dtype=np.int32)


def make_pausing(key, places, config, length=7, **values):
    """Return a request that pauses after its output tokens with these indices; those of keys 4, 6, 8 and 10 are all different."""
    request = make_request(key, length, **{"max_tokens": 14, "ignore_eos": True, **values})
    output, _ = expected_output(make_request(key, length, max_tokens=14, ignore_eos=True), config)
    request.pause_ids = np.unique(np.array([output[place] for place in places if place < len(output)], np.int32))
    return request


def settle(cluster):
    """Step until there is nothing to do."""
    for _ in range(200):
        if cluster.scheduler.idle:
            return
        cluster.step()
    raise AssertionError("it does not settle")


@SPECS
@OVERLAP
@pytest.mark.parametrize("places", [(0,), (3,), (2, 3), (12, 13), (5, 6, 7)])
def test_a_paused_request_goes_on_as_if_nothing_had_been(places, overlap, specs):
    config = make_config(**SIZES)
    cluster = SimCluster(config, overlap=overlap, specs=specs)
    request, other = make_pausing(4, places, config), make_request(1, 9, max_tokens=20, ignore_eos=True)
    cluster.submit(request, other)
    pauses = []
    while 4 not in cluster.finish:
        settle(cluster)
        if 4 in cluster.paused:
            pauses.append(len(cluster.tokens[4]) - 1)
            assert cluster.scheduler.stats()["paused"] == 1
            assert cluster.scheduler.idle
            cluster.resume(4)
    output, _ = expected_output(request, config)
    assert pauses == [i for i, token in enumerate(output[:-1]) if token in request.pause_ids]
    cluster.drain()
    check(cluster, request)
    check(cluster, other)


@OVERLAP
def test_nothing_follows_a_pause(overlap):
    config = make_config(**SIZES)
    cluster = SimCluster(config, overlap=overlap)
    request, other = make_pausing(4, (4,), config), make_request(1, 9, max_tokens=20, ignore_eos=True)
    cluster.submit(request, other)
    while 4 not in cluster.paused:
        cluster.step()
    so_far = list(cluster.tokens[4])
    cluster.step()
    slot_S = cluster.plans[-1].sched_slot_S.tolist()
    assert slot_S == [1], "only the other request is computed"
    assert cluster.tokens[4] == so_far
    settle(cluster)
    assert cluster.tokens[4] == so_far
    assert 1 in cluster.finish
    cluster.resume(4)
    assert len(cluster.tokens[4]) == len(so_far) + overlap, "the token of the step that was in flight"
    cluster.drain()
    check(cluster, request)


@OVERLAP
@pytest.mark.parametrize("kind", ["stop", "length", "credit", "outgrows"])
def test_the_token_kept_back_may_be_the_last(kind, overlap):
    original = 7 + 6 if kind == "outgrows" else None
    config = make_config(**{**SIZES, "original_max_position_embeddings": original})
    cluster = SimCluster(config, overlap=overlap)
    request = make_pausing(4, (4,), config)
    output, _ = expected_output(request, config)
    changes = {
        "stop": {"stop_token_ids": [output[5]]},
        "length": {"max_tokens": 6},
        "credit": {"credit": 6},
        "outgrows": {"max_tokens": None},
    }
    request = make_pausing(4, (4,), config, **changes[kind])
    cluster.submit(request)
    settle(cluster)
    assert cluster.paused == {4}
    cluster.resume(4)
    if kind == "credit":
        settle(cluster)
        assert len(cluster.tokens[4]) == 6
        cluster.grant(4, 50)
    while not cluster.scheduler.idle or 4 in cluster.paused:
        cluster.resume(4)
        cluster.step()
    cluster.drain()
    check(cluster, request)


@OVERLAP
def test_a_token_that_ends_a_request_does_not_pause_it(overlap):
    config = make_config(**SIZES)
    cluster = SimCluster(config, overlap=overlap)
    by_length = make_request(0, 7, max_tokens=1, ignore_eos=True, pause_ids=ALL)
    output, _ = expected_output(make_request(1, 7, max_tokens=9), config)
    by_stop = make_request(1, 7, max_tokens=9, stop_token_ids=[output[0]], pause_ids=ALL)
    cluster.submit(by_length, by_stop)
    cluster.drain()
    assert cluster.finish == {0: FinishReason.LENGTH, 1: FinishReason.STOP}


@OVERLAP
def test_a_stop_id_before_min_tokens_may_pause(overlap):
    config = make_config(**SIZES)
    request = make_request(4, 7, max_tokens=9, min_tokens=9, stop_token_ids=[5, 6], pause_ids=ALL)
    cluster = SimCluster(config, overlap=overlap)
    cluster.submit(request)
    for num in range(1, 9):
        settle(cluster)
        assert len(cluster.tokens[4]) == num
        assert cluster.paused == {4}
        cluster.resume(4)
    cluster.drain()
    check(cluster, request)


@OVERLAP
def test_a_pause_at_the_end_of_the_credit(overlap):
    config = make_config(**SIZES)
    cluster = SimCluster(config, overlap=overlap)
    request = make_request(4, 7, max_tokens=6, ignore_eos=True, pause_ids=ALL, credit=1)
    cluster.submit(request)
    for num in range(1, 6):
        settle(cluster)
        assert len(cluster.tokens[4]) == num
        assert cluster.scheduler.stats()["held"] == 1
        first, second = (cluster.grant, (4, 1)), (cluster.resume, (4,))
        for call, args in (first, second) if num % 2 else (second, first):
            assert cluster.scheduler.idle
            call(*args)
    cluster.drain()
    check(cluster, request)


@SPECS
@OVERLAP
def test_forks_from_a_paused_request_share_its_blocks(overlap, specs):
    config = make_config(**{**SIZES, "enable_prefix_caching": False, "num_blocks": 81})
    cluster = SimCluster(config, overlap=overlap, specs=specs)
    request = make_pausing(4, (4,), config)
    cluster.submit(request)
    settle(cluster)
    begun = tuple(cluster.tokens[4])
    children = [make_request(key, 7, branch=key, max_tokens=14, ignore_eos=True) for key in (1, 2)]
    for child in children:
        child.prompt = request.prompt
    before = cluster.ranks[0].num_computed
    cluster.fork(4, *children)
    cluster.step()
    if specs is not WITH_CHUNKS:  # a state has no past
        assert cluster.ranks[0].num_computed - before <= 2
    cluster.resume(4)
    cluster.drain()
    check(cluster, request)
    for child in children:
        check(cluster, child, begun)


@OVERLAP
@pytest.mark.parametrize("when", ["running", "held"])
def test_abort_of_a_paused_request_frees_everything(when, overlap):
    config = make_config(**{**SIZES, "max_num_seqs": 1})
    cluster = SimCluster(config, overlap=overlap)
    cluster.submit(make_pausing(4, (3,), config))
    settle(cluster)
    if when == "held":
        other = make_request(1, 5, max_tokens=4)
        cluster.submit(other)
        settle(cluster)
        check(cluster, other)
        assert cluster.scheduler.stats()["held"] == 1
    cluster.abort(4)
    cluster.resume(4)
    cluster.drain()
    assert cluster.scheduler.unfinished() == []


@OVERLAP
def test_paused_requests_that_nobody_resumes_do_not_block_others(overlap):
    config = make_config(**{**SIZES, "max_num_seqs": 2})
    cluster = SimCluster(config, overlap=overlap)
    paused = [make_pausing(key, (3,), config) for key in (4, 6)]
    cluster.submit(*paused)
    settle(cluster)
    began = cluster.now
    others = [make_request(key, 9, max_tokens=6) for key in (1, 2, 3)]
    cluster.submit(*others)
    cluster.step()
    assert cluster.scheduler.stats()["paused"] == 2, "they are not taken for lost at once"
    settle(cluster)
    assert cluster.now - began >= PATIENCE_S
    for other in others:
        check(cluster, other)
    assert cluster.scheduler.stats()["held"] == 2
    for key in (4, 6):
        cluster.resume(key)
    cluster.drain()
    for request in paused:
        check(cluster, request)


@OVERLAP
def test_paused_requests_give_their_blocks_to_running_ones(overlap):
    config = make_config(**{**SIZES, "num_blocks": 9})
    cluster = SimCluster(config, overlap=overlap)
    first = make_pausing(4, (3,), config)
    others = [make_request(key, 4, max_tokens=17, ignore_eos=True) for key in (1, 2)]
    cluster.submit(first, *others)
    for _ in range(100):
        cluster.step()
    for other in others:
        check(cluster, other)
    assert cluster.scheduler.stats()["preemptions"]
    cluster.resume(4)
    cluster.drain()
    check(cluster, first)


def test_resume_of_others_is_ignored():
    config = make_config(**SIZES)
    cluster = SimCluster(config)
    request = make_pausing(4, (30,), config)
    cluster.submit(request)
    for key in (4, 7):
        cluster.resume(key)
    cluster.drain()
    check(cluster, request)


def test_a_pause_of_a_request_whose_next_logits_are_not_finite():
    config = make_config(**SIZES)
    cluster = SimCluster(config, overlap=True)
    cluster.submit(make_pausing(4, (3,), config))
    cluster.break_at(4, 7 + 4)
    settle(cluster)
    assert cluster.failed == {4: (7 + 4, 0)}
    assert len(cluster.tokens[4]) == 4
    cluster.resume(4)
    cluster.drain()
