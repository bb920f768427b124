"""`expertwire replay`: what a cascade's thresholds did, or other ones would have done, from its decision log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from expertwire.strategies.cascade import MECHANISMS
from expertwire.strategies.cascade_log import DecisionRecord, Evaluation, evaluate_thresholds, reason_at
from expertwire.strategies.decision_log import read_records
from expertwire.strategies.statistics import Interval


def thresholds_of(texts: Sequence[str]) -> dict[str, float]:
    """Return the thresholds that a command line says, by mechanism.

    Args:
        texts: each "MECHANISM=X", or "X" alone, which is the threshold of confidence.

    Raises:
        ValueError: one is neither.
    """
    thresholds: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        name = name if equals else "confidence"
        try:
            number = float(value)
        except ValueError:
            number = None
        if name not in MECHANISMS or number is None or number != number:
            raise ValueError(f"threshold must be X or MECHANISM=X with one of {', '.join(MECHANISMS)}, got {text!r}")
        thresholds[name] = number
    return thresholds


def lines(path: str, changed: Mapping[str, float]) -> Iterator[str]:
    """Return the lines of the report on a log: what its own thresholds did, and what the changed ones would do.

    Raises:
        ValueError: the log cannot be read, or cannot tell.
    """
    records, num_wrong = read_records(path)
    versions = sorted({record.policy_version for record in records})
    yield f"{len(records)} requests of the policy version{'s' * (len(versions) > 1)} {', '.join(versions)}"
    if num_wrong:
        yield f"{num_wrong} lines are no records and were left out"
    yield from _own(records)
    if changed:
        yield f"with {', '.join(f'{name} {value:g}' for name, value in changed.items())}:"
        yield from _told(evaluate_thresholds(records, changed))


def _own(records: Sequence[DecisionRecord]) -> Iterator[str]:
    reasons = [record.reason for record in records]
    counts = ", ".join(f"{name} {reasons.count(name)}" for name in ("kept", *MECHANISMS))
    different = sum(reason_at(record, record.thresholds) != record.reason for record in records)
    same = "the replay decides the same" if not different else f"THE REPLAY DECIDES {different} OTHERWISE"
    yield f"by the log's own thresholds: {counts}; {same}"
    yield from _told(evaluate_thresholds(records))


def _told(evaluation: Evaluation) -> Iterator[str]:
    how = "counted" if evaluation.is_exact else f"estimated from {evaluation.num_random} requests of the random slice"
    yield f"  escalated {shown(evaluation.escalated)} ({how})"
    if evaluation.quality is not None:
        yield f"  quality {shown(evaluation.quality)} (estimated from the random slice)"
    if evaluation.cost is not None:
        yield f"  cost of a request {evaluation.cost:.6g} (estimated from the random slice)"


def shown(interval: Interval) -> str:
    """Return the text of an estimate with its interval."""
    if interval.low == interval.high:
        return f"{interval.value:.4f}"
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
