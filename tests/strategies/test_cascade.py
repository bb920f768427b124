"""Cascades: the router, the mechanisms, the log and its replay at other thresholds."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertwire.strategies.cascade import Cascade, Router, confidence_minima, first_below, fit_router, prompt_features
from expertwire.strategies.cascade_log import DecisionRecord, Leg, evaluate_thresholds, reason_at, record_from_json
from expertwire.strategies.confidence import Windows

ROUTER = Router(("x",), (0.0,), (1.0,), (1.0,), 0.0)


def test_the_router_finds_the_model_that_made_the_labels():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(4000, 2)) * (1, 10) + (0, 50)
    chance = 1 / (1 + np.exp(-(0.5 + 2 * rows[:, 0] - 0.1 * (rows[:, 1] - 50))))
    features = [{"a": a, "b": b, "same": 1.0} for a, b in rows.tolist()]
    router = fit_router(features, (rng.random(4000) < chance).tolist(), ridge=1e-3)
    slopes = np.array(router.weights) / np.array(router.scales)
    assert slopes == pytest.approx([2.0, -0.1, 0.0], abs=0.15)
    found = [router.probability(row) for row in features]
    assert float(np.abs(np.array(found) - chance).mean()) < 0.02


def test_the_fit_is_where_the_gradient_vanishes():
    """The bias's tiny penalty apart, mean probabilities equal shares: a property of the maximum."""
    features = [{"x": float(i % 7)} for i in range(100)]
    right = [i % 3 == 0 for i in range(100)]
    router = fit_router(features, right)
    assert sum(router.probability(row) for row in features) == pytest.approx(sum(right), abs=1e-2)


def test_labels_that_are_equal_or_separable_have_a_finite_fit():
    for right in ([True] * 4, [False, False, True, True]):
        router = fit_router([{"x": float(i)} for i in range(4)], right)
        assert all(map(math.isfinite, (*router.weights, router.bias)))
        assert router.probability({"x": 3.0}) > 0.5


def test_bad_fits_are_refused():
    with pytest.raises(ValueError, match="right must have a value"):
        fit_router([{"x": 1.0}], [])
    with pytest.raises(ValueError, match="same names"):
        fit_router([{"x": 1.0}, {"y": 1.0}], [True, False])
    with pytest.raises(ValueError, match="finite"):
        fit_router([{"x": math.nan}], [True])
    with pytest.raises(ValueError, match="x is missing"):
        ROUTER.probability({})


def test_features_of_a_prompt():
    features = prompt_features("12 + 7 =\n", 5)
    assert features == {"log_tokens": math.log1p(5), "numbers": 2.0, "digits": 3.0, "lines": 1.0, "operators": 2.0}


@given(st.lists(st.floats(-5, 0), max_size=30), st.integers(1, 5), st.floats(-5, 0))
def test_minima_say_where_any_threshold_aborts(logprobs, window, threshold):
    minima = confidence_minima(logprobs, window)
    cascade = Cascade(small="s", large="l", version="1", confidence_threshold=threshold, window=window)
    ends = range(1, len(logprobs) + 1)
    aborted = next((end for end in ends if cascade.doubts(confidence_minima(logprobs[:end], window))), None)
    assert first_below(minima, threshold) == aborted
    if len(logprobs) >= window:
        assert minima[-1][1] == pytest.approx(Windows().lowest(logprobs, window), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"large": "s"}, "large must be another model"), ({"router_threshold": 0.5}, "router must be given"),
        ({"router_threshold": 2, "router": ROUTER}, "router_threshold"), ({"confidence_threshold": 1}, "confidence_threshold"),
        ({"random_share": -1}, "random_share"), ({"window": 0}, "window"), ({"version": ""}, "version"),
    ],
)  # fmt: skip
def test_bad_policies_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Cascade(**{"small": "s", "large": "l", "version": "1", **options})


def test_the_random_slice_has_its_share_and_is_a_function_of_the_id():
    cascade = Cascade(small="s", large="l", version="1", random_share=0.1)
    chosen = [cascade.in_random_slice(f"request-{i}") for i in range(5000)]
    assert chosen == [cascade.in_random_slice(f"request-{i}") for i in range(5000)]
    assert 0.08 < sum(chosen) / 5000 < 0.12
    assert not any(
        Cascade(small="s", large="l", version="1", random_share=0).in_random_slice(str(i)) for i in range(100)
    )


def test_a_verifier_that_failed_rejects():
    cascade = Cascade(small="s", large="l", version="1", verifier_threshold=0.5)
    assert [cascade.rejects(score) for score in (None, 0.4, 0.5)] == [True, True, False]


