"""Credit: requests that have used theirs up are held, and answer the same as without."""

import pytest
from helpers.sim_ranks import CACHES, WINDOWED, SimCluster, check, expected_output, make_config, make_request

from expertwire.scheduler.outputs import FinishReason
from expertwire.scheduler.policy import FairShare

LONG = {"max_tokens": 20, "ignore_eos": True}


def until_idle(cluster):
    """Step until the scheduler has nothing to do."""
    for _ in range(200):
        if cluster.scheduler.idle:
            return
        cluster.step()
    raise AssertionError(cluster.scheduler.stats())


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("credit", [0, 1, 7])
def test_held_request_frees_everything_and_lets_the_controller_sleep(overlap, credit):
    cluster = SimCluster(make_config(), overlap=overlap)
    request = make_request(0, credit=credit, **LONG)
    cluster.submit(request)
    until_idle(cluster)
    assert cluster.tokens[0] == expected_output(request, cluster.config)[0][:credit]
    stats = cluster.scheduler.stats()
    assert (stats["held"], stats["num_running"], stats["num_waiting"]) == (1, 0, 0)
    assert all(used == [0, 0] for used in stats["blocks_used"].values())
    assert all(not rank.slots for rank in cluster.ranks)
    assert cluster.scheduler.unfinished() == [0]
    assert cluster.plan() is None
    cluster.grant(0, 20)
    assert not cluster.scheduler.idle
    cluster.drain()
    check(cluster, request)
    assert cluster.scheduler.stats()["held"] == 0


def test_release_comes_with_the_next_plan():
    cluster = SimCluster(make_config())
    cluster.submit(make_request(0, credit=1, **LONG))
    cluster.step()
    assert cluster.scheduler.stats()["held"] == 1
    plan = cluster.plan()
    assert len(plan.release_slot) == 1
    assert not plan.num_tokens_P.any()


def test_granted_in_time_it_runs_on():
    """Credit that comes before the last allowed token has arrived costs no admission."""
    cluster = SimCluster(make_config(), overlap=True)
    request = make_request(0, credit=2, **LONG)
    cluster.submit(request)
    while 0 not in cluster.finish:
        cluster.step()
        cluster.grant(0, 2)
    cluster.drain()
    check(cluster, request)
    assert sum(len(plan.admit_slot_A) for plan in cluster.plans) == 1


def test_it_is_found_in_the_prefix_cache_when_it_returns():
    cluster = SimCluster(make_config(num_ranks=1))
    request = make_request(0, 9, credit=4, **LONG)
    cluster.submit(request)
    until_idle(cluster)
    cluster.grant(0, 100)
    cluster.drain()
    check(cluster, request)
    again = next(plan for plan in cluster.plans[1:] if len(plan.admit_slot_A))
    assert again.sched_start_S.tolist() == [12], "three blocks of four tokens"
    assert cluster.num_cached[0] == 0, "what it found when it first came"


def test_it_is_not_found_after_a_flush():
    cluster = SimCluster(make_config(num_ranks=1))
    cluster.submit(make_request(0, 9, credit=4, **LONG))
    until_idle(cluster)
    flushed = cluster.scheduler.flush_cache()
    assert set(flushed.values()) == {3} and set(cluster.scheduler.flush_cache().values()) == {0}
    cluster.scheduler.check_integrity()
    cluster.grant(0, 100)
    cluster.drain()
    again = next(plan for plan in cluster.plans[1:] if len(plan.admit_slot_A))
    assert again.sched_start_S.tolist() == [0]


def test_held_requests_take_no_slot_from_others():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=1))
    cluster.submit(make_request(0, credit=3, **LONG), make_request(1, **LONG))
    until_idle(cluster)
    assert set(cluster.finish) == {1}
    assert len(cluster.tokens[0]) == 3


def test_it_returns_to_its_place_in_the_queue():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=1))
    cluster.submit(make_request(0, credit=1, **LONG), *(make_request(key, **LONG) for key in (1, 2)))
    cluster.step()
    cluster.step()
    assert (cluster.scheduler.stats()["held"], cluster.scheduler.num_running) == (1, 1)
    cluster.grant(0, 100)
    assert cluster.scheduler.unfinished() == [0, 2, 1]
    cluster.drain()
    assert list(cluster.finish) == [1, 0, 2]


def test_end_of_sequence_and_limit_come_before_the_credit():
    config = make_config(num_ranks=1, max_num_seqs=50)
    requests = [make_request(key, max_tokens=3, credit=3, stop_token_ids=[key % 50]) for key in range(50)]
    cluster = SimCluster(config)
    cluster.submit(*requests)
    cluster.drain()
    assert set(cluster.finish.values()) == {FinishReason.STOP, FinishReason.LENGTH}
    for request in requests:
        check(cluster, request)
    assert cluster.scheduler.stats()["held"] == 0


