"""The marker `slow`, given to all values of a parameter but the representatives that `make test` runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(kept: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return the values for `pytest.mark.parametrize`, marked `slow` unless they are among those kept."""
    kept, values = list(kept), list(values)
    unknown = [value for value in kept if value not in values]
    assert not unknown, f"no such representatives: {unknown}"
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values]
