"""The traces of `bench schedule` are what they say, and the oracle of prefix hits counts by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from expertwire.bench.scheduler.traces import (
    TRACES,
    Arrival,
    Bursty,
    Lengths,
    LongContext,
    MultiTurn,
    Poisson,
    Served,
    Tenants,
)
from expertwire.bench.scheduler.traces import oracle_hits as oracle

SHORT = Lengths(median=8, sigma=0.5, high=32)


def gaps(trace: Poisson) -> np.ndarray:
    return np.diff([arrival.time for arrival in trace.arrivals()])


@pytest.mark.parametrize("name", TRACES)
def test_a_trace_is_a_function_of_its_fields(name):
    first, again, other = (TRACES[name](num_requests=40, seed=seed).arrivals() for seed in (3, 3, 4))
    assert len(first) == len(again)
    for a, b in zip(first, again, strict=True):
        assert (a.time, a.output_len, a.tenant, a.priority) == (b.time, b.output_len, b.tenant, b.priority)
        assert np.array_equal(a.prompt, b.prompt)
    assert [a.time for a in first] != [a.time for a in other]


@pytest.mark.parametrize("name", TRACES)
def test_requests_keep_to_their_limits(name):
    trace = TRACES[name](num_requests=200)
    arrivals = trace.arrivals()
    times = [arrival.time for arrival in arrivals]
    assert times == sorted(times)
    for arrival in arrivals:
        assert arrival.prompt.dtype == np.int32
        assert 1 <= arrival.prompt.min() <= arrival.prompt.max() < trace.vocab_size
        assert len(arrival.prompt) + arrival.max_tokens <= trace.max_model_len
        assert 1 <= arrival.output_len <= arrival.max_tokens


def test_gaps_have_the_rate_and_the_variation():
    trace = {"num_requests": 20_000, "rate": 5.0, "prompt": SHORT}
    poisson, bursty = gaps(Poisson(**trace)), gaps(Bursty(**trace, cv=3.0))
    assert poisson.mean() == pytest.approx(0.2, rel=0.03)
    assert bursty.mean() == pytest.approx(0.2, rel=0.1)
    assert poisson.std() / poisson.mean() == pytest.approx(1.0, rel=0.05)
    assert bursty.std() / bursty.mean() == pytest.approx(3.0, rel=0.1)


def test_the_prompts_have_the_published_ratio_to_the_outputs():
    arrivals = Poisson(num_requests=4000).arrivals()
    ratio = sum(len(a.prompt) for a in arrivals) / sum(a.output_len for a in arrivals)
    assert ratio == pytest.approx(3.6, rel=0.1)


def test_a_share_of_the_contexts_is_long():
    arrivals = LongContext(num_requests=1000, long_share=0.2, prompt=SHORT).arrivals()
    long = [a for a in arrivals if len(a.prompt) > SHORT.high]
    assert len(long) == pytest.approx(200, abs=40)
    assert min(len(a.prompt) for a in long) >= 8192


def test_tenants_are_popular_as_zipf_says_and_keep_their_system_prompts():
    trace = Tenants(num_requests=5000, num_tenants=10, zipf=1.0, prompt=SHORT, system_tokens=16, num_priorities=3)
    arrivals = trace.arrivals()
    assert trace.shares()[0] / trace.shares()[9] == pytest.approx(10)
    for tenant, share in enumerate(trace.shares()):
        mine = [a for a in arrivals if a.tenant == f"tenant {tenant}"]
        assert len(mine) / 5000 == pytest.approx(share, rel=0.2)
        assert len({a.prompt[:16].tobytes() for a in mine}) == 1
        assert {a.priority for a in mine} == {tenant % 3}
    assert len({a.prompt[:16].tobytes() for a in arrivals}) == 10


def test_some_clients_leave():
    arrivals = Poisson(num_requests=2000, abort_share=0.25, patience_s=3.0, prompt=SHORT).arrivals()
    patience = [a.abort_at - a.time for a in arrivals if a.abort_at is not None]
    assert len(patience) == pytest.approx(500, abs=60)
    assert np.mean(patience) == pytest.approx(3.0, rel=0.15)


def test_a_session_goes_on_from_its_answer():
    trace = MultiTurn(num_requests=30, turns=3, rate=6.0, think_s=2.0, system_tokens=20)
    starts = trace.arrivals()
    assert len(starts) == 10
    assert len({a.prompt[:20].tobytes() for a in starts}) == 1
    assert len({a.prompt[20:].tobytes() for a in starts}) == 10
    answer = np.array([7, 8, 0], np.int32)
    second = trace.follow_up(starts[4], answer, 100.0)
    assert second.time > 100.0
    assert (second.session, second.turn) == (starts[4].session, 1)
    context = np.concatenate([starts[4].prompt, answer])
    assert np.array_equal(second.prompt[: len(context)], context)
    assert len(second.prompt) > len(context)
    later = trace.follow_up(starts[4], answer, 500.0)
    assert later.time - 500.0 == pytest.approx(second.time - 100.0)
    assert np.array_equal(later.prompt, second.prompt), "what is said does not depend on when"
    third = trace.follow_up(second, answer, 200.0)
    assert trace.follow_up(third, answer, 300.0) is None


def test_a_session_ends_when_its_prompt_would_be_too_long():
    trace = MultiTurn(num_requests=5, turns=5, max_model_len=5000)
    [start] = trace.arrivals()
    assert trace.follow_up(start, np.ones(4000, np.int32), 1.0) is None


@pytest.mark.parametrize(("field", "value"), [("num_requests", 0), ("rate", 0.0), ("rate", float("nan"))])
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        Poisson(**{field: value})


def served(
    tokens: list[int], submitted: float, computed: tuple[int, ...] = (), finished: float | None = None, tenant: str = ""
) -> Served:
    arrival = Arrival(time=submitted, prompt=np.array(tokens, np.int32), output_len=9, max_tokens=9, tenant=tenant)
    return Served(arrival=arrival, submitted=submitted, computed=np.array(computed, np.int32), finished=finished)


def test_the_oracle_counts_whole_blocks_of_what_came_before():
    first = served(list(range(1, 11)), 0.0, computed=(11, 12), finished=5.0)
    assert oracle([first], 4) == 0
    # Ten tokens of a prompt and two of its answer are computed: three blocks, of which the third is known from the end on.
    continued = [*range(1, 14), 20]
    assert oracle([first, served(continued, 6.0)], 4) == 12
    assert oracle([first, served(continued, 5.0)], 4) == 12, "an answer is known at the moment that it ends"
    assert oracle([first, served(continued, 4.0)], 4) == 8
    assert oracle([first, served(continued, 6.0, tenant="other")], 4) == 0
    # A token that was sampled but not computed completes no block.
    longer = served(list(range(1, 14)), 0.0, computed=(14, 15), finished=5.0)
    assert oracle([longer, served([*range(1, 17), 30], 6.0)], 4) == 12
    # A prompt's last token is computed even if all its blocks are known.
    assert oracle([first, served(list(range(1, 9)), 1.0)], 4) == 4
    assert oracle([first, served(list(range(1, 10)), 1.0)], 4) == 8
    # A block counts only behind the same beginning.
    assert oracle([first, served([9, 9, 9, 9, 5, 6, 7, 8, 1], 1.0)], 4) == 0
    assert oracle([first, first, first], 4) == 16


def test_each_of_several_caches_computes_what_all_have_in_common():
    first = served(list(range(1, 11)), 0.0)
    assert [oracle([first] * 4, 4, num_caches) for num_caches in (1, 2, 3, 4)] == [24, 16, 8, 0]
    # A session stays with its cache.
    turns = [dataclasses.replace(first.arrival, session=session) for session in (0, 1, 0, 1)]
    asked = [
        dataclasses.replace(first, arrival=turn, submitted=float(i)) for i, turn in enumerate([*turns[:2], turns[0]])
    ]
    assert oracle(asked, 4, 2) == 8
    assert oracle(asked[:2], 4, 2) == 0