def run(cascade: Cascade, seed: int, count: int = 1000) -> tuple[list[DecisionRecord], int, float]:
    """Run a simulated cascade; return its log, its escalations, and the large model's mean outcome."""
    rng = random.Random(seed)
    records, escalations, large_right = [], 0, 0
    for number in range(count):
        request_id, ease = f"{seed}-{number}", rng.gauss(0, 1)
        features = {"x": ease + rng.gauss(0, 1)}
        logprobs = [-abs(rng.gauss(0, math.exp(-ease) / 2)) for _ in range(20)]
        outcomes = {"s": float(rng.random() < 1 / (1 + math.exp(-2 * ease))), "l": float(rng.random() < 0.9)}
        large_right += outcomes["l"]
        both = cascade.in_random_slice(request_id)
        routed = cascade.routes_to_large(features)
        end = first_below(confidence_minima(logprobs, cascade.window), cascade.confidence_threshold)
        reason = "router" if routed else "confidence" if end else "kept"
        escalations += reason != "kept"
        tokens = 20 if both or end is None else end
        minima = () if routed and not both else tuple(confidence_minima(logprobs[:tokens], cascade.window))
        legs = (
            [] if routed and not both else [Leg(model="s", tokens=tokens, complete=both or not end, cost=float(tokens))]
        )
        legs += [Leg(model="l", tokens=20, complete=True, cost=200.0)] if both or reason != "kept" else []
        known = {leg.model: outcomes[leg.model] for leg in legs if leg.complete}
        record = DecisionRecord(
            request_id=request_id, policy_version="1", candidates=("s", "l"), thresholds=cascade.thresholds, minima=minima,
            scores={"router": cascade.router.probability(features), "confidence": minima[-1][1] if minima else None},
            chosen="s" if reason == "kept" else "l", reason=reason, legs=tuple(legs), outcomes=known, in_random_slice=both,
            propensity=cascade.random_share,
        )  # fmt: skip
        records.append(record)
    return records, escalations, large_right / count


def policy(router: float, confidence: float, share: float = 0.15) -> Cascade:
    return Cascade(
        small="s", large="l", version="1", router=ROUTER, router_threshold=router, confidence_threshold=confidence,
        random_share=share,
    )  # fmt: skip


def test_the_logs_own_thresholds_are_replayed_exactly():
    records, escalations, _ = run(policy(0.2, -1.0), seed=1)
    assert [reason_at(record, record.thresholds) for record in records] == [record.reason for record in records]
    evaluation = evaluate_thresholds(records)
    assert evaluation.is_exact
    assert evaluation.escalated.value == escalations / len(records)


def test_records_are_lines_of_json():
    records, _, _ = run(policy(0.2, -1.0), seed=1, count=50)
    assert [record_from_json(record.to_json()) for record in records] == records


@pytest.mark.parametrize(("router", "confidence"), [(0.4, -1.0), (0.2, -0.6), (0.5, -0.9)])
def test_higher_thresholds_are_known_from_the_log(router, confidence):
    records, _, _ = run(policy(0.2, -1.0), seed=1, count=1000)
    _, escalations, _ = run(policy(router, confidence), seed=1, count=1000)
    evaluation = evaluate_thresholds(records, {"router": router, "confidence": confidence})
    assert evaluation.is_exact
    assert evaluation.escalated.value == escalations / len(records)


def test_intervals_hold_where_the_slice_is_most_of_the_log():
    """The share is that of the log's own requests, of which the few outside the slice vary, too."""
    inside = 0
    for seed in range(40):
        records, _, _ = run(policy(0.2, -1.0, share=0.8), seed=seed, count=400)
        _, escalations, _ = run(policy(0.2, -2.0), seed=seed, count=400)
        found = evaluate_thresholds(records, {"confidence": -2.0}).escalated
        inside += found.low <= escalations / len(records) <= found.high
    assert inside >= 34, "of 40 intervals of 95 %"


@pytest.mark.parametrize(("router", "confidence"), [(0.2, -2.5), (0.05, -2.0)])
def test_lower_thresholds_are_estimated_without_bias(router, confidence):
    """Over eight logs of 700 requests the estimates are right to 2 points in the mean, and nearly all intervals hold."""
    errors, costs, inside = [], [], 0
    for seed in range(8):
        records, _, _ = run(policy(0.2, -1.0), seed=seed, count=700)
        _, escalations, _ = run(policy(router, confidence), seed=seed, count=700)
        truth = escalations / len(records)
        evaluation = evaluate_thresholds(records, {"router": router, "confidence": confidence})
        assert not evaluation.is_exact
        errors.append(evaluation.escalated.value - truth)
        inside += evaluation.escalated.low <= truth <= evaluation.escalated.high
        # Quality and cost against a run in which every request is in the slice, and so is known.
        known = evaluate_thresholds(run(policy(router, confidence, share=1.0), seed=seed, count=700)[0])
        inside += evaluation.quality.low <= known.quality.value <= evaluation.quality.high
        costs.append(evaluation.cost / known.cost)
    assert abs(sum(errors)) / 8 < 0.02
    assert inside >= 13, "of 16 intervals of 95 %"
    assert sum(costs) / 8 == pytest.approx(1.0, abs=0.1)


def test_always_escalating_has_the_large_models_quality_and_cost():
    records, _, large = run(policy(0.2, -1.0, share=1.0), seed=2)
    evaluation = evaluate_thresholds(records, {"router": 1.0})
    assert evaluation.escalated.value == 1.0
    assert evaluation.quality.value == pytest.approx(large)
    assert evaluation.cost == 200.0


def test_a_log_without_a_random_slice_says_what_it_cannot_tell():
    records, _, _ = run(policy(0.2, -1.0, share=0.0), seed=1, count=200)
    assert evaluate_thresholds(records, {"confidence": -0.5}).quality is None
    with pytest.raises(ValueError, match="random slice"):
        evaluate_thresholds(records, {"confidence": -3.0})
    with pytest.raises(ValueError, match="empty"):
        evaluate_thresholds([])
    with pytest.raises(ValueError, match="router, confidence, verifier, got length"):
        evaluate_thresholds(records, {"length": 1.0})


@pytest.mark.parametrize("line", ["", "5", "{}", '{"legs": [{}]}'])
def test_lines_that_are_no_records_are_refused(line):
    with pytest.raises(ValueError, match="no decision record"):
        record_from_json(line)
