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
from expertwire.scheduler.tenants import Tenants


class Line:
    """A queue and its policy; requests are admitted one at a time. `cached`: cached tokens by key."""

    def __init__(self, policy, cached=None, **weights):
        self.policy, self.queue, self.keys = policy, WaitingQueue(), count()
        self.tenants = Tenants({tenant: TenantQuota(weight=weight) for tenant, weight in weights.items()})
        self.cached = cached if cached is not None else {}
        self.num_lookups = 0

    def submit(self, now=0.0, *, limit=10, **fields):
        request = Request(
            key=next(self.keys), prompt=np.zeros(1, np.int32), params=SamplingParams(), seed=0, limit=limit, **fields
        )
        request.arrival = now
        request.account = self.tenants.find(request.tenant, now)
        request.place = self.policy.place(request, now)
        self.queue.add(request)
        return request

    def cached_tokens(self, request):
        self.num_lookups += 1
        return self.cached.get(request.key, 0)

    def admit(self):
        request = next(iter(self.policy.order(self.queue, self.cached_tokens)))
        self.queue.remove([request])
        self.policy.admitted(request)
        return request

    def drop(self, request):
        self.queue.remove([request])
        self.policy.dropped(request)

    def drain(self):
        return [self.admit() for _ in range(len(self.queue))]

    def order(self):
        """Return all keys as one step would admit them."""
        return [request.key for request in self.policy.order(self.queue, self.cached_tokens)]


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


def admitted_tokens(requests, tenant):
    return sum(request.limit for request in requests if request.tenant == tenant)


@given(
    st.sampled_from([(1, 3), (1, 1), (0.5, 4), (7, 2)]),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(2, 50)), min_size=40, max_size=80),
)
def test_tenants_with_a_backlog_get_tokens_by_their_weights(weights, requests):
    weight = dict(zip("ab", weights, strict=True))
    line = Line(FairShare(), **weight)
    for tenant, limit in requests:
        line.submit(tenant=tenant, limit=limit)
    largest = {tenant: max((limit for t, limit in requests if t == tenant), default=0) for tenant in "ab"}
    allowed = max(largest[tenant] / weight[tenant] for tenant in "ab")
    admitted = []
    while all(line.queue.num_of(tenant) for tenant in "ab"):
        admitted.append(line.admit())
        shares = [admitted_tokens(admitted, tenant) / weight[tenant] for tenant in "ab"]
        assert abs(shares[0] - shares[1]) <= allowed * (1 + 1e-9)


def test_weights_of_one_and_three_are_a_quarter_and_three_quarters():
    line = Line(FairShare(), large=3)
    for _ in range(400):
        line.submit(tenant="small")
        line.submit(tenant="large")
    admitted = [line.admit().tenant for _ in range(400)]
    assert [admitted[:n].count("small") for n in (40, 200, 400)] == [10, 50, 100]


@given(
    num_served=st.integers(0, 50),
    flood=st.integers(2, 40),
    mine=st.integers(2, 40),
    weight=st.sampled_from([0.5, 1, 3]),
)
def test_a_flood_delays_another_tenant_by_no_more_than_its_own_request(num_served, flood, mine, weight):
    line = Line(FairShare(), mine=weight)
    for _ in range(200):
        line.submit(tenant="flood", limit=flood)
    for _ in range(num_served):
        line.admit()
    request, before = line.submit(tenant="mine", limit=mine), 0
    while line.admit() is not request:
        before += flood
    assert before <= mine / weight


def test_an_endless_stream_of_new_tenants_starves_no_old_one():
    line = Line(FairShare())
    old = [line.submit(tenant="old") for _ in range(3)]
    for number in range(100):
        line.submit(tenant=f"{number} a")
        if line.admit() is old[-1]:
            break
    else:
        pytest.fail("100 others were admitted")


