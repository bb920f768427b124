"""The decision records of a cascade, and the evaluation of other thresholds from them.

A record is one JSON object a line. Where the log alone cannot tell (the small model was aborted before it could fall below a
lower threshold; the large one never ran), the estimate comes from the random slice, in which both models ran to their ends, each
record weighted by the inverse of the probability with which it came there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from expertwire.strategies.cascade import MECHANISMS, first_below
from expertwire.strategies.statistics import Interval, wilson


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One model's part in a request.

    Attributes:
        model: its name.
        tokens: output tokens it computed.
        complete: whether it ran to its end.
        prompt_tokens: tokens of the prompt.
        draft_tokens: of the other model's output that it was given to start from.
        accepted_tokens: those of them that its output begins with.
        cost: of the leg, in units of the log's writer, in proportion to its tokens, those of the prompt and of the draft.
        latency_s: seconds.
    """

    model: str
    tokens: int
    complete: bool
    prompt_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    cost: float = 0.0
    latency_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DecisionRecord:
    """A request of a cascade: what was known about it, what was decided, and what came of it.

    Attributes:
        request_id: of the request.
        policy_version: of the cascade.
        features: of the prompt.
        bin: of difficulty, if there is one.
        candidates: the small model and the large one.
        scores: by mechanism; None or missing: not known. "confidence" is the lowest one seen.
        thresholds: by mechanism, of those that were on.
        minima: `confidence_minima` of the small model's output.
        chosen: the model whose output the client got.
        reason: the mechanism that escalated, or "kept".
        legs: what was computed, in its order; the large one's is missing if it did not run.
        outcomes: by model, how right its complete output was, from 0 to 1, where a verifier knows it.
        in_random_slice: whether both models ran.
        propensity: probability with which a request comes into the random slice.
        verifier_tokens: tokens that engines computed for its scores.
        draft_tolerance: of the cascade, if the models have one tokenizer; None: the large model starts from the prompt.
        time_s: when it ended, in seconds since 1970; 0: not known.
    """

    request_id: str
    policy_version: str
    candidates: tuple[str, str]
    scores: Mapping[str, float | None]
    thresholds: Mapping[str, float]
    chosen: str
    reason: str
    legs: tuple[Leg, ...]
    features: Mapping[str, float] | None = None
    bin: str | None = None
    minima: tuple[tuple[int, float], ...] = ()
    outcomes: Mapping[str, float] | None = None
    in_random_slice: bool = False
    propensity: float = 0.0
    verifier_tokens: int = 0
    draft_tolerance: float | None = None
    time_s: float = 0.0

    def to_json(self) -> str:
        """Return the record as a line of a log, without its end."""
        return json.dumps(asdict(self), ensure_ascii=False)


