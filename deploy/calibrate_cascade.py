"""`expertwire calibrate cascade`: a cascade's router and thresholds, from a decision log in which both models answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from expertwire.deploy.replay import shown
from expertwire.strategies.calibrate_cascade import calibrate_cascade
from expertwire.strategies.cascade_policy import cascade_to_json, read_cascade
from expertwire.strategies.decision_log import read_records


def lines(log: str, policy: str, out: str, *, shortfall: float, seed: int) -> Iterator[str]:
    """Write a policy, and return the lines of a report on it.

    Args:
        log: file of decision records.
        policy: file of the policy that they were made with.
        out: file for the new policy.
        shortfall, seed: as for `calibrate_cascade`.

    Raises:
        ValueError: names what is wrong and what is allowed.
    """
    base = read_cascade(policy)
    found = calibrate_cascade(read_records(log)[0], base, shortfall=shortfall, seed=seed)
    Path(out).write_text(cascade_to_json(found.cascade) + "\n")
    thresholds = ", ".join(f"{name} {value:.4g}" for name, value in found.cascade.thresholds.items()) or "none"
    yield f"policy version {found.cascade.version} written to {out}; thresholds: {thresholds}"
    yield f"on {found.num_requests} other requests than it was chosen on:"
    evaluation = found.evaluation
    assert evaluation.quality is not None, "every request has outcomes"
    yield f"  quality {shown(evaluation.quality)}; of {base.large} alone {shown(found.large_quality)}"
    yield f"  cost of a request {evaluation.cost:.6g}; of {base.large} alone {found.large_cost:.6g}"
    yield f"  escalated {shown(evaluation.escalated)}"
