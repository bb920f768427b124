"""`expertwire replay`: the report on a decision log."""

from __future__ import annotations

import pytest

from expertwire.deploy.cli import main
from expertwire.strategies.cascade_log import DecisionRecord, Leg


def record(number: int, minimum: float, *, in_slice: bool = False) -> DecisionRecord:
    """A request of a cascade that aborts the small model below -1."""
    aborted = minimum < -1
    legs = [Leg(model="s", tokens=5 if aborted and not in_slice else 10, complete=in_slice or not aborted, cost=1.0)]
    legs += [Leg(model="l", tokens=10, complete=True, cost=9.0)] if aborted or in_slice else []
    return DecisionRecord(
        request_id=str(number), policy_version="7", candidates=("s", "l"), scores={"confidence": minimum},
        thresholds={"confidence": -1.0}, chosen="l" if aborted else "s", reason="confidence" if aborted else "kept",
        legs=tuple(legs), minima=((5, minimum),), outcomes={"s": float(not aborted), "l": 1.0} if in_slice else None,
        in_random_slice=in_slice, propensity=0.5,
    )  # fmt: skip


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log"
    records = [record(i, minimum) for i, minimum in enumerate((-0.1, -0.2, -0.3, -3.0))]
    records += [record(10, -0.1, in_slice=True), record(11, -1.5, in_slice=True)]
    path.write_text("".join(each.to_json() + "\n" for each in records) + '{"torn')
    return str(path)


def test_the_logs_own_thresholds(log, capsys):
    assert main(["replay", log]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "6 requests of the policy version 7",
        "1 lines are no records and were left out",
        "by the log's own thresholds: kept 4, router 0, confidence 2, verifier 0; the replay decides the same",
        "  escalated 0.3333 (counted)",
        "  quality 1.0000 [0.3424, 1.0000] (estimated from the random slice)",
        "  cost of a request 5.25 (estimated from the random slice)",
    ]


def test_other_thresholds_are_counted_or_estimated(log, capsys):
    assert main(["replay", log, "--threshold", "-0.25"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:-2] == ["with confidence -0.25:", "  escalated 0.5000 (counted)"]
    assert main(["replay", log, "--threshold", "confidence=-4"]) == 0
    assert "estimated from 2 requests of the random slice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "length=1"], "X or MECHANISM=X with one of router, confidence, verifier, got 'length=1'"),
        (["--threshold", "much"], "got 'much'"),
        (["--threshold", "nan"], "got 'nan'"),
    ],
)  # fmt: skip
def test_mistakes_have_messages(log, capsys, arguments, message):
    assert main(["replay", log, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_logs_have_messages(tmp_path, capsys):
    assert main(["replay", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").write_text("")
    assert main(["replay", str(tmp_path / "empty")]) == 2
    errors = capsys.readouterr().err
    assert "cannot be read: No such file or directory" in errors
    assert "must have at least one record; it is empty" in errors
