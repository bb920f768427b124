"""Exact verifiers of the demo model's task: functions that a strategy's `verifier` may be.

They score candidates by `prompt`, `text` and `complete` (`expertwire.strategies.verifiers.Candidate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from expertwire.deploy.demo_task import check, first_wrong_step, read_problem


class Text(Protocol):
    """The part of a candidate that the verifiers read."""

    @property
    def prompt(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def complete(self) -> bool: ...


def outcome(candidates: Sequence[Text], /) -> list[float]:
    """Return 1.0 for each text that solves its problem, 0.0 for the others.

    Raises:
        ValueError: a prompt is not one of the task.
    """
    return [float(check(read_problem(each.prompt), each.text)) for each in candidates]


def process(candidates: Sequence[Text], /) -> list[float]:
    """Return 1.0 for each text without a wrong step, which must also solve the problem where it is complete; else 0.0.

    Raises:
        ValueError: a prompt is not one of the task.
    """
    return [_process(each) for each in candidates]


def _process(candidate: Text) -> float:
    problem = read_problem(candidate.prompt)
    right = first_wrong_step(problem, candidate.text) is None
    return float(right and (not candidate.complete or check(problem, candidate.text)))
