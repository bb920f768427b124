"""Groups: branches that start together, whose prompt is computed once."""

import numpy as np
import pytest
from helpers.sim_ranks import CACHES, WINDOWED, WITH_CHUNKS, WITH_STATE, SimCluster, check, make_config, make_request

from expertwire.scheduler.policy import FairShare, Fcfs
from expertwire.scheduler.quotas import TenantQuota

SIZES = {"num_ranks": 1, "max_num_batched_tokens": 8, "num_blocks": 81, "max_num_seqs": 6}
KINDS = {"full": CACHES, "window": WINDOWED, "state": WITH_STATE, "chunk": WITH_CHUNKS}
SPECS = pytest.mark.parametrize("specs", KINDS.values(), ids=KINDS)
OVERLAP = pytest.mark.parametrize("overlap", [False, True])


def make_group(count, length=11, first=0, **values):
    """Return branches with the keys from `first` on; each draws with its key as its seed."""
    values = {"max_tokens": 9, "ignore_eos": True, **values}
    group = [make_request(first + branch, length, branch=branch, **values) for branch in range(count)]
    for request in group:
        request.prompt = request.tokens = group[0].prompt
    return group


def num_computed(cluster):
    return sum(rank.num_computed for rank in cluster.ranks)


@SPECS
@OVERLAP
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4, 7, 8, 9, 16, 20])
def test_a_groups_prompt_is_computed_once(length, caching, overlap, specs):
    cluster = SimCluster(make_config(**SIZES, enable_prefix_caching=caching), overlap=overlap, specs=specs)
    group = make_group(4, length)
    cluster.submit_group(*group)
    cluster.drain()
    for request in group:
        check(cluster, request)
    assert num_computed(cluster) == length + 4 * 8
    assert cluster.scheduler.stats()["cached_tokens"] == 3 * length
    firsts = [plan for plan in cluster.plans if len(plan.admit_slot_A)]
    assert [len(plan.admit_slot_A) for plan in firsts] == ([1, 3] if length > 8 else [4])


@OVERLAP
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("num_states", [8, 9, 12])
def test_branches_that_begin_states_at_once_wait_for_each_other(num_states, caching, overlap):
    """All come to the end of a block in the same step, and hold two states then."""
    sizes = {**SIZES, "num_blocks": (81, 81, num_states + 1), "enable_prefix_caching": caching}
    cluster = SimCluster(make_config(**sizes), overlap=overlap, specs=WITH_CHUNKS)
    group = make_group(6, 6, max_tokens=26)
    cluster.submit_group(*group)
    cluster.drain()
    for request in group:
        check(cluster, request)
    assert cluster.scheduler.stats()["preemptions"] == 0
    assert num_computed(cluster) == 6 + 6 * 25


@SPECS
@OVERLAP
def test_a_group_behind_a_prefix_hit(overlap, specs):
    cluster = SimCluster(make_config(**SIZES), overlap=overlap, specs=specs)
    before = make_group(1, 18)
    cluster.submit(*before)
    cluster.drain()
    computed = num_computed(cluster)
    group = make_group(4, 18, first=10)
    for request in group:
        request.prompt = request.tokens = before[0].prompt
    cluster.submit_group(*group)
    cluster.drain()
    for request in group:
        check(cluster, request)
    assert num_computed(cluster) - computed == 2 + 4 * 8
    assert cluster.num_cached == {0: 0, 10: 16, 11: 18, 12: 18, 13: 18}


def test_blocks_are_shared():
    cluster = SimCluster(make_config(**SIZES))
    cluster.submit_group(*make_group(4, 11, max_tokens=6))
    peak = 0
    while not cluster.scheduler.idle:
        cluster.step()
        peak = max(peak, *cluster.scheduler.stats()["blocks_used"]["first"])
    # Two full blocks of the prompt; each branch has its own copy of the third, and two more for what it samples.
    assert peak == 2 + 4 * 2
    assert sum(len(plan.copy_to_M) for plan in cluster.plans) == 3 * len(CACHES)