def test_stop_ids_are_looked_at_where_the_credit_ends():
    """Another request's stop id is no reason to end, and its own is one to end and not to be held."""
    cluster = SimCluster(make_config(num_ranks=1))
    token = expected_output(make_request(0, **LONG), cluster.config)[0][2]
    other = make_request(1, stop_token_ids=[token], **LONG)
    mine = make_request(0, credit=3, stop_token_ids=[(token + 1) % 50], **LONG)
    cluster.submit(other, mine)
    until_idle(cluster)
    assert (len(cluster.tokens[0]), 0 in cluster.finish) == (3, False)
    ends = make_request(0, credit=3, stop_token_ids=[token], **LONG)
    cluster = SimCluster(make_config(num_ranks=1))
    cluster.submit(ends)
    until_idle(cluster)
    assert cluster.finish == {0: FinishReason.STOP}


@pytest.mark.parametrize("when", ["before", "held", "granted"])
def test_abort(when):
    cluster = SimCluster(make_config(num_ranks=1), FairShare())
    cluster.submit(make_request(0, credit=0 if when == "before" else 2, **LONG))
    until_idle(cluster)
    if when == "granted":
        cluster.grant(0, 5)
        cluster.step()
    cluster.abort(0)
    cluster.drain()
    assert cluster.scheduler.unfinished() == []
    cluster.grant(0, 5)
    assert cluster.scheduler.idle
    assert not cluster.finish


def test_credit_granted_while_it_waits_or_without_need():
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=1))
    requests = make_request(0, **LONG), make_request(1, credit=1, **LONG)
    cluster.submit(*requests)
    cluster.step()
    cluster.grant(0, 5)
    cluster.grant(1, 19)
    cluster.drain()
    for request in requests:
        check(cluster, request)


@pytest.mark.parametrize("held", [False, True])
def test_fork_counts_its_own_tokens(held):
    cluster = SimCluster(make_config(num_ranks=1))
    parent = make_request(0, credit=3, **LONG)
    cluster.submit(parent)
    for _ in range(3):
        cluster.step()
    assert cluster.scheduler.stats()["held"] == 1
    if not held:
        cluster.grant(0, 100)
        cluster.step()
    begun = tuple(cluster.tokens[0])
    children = [make_request(key, branch=key, credit=credit, **LONG) for key, credit in ((1, 0), (2, 2))]
    for child in children:
        child.prompt = parent.prompt
        cluster.fork(0, child)
    until_idle(cluster)
    assert [len(cluster.tokens[key]) - len(begun) for key in (1, 2)] == [0, 2]
    for key in range(3):
        cluster.grant(key, 100)
    cluster.drain()
    check(cluster, parent)
    for child in children:
        check(cluster, child, begun)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("specs", [CACHES, WINDOWED], ids=["full", "window"])
def test_holds_do_not_change_outputs(overlap, enable_prefix_caching, specs):
    def answers(credit):
        config = make_config(num_blocks=12, max_num_seqs=4, enable_prefix_caching=enable_prefix_caching)
        cluster = SimCluster(config, overlap=overlap, specs=specs)
        requests = [
            make_request(key, 2 + 5 * key % 17, shared=6, max_tokens=5 + key % 13, min_tokens=key % 5, credit=credit)
            for key in range(16)
        ]
        cluster.submit(*requests)
        num_held = 0
        while cluster.scheduler.unfinished():
            until_idle(cluster)
            num_held += cluster.scheduler.stats()["held"]
            for key in cluster.scheduler.unfinished():
                cluster.grant(key, 1 + key % 3)
        for request in requests:
            check(cluster, request)
        return cluster.tokens, num_held

    with_holds, num_held = answers(2)
    without, none = answers(None)
    assert with_holds == without
    assert (num_held > 16, none) == (True, 0)


def test_expert_counts_of_recomputed_tokens_count_once():
    cluster = SimCluster(make_config(num_ranks=1, enable_prefix_caching=False))
    cluster.submit(make_request(0, 5, credit=4, expert_load=True, **LONG))
    until_idle(cluster)
    cluster.grant(0, 100)
    cluster.drain()
    first = [int(plan.admit_sampling_A["experts_from"][0]) for plan in cluster.plans if len(plan.admit_slot_A)]
    assert first == [0, 5 + 4 - 1], "all but the last token were computed, and counted, before"