def test_a_request_admitted_out_of_order_does_not_move_the_others_far_back():
    """A fork starts beside its parent, before its tenant's waiting requests."""
    line = Line(FairShare())
    *_, fork = [line.submit(tenant="flood") for _ in range(200)]
    line.queue.remove([fork])
    line.policy.admitted(fork)
    request = line.submit(tenant="quiet")
    assert request in [line.admit() for _ in range(3)]


def test_idle_tenant_saves_up_nothing():
    line = Line(FairShare())
    for _ in range(60):
        line.submit(tenant="busy")
    for _ in range(50):
        line.admit()
    for _ in range(10):
        line.submit(tenant="idle")
    assert [line.admit().tenant for _ in range(10)].count("idle") == 5


def test_a_dropped_request_is_not_charged():
    """A client that aborts a thousand requests must not wait for a thousand of the others'."""
    line = Line(FairShare())
    for _ in range(3):
        line.submit(tenant="other")
    line.admit()
    for request in [line.submit(tenant="mine") for _ in range(1000)]:
        line.drop(request)
    for _ in range(100):
        line.submit(tenant="other")
    mine = line.submit(tenant="mine")
    assert mine in [line.admit() for _ in range(4)]


def test_a_preempted_request_keeps_its_place_and_its_charge():
    line = Line(FairShare())
    for _ in range(4):
        line.submit(tenant="a")
        line.submit(tenant="b")
    first, second = line.admit(), line.admit()
    line.queue.add(second)
    line.queue.add(first)
    assert line.order()[:2] == keys([first, second])
    line.drop(first)  # it has run, so it stays charged
    line.submit(tenant="b")
    line.submit(tenant="a")
    assert [request.tenant for request in line.drain()] == [*"bababab", "b", "a"]


def test_virtual_time_does_not_go_back_with_a_preempted_request():
    line = Line(FairShare())
    first, *_ = [line.submit(tenant="a") for _ in range(6)]
    for _ in range(4):
        line.admit()
    line.queue.add(first)
    line.admit()
    line.submit(tenant="b")
    line.submit(tenant="b")
    assert [request.tenant for request in line.drain()] == [*"abab"]


def test_dropping_requests_from_before_a_gap_saves_up_nothing():
    line = Line(FairShare())
    early = [line.submit(tenant="mine") for _ in range(20)]
    for _ in range(60):
        line.submit(tenant="other")
    for request in early[:15]:  # the last five keep their places at 160 to 200 tokens
        line.drop(request)
    while line.admit().place[0] < 100:  # what is left of mine would have ended with 50
        pass
    for _ in range(4):
        line.submit(tenant="mine")
    assert [line.admit().tenant for _ in range(8)].count("mine") == 4
    for request in early[15:]:
        line.submit(tenant="mine")
        line.drop(request)
    assert [line.admit().tenant for _ in range(8)].count("mine") == 4


@given(
    st.lists(st.tuples(st.sampled_from(["add", "admit", "drop"]), st.integers(0, 99), st.integers(2, 30)), max_size=60)
)
def test_only_waiting_tenants_are_kept(operations):
    line = Line(FairShare(), **{"0": 0.3, "1": 0.7})
    for operation, number, limit in operations:
        waiting = list(line.queue)
        if operation == "add":
            line.submit(tenant=str(number % 4), limit=limit)
        elif operation == "admit" and waiting:
            line.admit()
        elif operation == "drop" and waiting:
            line.drop(waiting[number % len(waiting)])
        assert line.policy._busy.keys() <= {request.tenant for request in line.queue}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 9), st.sampled_from(["admit", "drop", "wait"]))))
def test_the_same_calls_give_the_same_order(calls):
    def play():
        line = Line(FairShare(), a=2.0)
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


@pytest.mark.parametrize("window", [0, 1.5])
def test_the_window_of_prefix_affinity_is_a_count(window):
    with pytest.raises(ValueError, match=f"window must be an integer >= 1, got {window}"):
        PrefixAffinity(window)
