"""What counts as a number in an option: no bool, though Python takes it for one."""

from __future__ import annotations

import sys
from typing import TypeGuard


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a float can hold: finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
