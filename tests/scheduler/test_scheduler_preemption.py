"""Preemption: the choice of victims, and outputs that do not depend on it."""

import numpy as np
import pytest
from helpers.sim_ranks import CACHES, WINDOWED, SimCluster, check, expected_output, make_config, make_request

from expertwire.scheduler.load_balancing import LeastLoaded
from expertwire.scheduler.policy import Priority

SMALL = {"num_ranks": 1, "max_num_batched_tokens": 32, "num_blocks": 13}  # 12 blocks of 4 tokens


def start(*requests, policy=None, overlap=False, specs=CACHES, **sizes):
    """Return a cluster that runs requests (length, fields) with keys 0, 1, ..., which ignore the end of sequence."""
    cluster = SimCluster(make_config(**{**SMALL, **sizes}), policy, overlap=overlap, specs=specs)
    for key, (length, values) in enumerate(requests):
        cluster.submit(make_request(key, length, **{"max_tokens": 20, "ignore_eos": True, **values}))
    assert len(cluster.admitted(cluster.plan())) == len(requests)
    cluster.commit()
    return cluster


def first_preempted(cluster):
    """Return the keys that are preempted first."""
    for _ in range(100):
        running = [{i: int(slot.sampling["seed"]) for i, slot in rank.slots.items()} for rank in cluster.ranks]
        ended = set(cluster.finish)
        plan = cluster.plan()
        cluster.commit()
        released = [running[r][i] for r in range(len(cluster.ranks)) for i in plan.rank(r).release_slot.tolist()]
        if gone := [key for key in released if key not in ended]:
            return gone
    raise AssertionError("nobody was preempted")


@pytest.mark.parametrize(
    ("requests", "victim"),
    [
        ([(7, {}), (7, {}), (7, {})], 2),  # the youngest of equals
        ([(7, {}), (5, {}), (9, {})], 1),  # the cheapest
        ([(7, {}), (9, {}), (5, {})], 2),
        ([(7, {}), (5, {"priority": 1}), (5, {"priority": 2})], 2),  # the least urgent
        ([(7, {}), (9, {"priority": 2}), (5, {"priority": 1})], 1),
        ([(5, {}), (9, {}), (7, {})], 2),  # never the oldest, though it is the cheapest
        ([(5, {"priority": 1}), (9, {}), (7, {})], 0),  # but then a more urgent one is safe
        ([(7, {}), (7, {}), (5, {"max_tokens": 13})], 1),  # nor one that is about to finish
        ([(7, {}), (7, {}), (5, {"max_tokens": 13, "priority": 1})], 1),
    ],
)
def test_preemption_victim(requests, victim):
    cluster = start(*requests)
    assert first_preempted(cluster) == [victim]
    cluster.drain()
    assert set(cluster.finish) == {0, 1, 2}


def test_request_about_to_finish_is_preempted_last():
    # After 5 tokens each, every request wants a third block, and 2 of 8 are left.
    cluster = start(*[(5, {"max_tokens": 7})] * 3, num_blocks=9)
    assert first_preempted(cluster) == [2]
    cluster.drain()
    assert set(cluster.finish) == {0, 1, 2}


def test_as_many_are_preempted_as_needed():
    # Of 17 blocks, 6 are everyone's. All want a second one of their own at once, then a third, when one is left.
    cluster = SimCluster(
        make_config(num_ranks=1, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=6, num_blocks=18)
    )
    lengths = [25, 26, 26, 27, 27]  # as they are admitted in this order
    requests = [make_request(key, n, shared=24, max_tokens=12, ignore_eos=True) for key, n in enumerate(lengths)]
    cluster.submit(*requests)
    gone = first_preempted(cluster)
    assert len(gone) > 1
    assert len(cluster.plans[-1].sched_slot_S) == 5 - len(gone), "the others make progress"
    cluster.drain()
    assert len(cluster.finish) == 5


class Crowded(LeastLoaded):
    """Prefers rank 0 while it has a slot."""

    def load_P(self, running_P, admitted_P):
        return 1e9 * np.arange(len(running_P))


def test_only_the_rank_that_is_short_preempts():
    cluster = SimCluster(make_config(**{**SMALL, "num_ranks": 2}), balancing=Crowded())
    lengths = [20, 20, 20, 12, 12]
    cluster.submit(*(make_request(key, 7, max_tokens=n, ignore_eos=True) for key, n in enumerate(lengths)))
    cluster.step()
    assert [len(rank.slots) for rank in cluster.ranks] == [3, 2]
    assert first_preempted(cluster) == [2]
    cluster.drain()
    keys = [key for plan in cluster.plans for key in cluster.admitted(plan)]
    assert [keys.count(key) for key in (3, 4)] == [1, 1]


def test_preempted_request_returns_with_its_tokens_before_later_ones():
    cluster = start((7, {}), (7, {}), (7, {}))
    cluster.submit(make_request(3, 7, max_tokens=20))
    assert first_preempted(cluster) == [2]
    so_far = list(cluster.tokens[2])
    assert cluster.scheduler.unfinished()[:2] == [2, 3]
    while 2 not in (keys := cluster.admitted(plan := cluster.plan())):
        assert 3 not in keys
        cluster.commit()
    mine, place = plan.rank(0), keys.index(2)
    assert mine.admit_tokens[place].tolist() == make_request(2, 7).prompt.tolist() + so_far
    assert mine.admit_sampling_A[place]["prompt_len"] == 7
    cluster.commit()
    cluster.drain()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
