"""Calibration of a cascade from a decision log: chosen on one fold of requests, reported on the other."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertwire.strategies.cascade import Cascade, fit_router
from expertwire.strategies.cascade_log import DecisionRecord, Evaluation, evaluate_thresholds
from expertwire.strategies.checks import require_number
from expertwire.strategies.statistics import Interval, wilson

MIN_REQUESTS = 20  # of a fold
_QUANTILES = np.linspace(0.0, 0.95, 20)


@dataclass(frozen=True, kw_only=True)
class CascadeCalibration:
    """A policy, and how it did on requests on which it was not chosen.

    Attributes:
        cascade: the policy.
        evaluation: of it, on the fold of the report.
        large_quality: of the large model alone, on the same requests.
        large_cost: of a request of the large model alone.
        num_requests: in the fold of the report.
    """

    cascade: Cascade
    evaluation: Evaluation
    large_quality: Interval
    large_cost: float
    num_requests: int


def calibrate_cascade(
    records: Sequence[DecisionRecord], base: Cascade, *, shortfall: float = 0.0, seed: int = 0
) -> CascadeCalibration:
    """Return the cheapest policy within `shortfall` of the large model's quality.

    Requests of the random slice with an outcome of both models are divided into two folds by a hash of their ids. On the first
    one the router is fitted, and thresholds of router and confidence are chosen among quantiles; all figures are of the second.

    Args:
        records: of a log of `base`, for instance with a random share of 1.
        base: gives names, window, costs and random share.
        shortfall: quality that may be lost.
        seed: of the folds.

    Raises:
        ValueError: names the argument and what it allows.
    """
    require_number("shortfall", shortfall, minimum=0, maximum=1)
    models = {base.small, base.large}
    if any(set(record.candidates) != models for record in records):
        raise ValueError(f"records must be of the policy's models {base.small} and {base.large}")
    known = [each for each in records if each.in_random_slice and each.features and models <= set(each.outcomes or ())]
    folds = [[each for each in known if _fold(each.request_id, seed) is second] for second in (False, True)]
    if min(map(len, folds)) < MIN_REQUESTS:
        raise ValueError(
            f"records must have at least {MIN_REQUESTS} requests of the random slice with outcomes of both models in each of two "
            f"folds, got {len(folds[0])} and {len(folds[1])} of {len(records)}"
        )
    chosen_on = folds[0]
    router = fit_router(
        [each.features or {} for each in chosen_on], [_outcome(r, base.small) >= 0.5 for r in chosen_on]
    )
    cascade = replace(base, router=router, router_threshold=None, confidence_threshold=None, verifier_threshold=None)
    chosen_on, report_on = (_rescored(fold, cascade) for fold in folds)
    router_threshold, confidence_threshold = _choose(chosen_on, base.large, shortfall)
    cascade = replace(cascade, router_threshold=router_threshold, confidence_threshold=confidence_threshold)
    digest = hashlib.sha256(repr(dataclasses.astuple(cascade)).encode()).hexdigest()[:12]
    outcomes = [_outcome(record, base.large) for record in report_on]
    return CascadeCalibration(
        cascade=replace(cascade, version=digest),
        evaluation=evaluate_thresholds(report_on, cascade.thresholds),
        large_quality=wilson(sum(outcomes) / len(outcomes), len(outcomes)),
        large_cost=sum(leg.cost for r in report_on for leg in r.legs if leg.model == base.large) / len(report_on),
        num_requests=len(report_on),
    )


def _fold(request_id: str, seed: int) -> bool:
    return bool(hashlib.sha256(f"{seed}\0{request_id}".encode()).digest()[0] & 1)


def _outcome(record: DecisionRecord, model: str) -> float:
    assert record.outcomes is not None, record
    return record.outcomes[model]


def _rescored(records: Sequence[DecisionRecord], cascade: Cascade) -> list[DecisionRecord]:
    """Return records as if nothing had escalated, with the new router's scores. Each counts as one request."""
    assert cascade.router is not None, cascade
    router = cascade.router
    return [
        replace(each, thresholds={}, propensity=1.0, scores={"router": router.probability(each.features or {})})
        for each in records
    ]


def _choose(records: Sequence[DecisionRecord], large: str, shortfall: float) -> tuple[float | None, float | None]:
    """Return the thresholds of router and confidence with the lowest cost among those of enough quality; None: off."""
    target = sum(_outcome(record, large) for record in records) / len(records) - shortfall
    lowest = [min((value for _, value in record.minima), default=0.0) for record in records]
    routes = [None, *_thresholds([record.scores["router"] or 0.0 for record in records]), 1.0]
    doubts = [None, *(value for value in _thresholds(lowest) if value <= 0), 0.0]
    found: list[tuple[float, float | None, float | None]] = []
    for route in routes:
        for doubt in doubts:
            changed = {name: v for name, v in (("router", route), ("confidence", doubt)) if v is not None}
            evaluation = evaluate_thresholds(records, changed)
            assert evaluation.quality is not None, "every record has outcomes"
            assert evaluation.cost is not None, "every record is in the slice"
            if evaluation.quality.value >= target - 1e-12:
                found.append((evaluation.cost, route, doubt))
    # The last thresholds send everything to the large model, but where the small one is sure without a doubt.
    _, route, doubt = min(found, key=lambda each: each[0], default=(0.0, 1.0, 0.0))
    return route, doubt


def _thresholds(scores: Sequence[float]) -> list[float]:
    return sorted(set(np.quantile(scores, _QUANTILES).tolist()))
