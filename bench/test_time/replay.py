"""The cascade's log: written as a server writes it, replayed, and asked about other thresholds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from expertwire.bench.test_time.cascade import Legs, run
from expertwire.strategies.cascade import Cascade, first_below
from expertwire.strategies.cascade_log import DecisionRecord, Leg, evaluate_thresholds, reason_at, record_from_json

WINDOW, SIGNAL = 4, "window of 4"


def write_log(legs: Legs, cascade: Cascade) -> list[DecisionRecord]:
    """Return the records of the cascade with abort on every problem, through their lines of JSON."""
    assert cascade.window == WINDOW, cascade
    assert cascade.confidence_threshold is not None, cascade
    records = []
    for i, signal in enumerate(legs.signals[SIGNAL]):
        lowest = np.minimum.accumulate(signal)
        new = np.flatnonzero(np.isfinite(signal) & (signal < np.concatenate(([np.inf], lowest[:-1]))))
        minima = [(int(at) + 1, float(signal[at])) for at in new]
        end, both = first_below(minima, cascade.confidence_threshold), cascade.in_random_slice(f"problem-{i}")
        tokens = int(legs.small[i]) if end is None or both else end
        small = Leg(model=cascade.small, tokens=tokens, complete=end is None or both, cost=legs.ratio * tokens)
        large = Leg(model=cascade.large, tokens=int(legs.large[i]), complete=True, cost=float(legs.large[i]))
        seen = tuple(pair for pair in minima if pair[0] <= tokens)
        record = DecisionRecord(
            request_id=f"problem-{i}",
            policy_version=cascade.version,
            candidates=(cascade.small, cascade.large),
            scores={"confidence": seen[-1][1] if seen else None},
            thresholds=cascade.thresholds,
            chosen=cascade.small if end is None else cascade.large,
            reason="kept" if end is None else "confidence",
            legs=(small, large) if both or end is not None else (small,),
            minima=seen,
            in_random_slice=both,
            propensity=cascade.random_share,
        )
        records.append(record_from_json(record.to_json()))
    return records


def check(legs: Legs, threshold: float, others: tuple[float, ...], *, share: float, slices: int) -> dict[str, Any]:
    """Return whether the log's replay escalates what the run did, and the shares it predicts beside those of other runs.

    Args:
        legs: both tiers' answers.
        threshold: of the run.
        others: thresholds to predict; higher ones are known from the log, lower ones estimated from its random slice.
        share: of the random slice.
        slices: how many random slices are drawn, one a version of the policy. Errors are over all, the prediction is the first's.
    """
    policy = Cascade(
        small="small", large="large", version="1", confidence_threshold=threshold, window=WINDOW, random_share=share
    )
    logs = [write_log(legs, replace(policy, version=str(1 + number))) for number in range(slices)]
    nobody = np.zeros(len(logs[0]), bool)

    def escalated(at: float) -> Any:
        return run(legs, direct=nobody, signal=SIGNAL, threshold=at, abort=True).escalated

    replayed = np.array([[reason_at(record, record.thresholds) != "kept" for record in records] for records in logs])
    predictions = []
    for at in others:
        found, true = (
            [evaluate_thresholds(records, {"confidence": at}) for records in logs],
            float(escalated(at).mean()),
        )
        shares = np.array([[each.escalated.value, each.escalated.low, each.escalated.high] for each in found])
        errors = shares[:, 0] - true
        predictions.append(
            {
                "threshold": at,
                "predicted": round(float(shares[0, 0]), 4),
                "interval": np.round(shares[0, 1:], 4).tolist(),
                "true": round(true, 4),
                "exact": found[0].is_exact,
                "root_mean_square_error": round(float(np.sqrt((errors**2).mean())), 4),
                "largest_error": round(float(np.abs(errors).max()), 4),
                "intervals_with_the_true_share": round(
                    float(((shares[:, 1] <= true + 1e-9) & (true - 1e-9 <= shares[:, 2])).mean()), 4
                ),
            }
        )
    return {
        "threshold": threshold,
        "random_share": share,
        "slices": slices,
        "escalated": round(float(replayed[0].mean()), 4),
        "replay_equals_run": bool((replayed == escalated(threshold)).all()),
        "predictions": predictions,
    }
