from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.scheduler.policy import FairShare, Fcfs, PrefixAffinity, Priority, ShortestRemaining, make_policy
from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.quotas import TenantQuota
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.scheduler.tenants import TenantAccounts


class Line:
    """A queue and its policy; requests are admitted one at a time. `cached`: cached tokens by key."""

    def __init__(self, policy, cached=None, **weights):
        self.policy, self.queue, self.keys = policy, WaitingQueue(), count()
        self.tenants = TenantAccounts({tenant: TenantQuota(weight=weight) for tenant, weight in weights.items()})
        self.cached = cached if cached is not None else {}
        self.num_lookups = 0

    def submit(self, now=0.0, *, limit=10, **fields):
        request = Request(
            key=next(self.keys), prompt=np.zeros(1, np.int32), params=SamplingParams(), seed=0, limit=limit, **fields
        )
        request.arrival = now
        request.account = self.tenants.find(request.tenant, now)
        request.account.num_unfinished += 1
        request.place = self.policy.place(request, now)
        self.queue.add(request)
        return request

    def cached_tokens(self, request):
        self.num_lookups += 1
        return self.cached.get(request.key, 0)

    def admit(self):
        request = next(iter(self.ordered()))
        self.drop(request)
        return request

    def drop(self, request):
        self.queue.remove([request])
        request.account.num_unfinished -= 1

    def ordered(self):
        if isinstance(self.policy, FairShare):
            self.policy.begin(self.queue.num_of)
        return self.policy.order(self.queue, self.cached_tokens)

    def drain(self):
        return [self.admit() for _ in range(len(self.queue))]

    def order(self):
        """Return all keys as one step would admit them."""
        return keys(self.ordered())


def keys(requests):
    return [request.key for request in requests]


def test_fcfs_ignores_everything_but_the_order():
    line = Line(Fcfs(), cached={2: 5})
    for priority, limit in ((1, 9), (0, 5), (-1, 3)):
        line.submit(priority=priority, limit=limit, tenant=str(limit))
    assert line.order() == keys(line.drain()) == [0, 1, 2]


@pytest.mark.parametrize(("policy", "field"), [(Priority(1.0), "priority"), (ShortestRemaining(1.0), "limit")])
def test_smaller_goes_first_until_aging_makes_up_the_difference(policy, field):
    line = Line(policy)
    line.submit(0.0, **{field: 7})
    line.submit(0.0, **{field: 4})
    line.submit(2.0, **{field: 4})
    line.submit(3.0, **{field: 4})  # as long after the first as its 7 is larger: equal, so after it
    line.submit(4.0, **{field: 4})
    assert line.order() == keys(line.drain()) == [1, 2, 0, 3, 4]


@pytest.mark.parametrize(("policy", "field"), [(Priority(0), "priority"), (ShortestRemaining(0), "limit")])
def test_without_aging_the_smaller_always_goes_first(policy, field):
    line = Line(policy)
    line.submit(0.0, **{field: 7})
    line.submit(1e9, **{field: 6})
    line.submit(2e9, **{field: 6})
    assert line.order() == [1, 2, 0]


@pytest.mark.parametrize(("make", "field"), [(Priority, "priority"), (ShortestRemaining, "limit")])
@given(aging=st.sampled_from([0.25, 1.0, 4.0]), gap=st.integers(1, 40), rate=st.integers(1, 4))
def test_stream_of_smaller_requests_starves_nobody(make, field, aging, gap, rate):
    line = Line(make(aging))
    patient = line.submit(0.0, **{field: 1 + gap})
    urgent = 0
    for tick in count():
        line.submit(tick / rate, **{field: 1})
        if line.admit() is patient:
            break
        urgent += 1
        assert urgent <= gap / aging * rate + 1, "more than come in the seconds that the gap is worth"
    line.submit(1e6, **{field: -1_000_000 * 4})
    assert urgent == -(-gap * rate // aging)


def test_the_longest_cached_prefix_goes_first_and_equals_in_order():
    line = Line(PrefixAffinity(), cached={1: 4, 2: 8, 4: 8})
    for _ in range(5):
        line.submit()
    assert line.order() == [2, 4, 1, 0, 3]
    line.cached[0] = 9  # the cache has changed
    assert line.order() == keys(line.drain()) == [0, 2, 4, 1, 3]


def test_prefixes_are_looked_up_as_far_as_the_window_only():
    line = Line(PrefixAffinity(window=4), cached={5: 1, 3: 1})
    for _ in range(100):
        line.submit()
    assert line.order()[:8] == [3, 0, 1, 2, 5, 4, 6, 7]
    line.num_lookups = 0
    assert line.admit().key == 3
    assert line.num_lookups == 4


@given(st.integers(1, 5), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30), st.data())
def test_no_request_is_passed_by_more_later_ones_than_the_window_allows(window, steps, data):
    line = Line(PrefixAffinity(window))
    admitted = []
    for num_new, num_admitted in steps:
        for _ in range(num_new):
            line.submit()
        for request in line.queue:
            line.cached[request.key] = data.draw(st.integers(0, 3))
        admitted += [line.admit().key for _ in range(min(num_admitted, len(line.queue)))]
    admitted += keys(line.drain())
    for index, key in enumerate(admitted):
        assert sum(other > key for other in admitted[:index]) <= window - 1


def test_the_worst_stream_passes_a_request_exactly_as_often_as_the_window_allows():
    line = Line(PrefixAffinity(window=4))
    for _ in range(3):
        line.submit()
    for _ in range(10):
        line.cached[line.submit().key] = 1  # whoever comes has a prefix in the cache, and the first three have not
    assert keys(line.drain())[:7] == [3, 0, 4, 1, 5, 2, 6]


