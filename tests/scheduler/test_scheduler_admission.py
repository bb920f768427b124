"""Admission: deadlines, limits of tenants, chunked prefill and the token budget."""

import pytest
from helpers.sim_ranks import CACHES, SimCluster, make_config, make_request

from expertwire.scheduler.policy import FairShare, Priority
from expertwire.scheduler.quotas import TenantQuota
from expertwire.scheduler.scheduler import Scheduler

ONE = {"num_ranks": 1, "max_num_seqs": 1, "num_blocks": 41}


def at_rate(seconds_each, num_waiting):
    """Return a cluster that has admitted one request a step, every `seconds_each`, and has `num_waiting` left."""
    cluster = SimCluster(make_config(**ONE, max_queued_requests=1000))
    cluster.submit(*(make_request(key, 2, max_tokens=1) for key in range(100 + num_waiting)))
    for _ in range(100):
        cluster.step()
        cluster.now = round(cluster.now - 0.01, 9) + seconds_each
    assert cluster.scheduler.num_waiting == num_waiting
    return cluster


def submit(cluster, key, left_s=None, **values):
    deadline = None if left_s is None else cluster.now + left_s
    return cluster.scheduler.submit(make_request(key, 2, max_tokens=1, deadline=deadline, **values), cluster.now)


def test_a_deadline_that_cannot_be_met_is_refused_at_once_with_a_hint():
    cluster = at_rate(0.5, num_waiting=10)  # so about 5 s to wait
    rejection = submit(cluster, 1000, left_s=3.0)
    assert (rejection.key, rejection.code) == (1000, "RESOURCE_EXHAUSTED")
    assert rejection.retry_after_s == pytest.approx(2.0, abs=0.5)
    for word in ("10 requests", "deadline", "3 s"):
        assert word in rejection.message
    assert cluster.scheduler.num_waiting == 10


def test_a_deadline_that_can_be_met_is_accepted():
    cluster = at_rate(0.5, num_waiting=10)
    assert submit(cluster, 1000, left_s=8.0) is None
    assert submit(cluster, 1001) is None, "no deadline, no matter"


@pytest.mark.parametrize(("weight", "num_ahead"), [(1.0, 1), (0.25, 4)])
def test_with_fair_shares_a_deadline_is_judged_by_the_turns_of_tenants(weight, num_ahead):
    quotas = {"other": TenantQuota(weight=weight)}
    cluster = SimCluster(make_config(**ONE, max_queued_requests=1000, tenant_quotas=quotas), FairShare())
    cluster.submit(*(make_request(key, 2, max_tokens=1, tenant="storm") for key in range(200)))
    for _ in range(100):
        cluster.step()
        cluster.now = round(cluster.now - 0.01, 9) + 0.5
    assert submit(cluster, 1000, left_s=10.0, tenant="storm").code == "RESOURCE_EXHAUSTED"
    assert submit(cluster, 1001, left_s=0.5 * num_ahead - 0.2, tenant="other") is not None
    assert submit(cluster, 1002, left_s=0.5 * num_ahead + 0.2, tenant="other") is None


def test_after_the_hint_the_request_is_accepted():
    cluster = at_rate(0.5, num_waiting=10)
    rejection = submit(cluster, 1000, left_s=3.0)
    while cluster.now < 50.0 + rejection.retry_after_s + 0.5:
        cluster.step()
        cluster.now = round(cluster.now - 0.01, 9) + 0.5
    assert submit(cluster, 1000, left_s=3.0) is None


def test_any_deadline_is_accepted_when_the_queue_is_empty():
    cluster = at_rate(0.5, num_waiting=0)
    assert submit(cluster, 1000, left_s=0.01) is None


def test_any_deadline_is_accepted_without_a_known_rate():
    cluster = SimCluster(make_config(**ONE))
    cluster.submit(*(make_request(key) for key in range(5)))
    assert submit(cluster, 5, left_s=0.01) is None


@pytest.mark.parametrize("left_s", [0.0, -1.0])
def test_a_deadline_that_is_past_is_refused(left_s):
    cluster = SimCluster(make_config(**ONE))
    rejection = submit(cluster, 0, left_s=left_s)
    assert rejection.code == "RESOURCE_EXHAUSTED"
    assert rejection.retry_after_s == 0.0
    assert "deadline" in rejection.message


def test_idle_time_does_not_lower_the_admission_rate():
    """The rate of arrivals is not the rate of service."""
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=100, max_num_batched_tokens=100, num_blocks=401))
    for key in range(100):  # one a minute, each admitted at once
        cluster.submit(make_request(key, 2, max_tokens=1))
        cluster.step()
        cluster.now += 60.0
    cluster.drain()
    assert [submit(cluster, 1000 + key, left_s=5.0) for key in range(20)] == [None] * 20


def test_full_queue_hints_at_the_admission_rate():
    cluster = at_rate(0.5, num_waiting=5)
    cluster.submit(*(make_request(key) for key in range(2000, 2995)))
    rejection = submit(cluster, 3000)
    assert rejection.code == "RESOURCE_EXHAUSTED"
    assert rejection.retry_after_s == pytest.approx(0.5, abs=0.1)
    fresh = SimCluster(make_config(**ONE, max_queued_requests=1))
    fresh.submit(make_request(0))
    assert submit(fresh, 1).retry_after_s is None


