"""The number of examples of randomised tests: few and the same in every run, or many and new ones."""

from typing import Any

from hypothesis import settings

RANDOM_TIMES = 20  # as many examples in `make test-random`


def examples(number: int, **options: Any) -> settings:
    """Return hypothesis's settings of a test that tries so many examples in `make test`."""
    return settings(max_examples=number if settings.default.derandomize else RANDOM_TIMES * number, **options)
