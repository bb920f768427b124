"""Quotas of tenants."""

import pytest
from helpers.sim_ranks import SimCluster, check, make_config, make_request

from expertwire.scheduler.policy import FairShare, Fcfs, PrefixAffinity
from expertwire.scheduler.quotas import TenantQuota
from expertwire.scheduler.tenants import TenantAccounts

LONG = {"max_tokens": 20, "ignore_eos": True}


def make_cluster(policy=None, *, default=None, sizes=None, **quota):
    """Return a cluster whose tenant "a" has this quota."""
    quotas = {"a": TenantQuota(**quota)}
    sizes = {"max_num_seqs": 4, "num_blocks": 60, **(sizes or {})}
    return SimCluster(make_config(tenant_quotas=quotas, default_tenant_quota=default, **sizes), policy)


def refusal(cluster, key, length=5, **values):
    """Submit a request that is refused; return why."""
    rejection = cluster.scheduler.submit(make_request(key, length, **values), cluster.now)
    assert rejection is not None
    return rejection


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": 0}, "weight must be a number from 0.001 to 1000, got 0"),
        ({"weight": "2"}, "weight must be a number from 0.001 to 1000, got '2'"),
        ({"max_requests": 0}, "max_requests must be an integer >= 1 or None, got 0"),
        ({"max_running": True}, "max_running must be an integer >= 1 or None, got True"),
        ({"tokens_per_minute": 1.5}, "tokens_per_minute must be an integer >= 1 or None, got 1.5"),
        ({"requests_per_minute": -1}, "requests_per_minute must be an integer >= 1 or None, got -1"),
        ({"kv_share": 0}, r"kv_share must be a number in \(0, 1\] or None, got 0"),
        ({"kv_share": 1.01}, r"kv_share must be a number in \(0, 1\] or None, got 1.01"),
    ],
)
def test_a_quota_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        TenantQuota(**values)


def test_requests_in_the_system_are_limited():
    cluster = make_cluster(max_requests=2)
    cluster.submit(*(make_request(key, tenant="a", credit=1, **LONG) for key in range(2)))
    for _ in range(3):
        cluster.step()
    assert cluster.scheduler.stats()["held"] == 2, "those that are held count, too"
    rejection = refusal(cluster, 2, tenant="a")
    assert rejection.code == "RESOURCE_EXHAUSTED"
    assert "tenant 'a' has 2 requests; allowed are max_requests = 2: try later" in rejection.message
    cluster.submit(make_request(3, tenant="b"))
    cluster.abort(0)
    cluster.submit(make_request(4, tenant="a"))


def test_requests_a_minute_are_limited():
    cluster = make_cluster(requests_per_minute=6)
    cluster.submit(*(make_request(key, tenant="a", max_tokens=1) for key in range(6)))
    cluster.drain()
    rejection = refusal(cluster, 6, tenant="a")
    assert rejection.code == "RESOURCE_EXHAUSTED"
    assert "tenant 'a' has sent its requests_per_minute = 6: try later" in rejection.message
    assert rejection.retry_after_s == pytest.approx(10 - cluster.now)
    cluster.now += rejection.retry_after_s
    cluster.submit(make_request(7, tenant="a", max_tokens=1))
    assert refusal(cluster, 8, tenant="a").retry_after_s == pytest.approx(10)


def test_tokens_a_minute_are_reserved_and_settled():
    cluster = make_cluster(tokens_per_minute=60)
    cluster.submit(make_request(0, 10, tenant="a", max_tokens=20, ignore_eos=True))
    cluster.submit(make_request(1, 10, tenant="a", max_tokens=20, ignore_eos=True))
    rejection = refusal(cluster, 2, 10, tenant="a", max_tokens=5)
    assert rejection.code == "RESOURCE_EXHAUSTED"
    assert "has 0 tokens left of its tokens_per_minute = 60; this request may have 15" in rejection.message
    assert rejection.retry_after_s == pytest.approx(15)
    cluster.abort(1)  # it has not run: 20 tokens come back
    cluster.submit(make_request(3, 10, tenant="a", max_tokens=10, ignore_eos=True))
    cluster.drain()
    # 30 + 20 were used; the first was charged in full, and nobody gets more than a minute's.
    rejection = refusal(cluster, 4, 5, tenant="a", max_tokens=20)
    assert "has 10 tokens left" in rejection.message


def test_more_tokens_than_a_minute_has_are_never_possible():
    rejection = refusal(make_cluster(tokens_per_minute=20), 0, 10, tenant="a", max_tokens=11)
    assert rejection.code == "INVALID_ARGUMENT"
    assert "prompt and max_tokens are 21 tokens; tenant 'a' may have tokens_per_minute = 20" in rejection.message


def test_a_refused_request_is_not_charged():
    cluster = make_cluster(requests_per_minute=2, tokens_per_minute=30)
    for key in range(5):
        refusal(cluster, key, 10, tenant="a", max_tokens=21)
    cluster.submit(make_request(9, 10, tenant="a", max_tokens=20))


