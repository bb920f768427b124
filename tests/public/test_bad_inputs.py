"""Bad inputs are refused at once, by an error that names what is wrong and what is allowed; docs/errors.md shows them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from helpers.slow import slow_but

from expertwire.bench.bad_inputs.cases import Case, cases
from expertwire.bench.bad_inputs.environment import Environment
from expertwire.bench.bad_inputs.run import Answer, page, try_case
from expertwire.engine import process

CASES = cases()
ERRORS = Path(__file__).parents[2] / "docs" / "errors.md"


@pytest.fixture(scope="module")
def found() -> Iterator[Callable[[Case], Answer]]:
    """Return a function that tries a case, each only once, and returns the answer."""
    process.start_call("time:sleep", 0).wait()  # with the first child starts the process that forks, which stays
    before = psutil.Process().children(recursive=True)
    answers: dict[int, Answer] = {}
    with Environment() as env:

        def find(case: Case) -> Answer:
            if id(case) not in answers:
                answers[id(case)] = try_case(case, env)
            return answers[id(case)]

        yield find
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert not left


STARTING = [case for case in CASES if case.starts_processes]  # the engine, which takes seconds
QUICK = [case for case in CASES if case not in STARTING[1:]]


@pytest.mark.parametrize("case", slow_but(QUICK, CASES), ids=lambda case: f"{case.area}: {case.description}")
def test_is_refused(found, case):
    assert not found(case).complaints, found(case)


@pytest.mark.slow
def test_the_page_is_up_to_date(found):
    assert ERRORS.read_text() == page([(case, found(case)) for case in CASES]), (
        "write docs/errors.md again: python -m expertwire.bench.bad_inputs.run > docs/errors.md"
    )