def test_impossible_request_has_no_retry_hint():
    rejection = Scheduler(make_config(), CACHES).submit(make_request(0, 32, deadline=1.0), 0.0)
    assert (rejection.code, rejection.retry_after_s) == ("INVALID_ARGUMENT", None)


def test_a_tenant_may_have_only_so_many_waiting():
    cluster = SimCluster(make_config(**ONE, max_queued_requests_per_tenant=2))
    for key in range(2):
        cluster.submit(make_request(key, tenant="a"))
    rejection = submit(cluster, 2, tenant="a")
    assert (rejection.key, rejection.code) == (2, "RESOURCE_EXHAUSTED")
    for word in ("2 requests of tenant 'a'", "max_queued_requests_per_tenant = 2", "try later"):
        assert word in rejection.message
    cluster.submit(make_request(3, tenant="b"))
    cluster.step()  # one of a's runs
    cluster.submit(make_request(4, tenant="a"))
    cluster.abort(1)
    cluster.submit(make_request(5, tenant="a"))
    assert submit(cluster, 6, tenant="a").code == "RESOURCE_EXHAUSTED"
    cluster.drain()
    assert set(cluster.finish) == {0, 3, 4, 5}


@pytest.mark.parametrize("chunked_prefill_size", [1, 3, 8])
def test_prefill_beside_decodes_is_limited_to_a_chunk(chunked_prefill_size):
    """A prompt's last token alone does not count: it costs a decode."""
    cluster = SimCluster(
        make_config(
            **{**ONE, "max_num_seqs": 4, "max_num_batched_tokens": 16}, chunked_prefill_size=chunked_prefill_size
        )
    )
    cluster.submit(make_request(0, 2, max_tokens=30, ignore_eos=True))
    cluster.step()
    cluster.submit(*(make_request(key, 10, max_tokens=3, ignore_eos=True) for key in (1, 2)))
    chunks = []
    while {1, 2} - cluster.finish.keys():
        plan = cluster.plan()
        decodes = (plan.sched_num_S == 1) & (plan.sched_sample_S == 1)
        assert decodes[0], "the first one gets its token every step"
        chunks.append(int(plan.sched_num_S[~decodes].sum()))
        cluster.commit()
    assert max(chunks) == chunked_prefill_size
    cluster.abort(0)
    cluster.drain()


def test_without_decodes_the_chunk_is_the_budget():
    cluster = SimCluster(make_config(num_ranks=2, max_num_batched_tokens=16, num_blocks=41, chunked_prefill_size=2))
    cluster.submit(
        make_request(0, 20, max_tokens=9, ignore_eos=True), make_request(1, 2, max_tokens=9, ignore_eos=True)
    )
    assert cluster.plan().num_tokens_P.tolist() == [16, 2]
    cluster.commit()
    cluster.submit(make_request(2, 20))
    # Rank 0 has a prompt, and no decode; rank 1 has a decode, so that of the new prompt there are two tokens.
    assert cluster.plan().num_tokens_P.tolist() == [4, 3]
    cluster.commit()
    cluster.drain()


@pytest.mark.parametrize("budget", [1, 2, 5, 9])
def test_the_budget_is_used_up_and_never_passed(budget):
    cluster = SimCluster(make_config(num_ranks=1, max_num_seqs=4, max_num_batched_tokens=budget, num_blocks=41))
    cluster.submit(*(make_request(key, 9, max_tokens=3, ignore_eos=True) for key in range(6)))
    tokens = []
    while not cluster.scheduler.idle:
        plan = cluster.plan()
        tokens.append(int(plan.num_tokens_P[0]))
        cluster.commit()
    assert max(tokens) == budget
    assert tokens[: 9 // budget] == [budget] * (9 // budget)
    assert sum(tokens) == 6 * (9 + 2)


def test_aging_lets_the_less_urgent_have_their_turn():
    cluster = SimCluster(make_config(**ONE), Priority(aging=10.0))
    cluster.submit(make_request(0, 2, max_tokens=1), make_request(1, 2, max_tokens=1, priority=5))
    for key in range(2, 200):
        cluster.submit(make_request(key, 2, max_tokens=1, priority=0))
        cluster.step()
        cluster.now += 0.09
        if 1 in cluster.finish:
            break
    assert 3 < key < 20  # after 5 / 10 seconds, at 0.1 s a step


def test_blocks_that_a_prompt_will_take_are_not_given_to_another():
    # Of 8 blocks the first prompt has 5 and takes one more in this step; one is set aside for what it says, so that 1 is left.
    cluster = SimCluster(make_config(num_ranks=1, max_num_batched_tokens=20, num_blocks=9))
    cluster.submit(make_request(0, 22, max_tokens=9, ignore_eos=True), make_request(1, 8, max_tokens=9))
    cluster.step()
    assert cluster.admitted(cluster.plan()) == []
    cluster.commit()
    cluster.drain()
