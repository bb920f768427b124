"""Checks of options: each raises a ValueError that names the field, the values it allows and the one given."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection


def require_integer(field: str, value: object, *, minimum: int, maximum: int | None = None) -> None:
    """Raise a ValueError unless the value is an integer in a range; both ends belong to it."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):  # type: ignore[operator]
        allowed = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{field} must be an integer {allowed}, got {value!r}")


def require_number(
    field: str, value: object, *, above: float | None = None, minimum: float | None = None, maximum: float | None = None
) -> None:
    """Raise a ValueError unless the value is a finite number in a range; `minimum` and `maximum` belong to it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    bounds = [(">", above), (">=", minimum), ("<=", maximum)]
    allowed = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
    if is_number:
        assert isinstance(value, int | float)
        is_number = (
            (above is None or value > above)
            and (minimum is None or value >= minimum)
            and (maximum is None or value <= maximum)
        )
    if not is_number:
        raise ValueError(f"{field} must be a finite number {allowed}".rstrip() + f", got {value!r}")


def require_one_of(field: str, value: object, allowed: Collection[str]) -> None:
    """Raise a ValueError unless the value is one of these strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{field} must be one of {', '.join(repr(name) for name in allowed)}, got {value!r}")


def require_string(field: str, value: object, *, empty: bool = False) -> None:
    """Raise a ValueError unless the value is a string, and unless it may be empty, one with characters."""
    if not isinstance(value, str) or not (value or empty):
        raise ValueError(f"{field} must be a string{'' if empty else ' that is not empty'}, got {value!r}")


def require_callable(field: str, value: Callable[..., object] | None, *, why: str) -> None:
    """Raise a ValueError unless the value can be called; `why` says what needs it."""
    if not callable(value):
        raise ValueError(f"{field} must be given ({why}), got {value!r}")
