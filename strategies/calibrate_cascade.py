"""Calibration of a cascade from a decision log: chosen on one fold of requests, reported on the other."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expertwire.strategies.cascade import Cascade, Router, fit_router
from expertwire.strategies.cascade_log import DecisionRecord, Evaluation, cost_at, evaluate_thresholds
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
    The verifier's threshold is chosen with them if `base` has one. What the verifier itself costs is not counted.

    Args:
        records: of a log of `base`, for instance with a random share of 1.
        base: gives names, window, costs, random share and verifier.
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
    if base.verifier_threshold is not None and any("verifier" not in record.scores for record in known):
        raise ValueError("records must have the verifier's scores, as the policy has a verifier_threshold")
    chosen_on = folds[0]
    router = fit_router(
        [each.features or {} for each in chosen_on], [_outcome(r, base.small) >= 0.5 for r in chosen_on]
    )
    chosen_on, report_on = (_rescored(fold, router, verifies=base.verifier_threshold is not None) for fold in folds)
    chosen = _choose(chosen_on, shortfall)
    cascade = replace(
        base,
        router=router,
        router_threshold=chosen.get("router"),
        confidence_threshold=chosen.get("confidence"),
        verifier_threshold=chosen.get("verifier"),
    )
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


def _rescored(records: Sequence[DecisionRecord], router: Router, *, verifies: bool) -> list[DecisionRecord]:
    """Return records as if nothing had escalated, with the new router's scores. Each counts as one request.

    A verifier that failed has the lowest of all scores: such requests go to the large model.
    """
    found = []
    for record in records:
        scores: dict[str, float | None] = {"router": router.probability(record.features or {})}
        if verifies:
            score = record.scores["verifier"]
            scores["verifier"] = -math.inf if score is None else score
        found.append(replace(record, thresholds={}, propensity=1.0, scores=scores))
    return found


def _choose(records: Sequence[DecisionRecord], shortfall: float) -> dict[str, float]:
    """Return the thresholds with the lowest cost among those of enough quality: as `evaluate_thresholds` of each, at once."""
    small, large = records[0].candidates
    right, large_right = (np.array([_outcome(record, model) for record in records]) for model in (small, large))
    route_scores = np.array([record.scores["router"] for record in records], float)
    verifier_scores = np.array([record.scores.get("verifier", math.inf) for record in records], float)
    lowest = np.array([min((value for _, value in record.minima), default=math.inf) for record in records])
    whole, alone = (np.array([cost_at(record, reason, {}) for record in records]) for reason in ("kept", "router"))
    found: list[tuple[float, dict[str, float]]] = []
    for doubt in (-math.inf, *(value for value in _thresholds(lowest) if value <= 0), 0.0):
        doubted = lowest < doubt
        aborted = np.array([
            cost_at(record, "confidence", {"confidence": doubt}) if doubts else 0.0
            for record, doubts in zip(records, doubted.tolist(), strict=True)
        ])  # fmt: skip
        for verify in (-math.inf, *_thresholds(verifier_scores)):
            rejected = doubted | (verifier_scores < verify)
            cost = np.where(doubted, aborted, whole + np.where(rejected, alone, 0.0))
            for route in (-math.inf, *_thresholds(route_scores), 1.0):
                routed = route_scores < route
                quality = np.where(routed | rejected, large_right, right).mean()
                if quality >= large_right.mean() - shortfall - 1e-12:
                    thresholds = {"router": route, "confidence": doubt, "verifier": verify}
                    is_on = {name: value for name, value in thresholds.items() if value > -math.inf}
                    found.append((float(np.where(routed, alone, cost).mean()), is_on))
    # The last thresholds send everything to the large model, but where the small one is sure without a doubt.
    return min(found, key=lambda each: each[0], default=(0.0, {"router": 1.0, "confidence": 0.0}))[1]


def _thresholds(scores: np.ndarray) -> list[float]:
    scores = scores[np.isfinite(scores)]
    return sorted(set(np.quantile(scores, _QUANTILES).tolist())) if len(scores) else []
