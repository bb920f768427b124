import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.scheduler.queue import WaitingQueue
from expertwire.scheduler.request import Request
from expertwire.scheduler.sampling_params import SamplingParams


def make_request(key, place=0.0, tenant=""):
    prompt = np.zeros(1, np.int32)
    return Request(key=key, prompt=prompt, params=SamplingParams(), seed=0, tenant=tenant, place=(float(place),))


def filled(*places):
    queue = WaitingQueue()
    requests = [make_request(key, place) for key, place in enumerate(places)]
    for request in requests:
        queue.add(request)
    return queue, requests


def keys(queue):
    return [request.key for request in queue]


def test_requests_are_in_order_of_place_and_then_of_submission():
    queue, _ = filled(2, 1, 2, 1, 0)
    assert keys(queue) == [4, 1, 3, 0, 2]


def test_a_request_returns_to_its_old_place():
    queue, _ = filled(1, 1, 1)
    first, second = queue.get(0), queue.get(1)
    queue.remove([first, second])
    queue.add(make_request(3, 1))
    queue.add(second)
    queue.add(first)
    assert keys(queue) == [0, 1, 2, 3]


def test_remove_needs_a_waiting_request_and_discard_does_not():
    queue, requests = filled(0, 0)
    assert queue.discard(7) is None
    assert queue.discard(1) is requests[1]
    with pytest.raises(AssertionError, match="place"):
        queue.remove([requests[1]])
    assert keys(queue) == [0]


def test_a_key_waits_once_and_a_place_stays():
    queue, (request,) = filled(0)
    with pytest.raises(AssertionError, match="key 0"):
        queue.add(make_request(0))
    request.place = (1.0,)
    with pytest.raises(AssertionError, match="place"):
        queue.remove([request])


add = st.tuples(st.just("add"), st.integers(0, 3), st.sampled_from(["", "a", "b"]))
take = st.tuples(st.sampled_from(["remove", "discard", "return"]), st.integers(0, 20), st.none())


@given(st.lists(st.one_of(add, take), max_size=60))
def test_queue_agrees_with_a_sorted_list(operations):
    queue, waiting, gone = WaitingQueue(), [], []
    for key, (operation, number, tenant) in enumerate(operations):
        if operation == "add":
            waiting.append(make_request(key, number, tenant))
            queue.add(waiting[-1])
        elif operation == "return" and gone:
            waiting.append(gone.pop(number % len(gone)))
            queue.add(waiting[-1])
        elif operation == "remove" and waiting:
            some = waiting[number % len(waiting) :: 2]
            waiting = [request for request in waiting if request not in some]
            gone += some
            queue.remove(some)
        elif operation == "discard":
            found = [request for request in waiting if request.key == number]
            waiting = [request for request in waiting if request.key != number]
            assert queue.discard(number) is (found[0] if found else None)
        # Keys grow with submission, so they are the order of equals.
        assert list(queue) == sorted(waiting, key=lambda request: (request.place, request.key))
        assert all(queue.get(request.key) is request for request in waiting)
        assert (len(queue), bool(queue)) == (len(waiting), bool(waiting))
        assert [number in queue for number in range(key)] == [number in keys(waiting) for number in range(key)]
        for tenant in ("", "a", "b"):
            assert queue.num_of(tenant) == sum(request.tenant == tenant for request in waiting)