@pytest.mark.parametrize("policy", [Fcfs, PrefixAffinity, FairShare])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_tenant_at_its_most_running_requests_waits_and_others_pass(policy, overlap):
    cluster = make_cluster(policy(), max_running=2, sizes={"num_ranks": 1, "max_num_batched_tokens": 64})
    cluster.overlap = overlap
    mine = [make_request(key, tenant="a", **LONG) for key in range(5)]
    others = [make_request(key, tenant="b", **LONG) for key in range(5, 8)]
    cluster.submit(*mine, *others)
    most = most_of_b = 0
    while not cluster.scheduler.idle:
        cluster.step()
        tenants = cluster.scheduler.stats()["tenants"]
        most = max(most, tenants["a"]["running"])
        most_of_b = max(most_of_b, tenants["b"]["running"])
    assert (most, most_of_b) == (2, 2), "of four slots"
    for request in (*mine, *others):
        check(cluster, request)


@pytest.mark.parametrize("policy", [Fcfs, FairShare])
def test_a_tenant_at_its_share_of_the_cache_waits_and_others_pass(policy):
    # Of 40 blocks, 10 are the share; a request of 16 tokens needs 4 and one more.
    cluster = make_cluster(
        policy(), kv_share=0.25, sizes={"num_ranks": 1, "num_blocks": 41, "max_num_batched_tokens": 64}
    )
    cluster.submit(*(make_request(key, 16, tenant="a", max_tokens=4, ignore_eos=True) for key in range(4)))
    cluster.submit(make_request(4, 16, tenant="b", max_tokens=4, ignore_eos=True))
    cluster.step()
    tenants = cluster.scheduler.stats()["tenants"]
    assert (tenants["a"]["running"], tenants["b"]["running"]) == (2, 1)
    cluster.drain()
    assert len(cluster.finish) == 5


def test_one_request_may_run_however_large_it_is():
    cluster = make_cluster(kv_share=0.01)
    cluster.submit(*(make_request(key, 20, tenant="a", **LONG) for key in range(3)))
    cluster.drain()
    assert len(cluster.finish) == 3


def test_a_fork_waits_for_its_tenants_quota():
    cluster = make_cluster(max_running=1)
    cluster.submit(make_request(0, tenant="a", **LONG))
    cluster.step()
    child = make_request(1, tenant="a", branch=1, **LONG)
    child.prompt = child.tokens = make_request(0).prompt
    cluster.fork(0, child)
    cluster.step()
    assert cluster.scheduler.stats()["tenants"]["a"] == {"running": 1, "waiting": 1, "tokens": 0, "refused": 0}
    cluster.drain()


def test_the_default_quota_holds_for_tenants_that_are_not_listed():
    cluster = make_cluster(default=TenantQuota(max_requests=1))
    cluster.submit(*(make_request(key, tenant="a") for key in range(3)))
    cluster.submit(make_request(3, tenant="b"))
    cluster.submit(make_request(4, tenant="c"))
    assert "tenant 'b' has 1 requests" in refusal(cluster, 5, tenant="b").message


def test_statistics_by_tenant():
    cluster = make_cluster(max_requests=2)
    cluster.submit(*(make_request(key, tenant="a", max_tokens=3, ignore_eos=True) for key in range(2)))
    refusal(cluster, 2, tenant="a")
    cluster.submit(make_request(3, 7, tenant="b", max_tokens=2, ignore_eos=True))
    assert cluster.scheduler.stats()["tenants"]["a"] == {"running": 0, "waiting": 2, "tokens": 0, "refused": 1}
    cluster.drain()
    assert cluster.scheduler.stats()["tenants"] == {
        "a": {"running": 0, "waiting": 0, "tokens": 16, "refused": 1},
        "b": {"running": 0, "waiting": 0, "tokens": 9, "refused": 0},
    }


def test_strangers_names_are_bounded_and_the_longest_idle_goes_first():
    tenants = TenantAccounts({"listed": TenantQuota()}, TenantQuota(requests_per_minute=60), max_unlisted=3)
    busy, *idle = [tenants.find(name, 0.0) for name in "abc"]
    busy.num_unfinished = 1
    idle[0].requests.take(1)  # forgotten now, it would have its minute back
    assert tenants.find("d", 0.0).index == idle[1].index
    assert tenants.find("e", 0.5) is not None
    assert sorted(account.tenant for account in tenants) == ["a", "b", "e", "listed"]
    tenants.find("e", 0.5).num_unfinished = 1
    assert tenants.find("f", 0.5) is None
    assert tenants.find("listed", 0.5) is not None
    assert tenants.find("f", 1.0).index == idle[0].index
    assert tenants.num_forgotten == 3
    assert len({account.index for account in tenants}) == 4


def test_a_stranger_is_refused_while_the_table_is_full():
    cluster = make_cluster(sizes={"max_queued_requests": 5000})
    cluster.scheduler._tenants._max_unlisted = 3
    cluster.submit(*(make_request(key, tenant=f"stranger {key}", **LONG) for key in range(3)))
    rejection = refusal(cluster, 9, tenant="another")
    assert rejection.code == "RESOURCE_EXHAUSTED"
    assert "tenants that no quota names" in rejection.message
    cluster.submit(make_request(10, tenant="a"))
    cluster.drain()
    cluster.submit(make_request(11, tenant="another"))
    assert len(cluster.scheduler.stats()["tenants"]) == 4