@SPECS
@OVERLAP
@pytest.mark.parametrize("policy", [Fcfs, FairShare])
@pytest.mark.parametrize("count", [5, 9])
def test_a_group_larger_than_what_is_free(count, policy, overlap, specs):
    config = make_config(**{**SIZES, "max_num_seqs": 4})
    cluster = SimCluster(config, policy(), overlap=overlap, specs=specs)
    early, late = make_request(90, 5, max_tokens=20, ignore_eos=True), make_request(91, 5, max_tokens=3)
    cluster.submit(early)
    cluster.step()
    group = make_group(count)
    cluster.submit_group(*group)
    cluster.submit(late)
    cluster.drain()
    for request in (early, late, *group):
        check(cluster, request)
    if policy is Fcfs:  # the last branches may only just be starting: their leader was not passed
        assert cluster.order.index(3) < cluster.order.index(91)


@SPECS
@OVERLAP
@pytest.mark.parametrize("blocks", [9, 10, 12, 15])
def test_a_group_in_a_small_pool(blocks, overlap, specs):
    config = make_config(**{**SIZES, "num_blocks": blocks, "max_model_len": 24})
    cluster = SimCluster(config, overlap=overlap, specs=specs)
    group, other = make_group(5, 13), make_request(9, 6, max_tokens=12, ignore_eos=True)
    cluster.submit_group(*group)
    cluster.submit(other)
    cluster.drain()
    for request in (*group, other):
        check(cluster, request)