def record_from_json(line: str) -> DecisionRecord:
    """Return the record that a line of a log has.

    Raises:
        ValueError: the line is no decision record.
    """
    try:
        values: dict[str, Any] = json.loads(line)
        values["legs"] = tuple(Leg(**leg) for leg in values["legs"])
        values["candidates"] = tuple(values["candidates"])
        values["minima"] = tuple((int(count), float(value)) for count, value in values.get("minima", ()))
        return DecisionRecord(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the line is no decision record: {error}, got {line!r:.200}") from error


def reason_at(record: DecisionRecord, thresholds: Mapping[str, float]) -> str | None:
    """Return the mechanism that escalates a request at these thresholds, or "kept"; None if the record cannot tell."""
    small = next((leg for leg in record.legs if leg.model == record.candidates[0]), None)
    for mechanism in MECHANISMS:
        if mechanism not in thresholds:
            continue
        score, threshold = record.scores.get(mechanism), thresholds[mechanism]
        if mechanism == "confidence":
            score = min((value for _, value in record.minima), default=score)
        if score is not None and score < threshold:
            return mechanism
        # A confidence that was seen up to an abort says nothing about what would have come behind it.
        seen_whole = small is not None and small.complete
        if mechanism == "confidence" and not seen_whole:
            return None
        if mechanism == "verifier" and score is None:
            return (
                "verifier" if seen_whole and mechanism in record.thresholds else None
            )  # it failed, or was never asked
        if mechanism == "router" and score is None:
            return None
    return "kept"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The requests of a log, as they would have gone at some thresholds.

    Attributes:
        escalated: share of the requests that go to the large model.
        is_exact: whether that is counted from the log and not estimated from the random slice.
        quality: mean outcome; None without outcomes in the random slice.
        cost: mean cost of a request; None without a random slice.
        num_records: of the log.
        num_random: of the random slice.
    """

    escalated: Interval
    is_exact: bool
    quality: Interval | None
    cost: float | None
    num_records: int
    num_random: int


def evaluate_thresholds(records: Iterable[DecisionRecord], changed: Mapping[str, float] | None = None) -> Evaluation:
    """Return what other thresholds would have done; without `changed` what the log's own did.

    Args:
        records: of a log.
        changed: thresholds by mechanism; the others are the records' own. Costs and outcomes are those of the random slice,
            whose small legs are counted up to the place where these thresholds would have aborted them.

    Raises:
        ValueError: there are no records, a mechanism is not known, or neither the log nor a random slice can tell.
    """
    records, changed = list(records), changed or {}
    if not records:
        raise ValueError("records must not be empty")
    unknown = sorted(changed.keys() - set(MECHANISMS))
    if unknown:
        raise ValueError(f"thresholds must be of {', '.join(MECHANISMS)}, got {', '.join(unknown)}")
    reasons = [reason_at(record, {**record.thresholds, **changed}) for record in records]
    sliced = [
        (record, reason)
        for record, reason in zip(records, reasons, strict=True)
        if record.in_random_slice and reason is not None
    ]
    is_exact = None not in reasons
    if not is_exact and not sliced:
        raise ValueError("records must have a random slice: the log alone cannot tell what these thresholds would do")
    weights = [1 / record.propensity for record, _ in sliced]
    return Evaluation(
        escalated=_escalated(records, reasons, changed),
        is_exact=is_exact,
        quality=_quality(sliced),
        cost=_mean([cost_at(record, reason, {**record.thresholds, **changed}) for record, reason in sliced], weights),
        num_records=len(records),
        num_random=len(sliced),
    )


def _escalated(
    records: Sequence[DecisionRecord], reasons: Sequence[str | None], changed: Mapping[str, float]
) -> Interval:
    """Return the share that goes to the large model: counted where the log tells, estimated for the others.

    The others are like those of the random slice about which the log would not tell either, had they not been in it. The
    interval is that of the log's own requests, hence as wide as chance makes both the slice and the others.
    """
    known = sum(reason is not None and reason != "kept" for reason in reasons) / len(records)
    unknown = sum(reason is None for reason in reasons) / len(records)
    if not unknown:
        return Interval(known, known, known)
    alike = [
        (float(reason != "kept"), 1 / record.propensity)
        for record, reason in zip(records, reasons, strict=True)
        if record.in_random_slice
        and reason is not None
        and reason_at(_without_slice(record), {**record.thresholds, **changed}) is None
    ]
    if not alike:
        raise ValueError("records must have requests of the random slice like those about which the log cannot tell")
    rest = _weighted([value for value, _ in alike], [weight for _, weight in alike], reasons.count(None))
    return Interval(*(known + unknown * value for value in (rest.value, rest.low, rest.high)))


def _without_slice(record: DecisionRecord) -> DecisionRecord:
    """Return what the log would have of a request of the random slice if its own thresholds had been obeyed."""
    reason = reason_at(record, record.thresholds)
    scores = {name: score for name, score in record.scores.items() if name == "router"}
    small = record.candidates[0]
    if reason == "router":
        legs = tuple(leg for leg in record.legs if leg.model != small)
        return replace(record, legs=legs, minima=(), scores=scores)
    if reason != "confidence":
        return record
    end = first_below(record.minima, record.thresholds["confidence"])
    assert end is not None, record
    legs = tuple(replace(leg, tokens=end, complete=False) if leg.model == small else leg for leg in record.legs)
    return replace(record, legs=legs, minima=tuple(pair for pair in record.minima if pair[0] <= end), scores=scores)


def _quality(sliced: Sequence[tuple[DecisionRecord, str]]) -> Interval | None:
    outcomes, weights = [], []
    for record, reason in sliced:
        model = record.candidates[0 if reason == "kept" else 1]
        if record.outcomes is not None and model in record.outcomes:
            outcomes.append(record.outcomes[model])
            weights.append(1 / record.propensity)
    return _weighted(outcomes, weights) if outcomes else None


def cost_at(record: DecisionRecord, reason: str, thresholds: Mapping[str, float]) -> float:
    """Return the cost of a request of the random slice at these thresholds."""
    legs = {leg.model: leg for leg in record.legs}
    small, large = (legs[model] for model in record.candidates)
    if reason == "router":
        return large.cost
    tokens = first_below(record.minima, thresholds["confidence"]) if reason == "confidence" else small.tokens
    assert tokens is not None, record
    whole = small.prompt_tokens + small.tokens
    part = small.cost * (small.prompt_tokens + tokens) / whole if whole else small.cost
    return part + (large.cost if reason != "kept" else 0.0)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float | None:
    return sum(map(float.__mul__, values, weights)) / sum(weights) if values else None


def _weighted(values: Sequence[float], weights: Sequence[float], num_others: float = math.inf) -> Interval:
    """Return the weighted mean with Wilson's interval for the effective number of records.

    Args:
        num_others: records whose own mean is predicted; infinite for the mean of all that could ever come.
    """
    mean = _mean(values, weights)
    assert mean is not None
    inverse_count = sum(weight**2 for weight in weights) / sum(weights) ** 2
    return wilson(mean, 1 / (inverse_count + 1 / num_others))