def charge(line, request, num_tokens):
    tokens = dict.fromkeys(line.policy.accounts, 0)
    line.policy.charge(tokens | {request.account: num_tokens})


def serve(line, num_tokens):
    """Admit the next request and compute so many tokens at once; return its tenant."""
    request = line.admit()
    charge(line, request, num_tokens)
    return request.tenant


@given(
    st.sampled_from([(1, 3), (1, 1), (0.5, 4), (7, 2)]),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(2, 50)), min_size=40, max_size=80),
)
def test_tenants_that_wait_are_served_by_their_weights(weights, requests):
    weight = dict(zip("ab", weights, strict=True))
    line = Line(FairShare(slack=1), **weight)
    for tenant, limit in requests:
        line.submit(tenant=tenant, limit=limit)
    largest = max(limit for _, limit in requests) / min(weights)
    served = dict.fromkeys("ab", 0.0)
    while all(line.queue.num_of(tenant) for tenant in "ab"):
        request = line.admit()
        charge(line, request, request.limit)
        served[request.tenant] += request.limit / weight[request.tenant]
        assert abs(served["a"] - served["b"]) <= largest + line.policy.slack + 1e-9  # sums of thirds


def test_weights_of_one_and_three_are_a_quarter_and_three_quarters():
    line = Line(FairShare(slack=1), large=3)
    for _ in range(400):
        line.submit(tenant="small")
        line.submit(tenant="large")
    served = [serve(line, 12) for _ in range(400)]
    assert [served[:n].count("small") for n in (40, 200, 400)] == [10, 50, 100]


def test_one_step_admits_tenants_in_turn_of_what_it_will_compute():
    line = Line(FairShare(slack=1), large=4)
    for _ in range(8):
        line.submit(tenant="small")
        line.submit(tenant="large")
    order = [key % 2 for key in line.order()]  # 1: large
    assert [order[:n].count(0) for n in (5, 10)] == [1, 2]


def test_a_flood_does_not_delay_a_tenant_that_was_idle():
    line = Line(FairShare())
    for _ in range(200):
        line.submit(tenant="flood")
    for _ in range(50):
        serve(line, 500)
    line.submit(tenant="mine")
    assert line.admit().tenant == "mine"


def test_idle_tenant_saves_up_nothing():
    line = Line(FairShare(slack=1))
    for _ in range(60):
        line.submit(tenant="busy")
    for _ in range(50):
        serve(line, 10)
    for _ in range(10):
        line.submit(tenant="idle")
    assert [serve(line, 10) for _ in range(10)].count("idle") == 5


def test_who_began_to_wait_last_goes_first_within_the_slack():
    line = Line(FairShare(slack=100))
    for _ in range(9):
        line.submit(tenant="a")
    line.admit()
    for _ in range(9):
        line.submit(tenant="b")
    served = [serve(line, 40) for _ in range(9)]
    assert served[:3] == [*"bbb"], "it may send a burst"
    assert served.count("a") >= 2, "and pays for it"


def test_an_endless_stream_of_new_tenants_starves_no_old_one():
    line = Line(FairShare(slack=20))
    for _ in range(3):
        line.submit(tenant="old")
    served = [serve(line, 50)]
    for number in range(100):
        line.submit(tenant=f"{number} new")
        served.append(serve(line, 10))
    assert served.count("old") == 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 9), st.sampled_from(["admit", "drop", "wait"]))))
def test_the_same_calls_give_the_same_order(calls):
    def play():
        line = Line(FairShare(slack=5), a=2.0)
        admitted = []
        for number, (tenant, limit, then) in enumerate(calls):
            request = line.submit(float(number), tenant=tenant, limit=limit)
            if then == "admit":
                admitted.append(line.admit().key)
            elif then == "drop":
                line.drop(request)
        return admitted + keys(line.drain())

    assert play() == play()


@pytest.mark.parametrize(
    ("name", "options", "policy"),
    [
        ("fcfs", {}, Fcfs()),
        ("priority", {}, Priority()),
        ("priority", {"aging": 0}, Priority(0)),
        ("shortest", {"aging": 3.5}, ShortestRemaining(3.5)),
        ("prefix", {}, PrefixAffinity(128)),
        ("fair", {}, FairShare()),
    ],
)
def test_policies_by_name(name, options, policy):
    made = make_policy(name, **options)
    assert (type(made), made) == (type(policy), policy)
    assert make_policy(name, **options) is not made


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lifo", {}, "fcfs, priority, shortest, prefix, fair, got 'lifo'"),
        ("fcfs", {"aging": 1.0}, "aging has no effect with scheduling_policy 'fcfs'; use 'priority' or 'shortest'"),
        ("priority", {"aging": -1.0}, "aging must be a number from 0 to .*, got -1.0"),
        ("shortest", {"aging": float("nan")}, "aging must be a number from 0 to .*, got nan"),
        ("shortest", {"aging": True}, "aging must be a number from 0 to .*, got True"),
    ],
)
def test_errors_name_the_field_and_allowed_values(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_policy(name, **options)


@pytest.mark.parametrize("slack", [0, 1.5])
def test_the_slack_of_fair_shares_is_a_count(slack):
    with pytest.raises(ValueError, match=f"slack must be an integer >= 1, got {slack}"):
        FairShare(slack=slack)


@pytest.mark.parametrize("window", [0, 1.5])
def test_the_window_of_prefix_affinity_is_a_count(window):
    with pytest.raises(ValueError, match=f"window must be an integer >= 1, got {window}"):
        PrefixAffinity(window)