@pytest.mark.parametrize("specs", [CACHES, WINDOWED], ids=["full", "window"])
@pytest.mark.parametrize("chunk", [1, 5, 32])
def test_small_pool_gives_the_outputs_of_a_large_one(overlap, enable_prefix_caching, specs, chunk):
    def answers(num_blocks):
        sizes = {
            "max_num_batched_tokens": max(chunk, 4),
            "chunked_prefill_size": chunk,
            "num_blocks": num_blocks,
            "max_num_seqs": 4,
        }
        config = make_config(**sizes, enable_prefix_caching=enable_prefix_caching)
        cluster = SimCluster(config, overlap=overlap, specs=specs)
        requests = [
            make_request(key, 2 + 5 * key % 17, shared=6, max_tokens=5 + key % 13, min_tokens=key % 5)
            for key in range(16)
        ]
        cluster.submit(*requests)
        cluster.drain()
        for request in requests:
            check(cluster, request)
        return cluster.tokens, cluster.scheduler.stats()["preemptions"]

    small, num_preempted = answers(9)
    large, none = answers(100)
    assert small == large
    assert (num_preempted > 0, none) == (True, 0)


def test_num_cached_is_that_of_the_first_admission():
    cluster = SimCluster(make_config(**SMALL))
    cluster.submit(make_request(9, 7, shared=7, max_tokens=1))
    cluster.drain()
    cluster.submit(*(make_request(key, 7, shared=5, max_tokens=20, ignore_eos=True) for key in range(3)))
    cluster.drain()
    assert cluster.scheduler.stats()["preemptions"] > 0
    assert [cluster.num_cached[key] for key in range(3)] == [4, 4, 4]
    assert cluster.scheduler.stats()["prompt_tokens"] == 28


def test_prompt_logprobs_precede_the_first_token_also_after_preemption():
    """They are reported again when the prompt is recomputed."""
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=4, num_blocks=9, max_num_seqs=4))
    requests = [make_request(key, 9, prompt_logprobs=1, max_tokens=12, ignore_eos=True) for key in range(4)]
    cluster.submit(*requests)
    positions = {request.key: [] for request in requests}
    while not cluster.scheduler.idle:
        cluster.plan()
        outputs = cluster.commit()
        for key, position in zip(outputs.prompt_key_I.tolist(), outputs.prompt_position_I.tolist(), strict=True):
            positions[key].append(position)
        assert all(set(positions[key]) == set(range(1, 9)) for key in outputs.key_O.tolist())
    assert cluster.scheduler.stats()["preemptions"] > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("enable_prefix_caching", [False, True])
def test_expert_counts_of_recomputed_tokens_count_once(overlap, enable_prefix_caching):
    config = make_config(
        num_ranks=1, max_num_batched_tokens=4, num_blocks=9, max_num_seqs=4, enable_prefix_caching=enable_prefix_caching
    )
    cluster = SimCluster(config, overlap=overlap)
    asks = [key % 4 != 1 for key in range(8)]
    for key, ask in enumerate(asks):
        cluster.submit(make_request(key, 9, max_tokens=12, ignore_eos=True, expert_load=ask))
    cluster.drain()
    assert cluster.scheduler.stats()["preemptions"] > 0
    counted, running = [[] for _ in asks], {}
    for plan in cluster.plans:
        mine = plan.rank(0)
        for slot, sampling in zip(mine.admit_slot_A.tolist(), mine.admit_sampling_A, strict=True):
            running[slot] = int(sampling["seed"]), int(sampling["experts_from"])
        for slot, start, num in zip(mine.sched_slot_S.tolist(), mine.sched_start_S, mine.sched_num_S, strict=True):
            key, first = running[slot]
            assert (first >= 0) == asks[key]
            counted[key] += range(max(start, first), start + num)
    assert [positions == list(range(9 + 12 - 1)) for positions, ask in zip(counted, asks, strict=True) if ask] == [
        True
    ] * 6


def test_abort_of_a_preempted_request():
    cluster = start((7, {}), (7, {}), (7, {}))
    (victim,) = first_preempted(cluster)
    so_far = list(cluster.tokens[victim])
    cluster.abort(victim)
    cluster.drain()
    assert cluster.tokens[victim] == so_far
    assert set(cluster.finish) == {0, 1}


def test_oldest_urgent_request_is_never_preempted():
    """One always makes progress; aging lets the less urgent run in between."""
    cluster = start((7, {"priority": 5}), policy=Priority(aging=10.0))
    for key in range(1, 60):
        cluster.submit(make_request(key, 7, priority=0, max_tokens=8, ignore_eos=True))
        cluster.step()
        cluster.step()
    assert 0 in cluster.finish
    cluster.drain()


def test_token_in_flight_is_kept_on_preemption():
    cluster = SimCluster(make_config(**SMALL), overlap=True)
    cluster.submit(*(make_request(key, 7, max_tokens=20, ignore_eos=True) for key in range(3)))
    while not cluster.scheduler.stats()["preemptions"]:
        before = list(cluster.tokens[2])
        cluster.step()
    assert cluster.scheduler.num_waiting == 0, "it stays until its token is there"
    assert len(cluster.tokens[2]) == len(before) + 1
    cluster.step()
    assert cluster.scheduler.unfinished()[0] == 2
    cluster.drain()
    assert cluster.tokens[2] == expected_output(make_request(2, 7, max_tokens=20, ignore_eos=True), cluster.config)[0]


def test_oldest_request_gets_blocks_while_others_drain():
    # 10 blocks, of which each has 3 and wants a fourth at once: one is preempted, but has a step in flight.
    cluster = SimCluster(make_config(**{**SMALL, "num_blocks": 11}), overlap=True)
    cluster.submit(*(make_request(key, 7, max_tokens=20, ignore_eos=True) for key in range(3)))
    while not cluster.scheduler.stats()["preemptions"]:
        cluster.step()
    assert cluster.plans[-1].sched_slot_S.tolist() == [0]
    cluster.drain()
    assert len(cluster.finish) == 3
