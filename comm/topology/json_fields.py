"""Reading of JSON files with checks whose errors name the field."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_file(option: str, path: str, parse: Callable[[Any], T], allowed: str = "") -> T:
    """Return what `parse` makes of a JSON file.

    Args:
        option: names the file in errors.
        allowed: what the option takes besides a file.

    Raises:
        ValueError: the file cannot be read, or `parse` refuses it.
    """
    try:
        return parse(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{option} must be a readable file{allowed}, got {path!r}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} {path!r} is not JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{option} {path!r}: {error}") from None


def check_fields(what: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> None:
    """Raise ValueError unless the value is an object with the required fields and no others but the optional ones."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be an object with {', '.join(sorted(required or optional))}, got {value!r}")
    if missing := set(required) - value.keys():
        raise ValueError(f"{what} must have {', '.join(sorted(missing))}")
    if unknown := value.keys() - {*required, *optional}:
        raise ValueError(f"{what} has {min(unknown)!r}; allowed are {', '.join(sorted({*required, *optional}))}")


def list_of(what: str, value: Any) -> list[Any]:
    """Return the value; raise ValueError unless it is a list with at least one entry."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} must be a list with at least one entry, got {value!r}")
    return value


def text_of(what: str, value: Any) -> str:
    """Return the value; raise ValueError unless it is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a text that is not empty, got {value!r}")
    return value


def positive_int(what: str, value: Any) -> int:
    """Return the value; raise ValueError unless it is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be an integer >= 1, got {value!r}")
    return value