@SPECS
@OVERLAP
@pytest.mark.parametrize("gone", [(0,), (1,), (3,), (0, 1), (0, 1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 4, 5])
def test_branches_outlive_each_other(num_steps, gone, overlap, specs):
    cluster = SimCluster(make_config(**SIZES), overlap=overlap, specs=specs)
    group = make_group(4, 19)  # three steps of prompt
    cluster.submit_group(*group)
    for _ in range(num_steps):
        cluster.step()
    for key in gone:
        cluster.abort(key)
        cluster.step()
    cluster.drain()
    for request in group:
        if request.key not in gone:
            check(cluster, request)


@OVERLAP
def test_a_leader_whose_prompt_is_not_finite(overlap):
    cluster = SimCluster(make_config(**SIZES), overlap=overlap)
    group = make_group(3, 19, prompt_logprobs=0)
    cluster.break_at(0, 12)
    cluster.submit_group(*group)
    cluster.drain()
    assert set(cluster.failed) == {0}
    for request in group[1:]:
        check(cluster, request)


@OVERLAP
@pytest.mark.parametrize("short", [{"max_num_seqs": 4}, {"num_blocks": 16}], ids=["slots", "blocks"])
def test_pruned_branches_make_room_in_the_next_plan(short, overlap):
    cluster = SimCluster(make_config(**{**SIZES, **short}), overlap=overlap)
    group = make_group(4, 7, max_tokens=20)
    others = [make_request(key, 5, max_tokens=4) for key in (10, 11, 12)]
    cluster.submit_group(*group)
    for _ in range(6):
        cluster.step()
    cluster.submit(*others)
    cluster.step()
    assert cluster.scheduler.num_waiting == 3
    for key in (1, 3):
        cluster.abort(key)
    plan = cluster.plan()
    assert sorted(plan.release_slot.tolist()) == [1, 3]
    assert cluster.admitted(plan) == [10, 11]
    cluster.commit()
    cluster.drain()
    for request in (group[0], group[2], *others):
        check(cluster, request)


def test_a_group_is_rejected_together():
    cluster = SimCluster(make_config(**SIZES, tenant_quotas={"a": TenantQuota(max_requests=3)}))
    rejection = cluster.scheduler.submit_group(make_group(4, tenant="a"), 0.0)
    assert (rejection.key, rejection.code) == (0, "INVALID_ARGUMENT")
    assert "4 branches" in rejection.message
    cluster.submit(make_request(9, tenant="a"))
    rejection = cluster.scheduler.submit_group(make_group(3, tenant="a"), 0.0)
    assert (rejection.key, rejection.code) == (0, "RESOURCE_EXHAUSTED")
    assert cluster.scheduler.unfinished() == [9]
    rejection = cluster.scheduler.submit_group(make_group(3, 40), 0.0)
    assert (rejection.key, rejection.code) == (0, "INVALID_ARGUMENT")


def test_followers_count_as_waiting():
    cluster = SimCluster(make_config(**SIZES, max_queued_requests=4))
    cluster.submit_group(*make_group(4))
    assert cluster.scheduler.num_waiting == 4
    assert cluster.scheduler.submit(make_request(9), 0.0).code == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize("limit", ["max_queued_requests", "max_queued_requests_per_tenant"])
def test_a_group_needs_a_place_for_each_branch(limit):
    cluster = SimCluster(make_config(**SIZES, **{limit: 4}))
    cluster.submit_group(*make_group(3, tenant="a"))
    others = [make_request(8, tenant="a"), make_request(9, tenant="a", branch=1)]
    rejection = cluster.scheduler.submit_group(others, 0.0)
    assert (rejection.key, rejection.code) == (8, "RESOURCE_EXHAUSTED")
    assert f"{limit} = 4" in rejection.message
    assert cluster.scheduler.num_waiting == 3
    assert cluster.scheduler.submit_group(others[:1], 0.0) is None


@OVERLAP
@pytest.mark.parametrize("quota", [{"max_running": 2}, {"kv_share": 0.1}, {"max_running": 1}])
def test_a_group_keeps_to_its_tenants_quota(quota, overlap):
    cluster = SimCluster(make_config(**SIZES, tenant_quotas={"a": TenantQuota(**quota)}), overlap=overlap)
    group = make_group(4, 19, tenant="a")
    cluster.submit_group(*group)
    while not cluster.scheduler.idle:
        cluster.step()
        assert cluster.scheduler.stats()["num_running"] <= quota.get("max_running", 9)
    cluster.drain()
    for request in group:
        check(cluster, request)


@OVERLAP
@pytest.mark.parametrize("credit", [0, 1, 3])
def test_credit_of_branches(credit, overlap):
    cluster = SimCluster(make_config(**SIZES), overlap=overlap)
    group = make_group(3, credit=credit)
    cluster.submit_group(*group)
    for _ in range(20):
        cluster.step()
    assert [len(cluster.tokens[key]) for key in range(3)] == [credit] * 3
    for key in range(3):
        cluster.grant(key, 100)
    cluster.drain()
    for request in group:
        check(cluster, request)


@SPECS
@OVERLAP
def test_a_group_forks_from_a_running_request(overlap, specs):
    cluster = SimCluster(
        make_config(**{**SIZES, "max_num_seqs": 8}, enable_prefix_caching=False), specs=specs, overlap=overlap
    )
    parent = make_request(0, 11, max_tokens=16, ignore_eos=True)
    cluster.submit(parent)
    for _ in range(7):
        cluster.step()
    before = num_computed(cluster)
    begun = (*cluster.tokens[0][:4], 7, 8)
    group = make_group(3, first=1)
    for request in group:
        request.prompt, request.output = parent.prompt, np.array(begun, np.int32)
        request.tokens = np.concatenate((request.prompt, request.output))
    cluster.submit_group(*group, parent=0)
    for request in group:
        cluster.tokens[request.key] = list(begun)
    cluster.step()
    if specs in (CACHES, WINDOWED):
        assert num_computed(cluster) - before <= 2 + 2, "the two tokens that differ, and those of the parent"
    cluster.drain()
    check(cluster, parent)
    for request in group:
        check(cluster, request, begun)


@OVERLAP
def test_a_long_group(overlap):
    config = make_config(**SIZES, original_max_position_embeddings=13)
    cluster = SimCluster(config, overlap=overlap)
    long, outgrowing = make_group(3, 11), make_group(3, 11, first=10, max_tokens=None)
    cluster.submit_group(*long)
    cluster.submit_group(*outgrowing)
    cluster.drain()
    for request in (*long, *outgrowing):
        check(cluster, request)


@SPECS
@pytest.mark.parametrize("length", [1024, 1026])
def test_plans_carry_what_branches_have_in_common_once(length, specs):
    def num_bytes(count):
        sizes = {"max_model_len": 1100, "max_num_batched_tokens": 2048, "num_blocks": 600, "max_num_seqs": 20}
        cluster = SimCluster(make_config(**{**SIZES, **sizes}), specs=specs)
        group = make_group(count, length, max_tokens=2)
        cluster.submit_group(*group)
        cluster.drain()
        for request in group:
            check(cluster, request)
        return sum(plan.to_arrays()["StepPlan"].nbytes for plan in cluster.plans)

    assert num_bytes(1) > 4 * length
    # A follower's record, its own last blocks, and its slots in two steps; all followers together less than the prompt.
    assert num_bytes(17) - num_bytes(1) < 16 * 300 < 2 * 4 * length
