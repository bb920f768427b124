"""JSON files of a checkpoint, whose fields are checked as they are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expertwire.scheduler.checks import is_int, is_number

REQUIRED: Any = object()
MAX_INTEGER = 2**31 - 1  # more of anything is a mistake


class Fields:
    """An object of a JSON file.

    Args:
        file: named in errors.
        values: the object; None: the whole file.
        path: of the object in the file, such as "text_config.".

    Raises:
        ValueError: there is no such file or it holds no object; so do the methods of a field that is missing or wrong.
    """

    def __init__(self, file: Path, values: dict[str, Any] | None = None, path: str = "") -> None:
        self.file, self.path = file, path
        self._values = read_json(file) if values is None else values

    def get(self, name: str) -> Any:
        """The value, or None if the field is missing."""
        return self._values.get(name)

    def first(self, *names: str) -> str:
        """The first of the names that has a value; the first of all if none has."""
        return next((name for name in names if self._values.get(name) is not None), names[0])

    def inner(self, name: str) -> Fields:
        """The object that field `name` is; an empty one where it is missing."""
        values = self.get(name)
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{self.file}: {self.path}{name} must be an object or null, got {values!r}")
        return Fields(self.file, values or {}, f"{self.path}{name}.")

    def integer(self, name: str, *, low: int = 1, high: int = MAX_INTEGER, default: Any = REQUIRED) -> Any:
        value = self._take(name, default)
        if value is default:
            return value
        if not is_int(value) or value < low:
            raise ValueError(f"{self.file}: {self.path}{name} must be an integer >= {low}, got {value!r}")
        if value > high:
            raise ValueError(f"{self.file}: {self.path}{name} must be at most {high}, got {value!r}")
        return value

    def number(self, name: str, *, low: float | None = None, default: Any = REQUIRED) -> Any:
        """A finite float > 0, or >= `low`."""
        value = self._take(name, default)
        if value is default:
            return value
        if not is_number(value) or (value <= 0 if low is None else value < low):
            bound = "> 0" if low is None else f">= {low:g}"
            raise ValueError(f"{self.file}: {self.path}{name} must be a number {bound}, got {value!r}")
        return float(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of so many floats > 0."""
        values = self._take(name, REQUIRED)
        if not isinstance(values, list) or not all(is_number(value) and value > 0 for value in values):
            raise ValueError(f"{self.file}: {self.path}{name} must be a list of numbers > 0, got {values!r}")
        if len(values) != length:
            raise ValueError(f"{self.file}: {self.path}{name} must be a list of {length} numbers, got {len(values)}")
        return tuple(map(float, values))

    def flag(self, name: str, *, default: Any = REQUIRED) -> bool:
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.file}: {self.path}{name} must be true or false, got {value!r}")
        return value

    def one_of(self, name: str, *allowed: Any, default: Any = REQUIRED) -> Any:
        value = self._take(name, default)
        if value not in allowed:
            raise ValueError(f"{self.file}: {self.path}{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
        return value

    def listed(self, name: str, length: int, *allowed: str) -> list[str] | None:
        """A list of so many of the allowed values, or None if the field is missing."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length or any(entry not in allowed for entry in value):
            raise ValueError(
                f"{self.file}: {self.path}{name} must be a list of {length} values out of {', '.join(allowed)}, got {value!r}"
            )
        return value

    def layers(self, name: str, num_layers: int) -> list[int] | None:
        """A list of layers, or None if the field is missing."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(is_int(i) and 0 <= i < num_layers for i in value):
            raise ValueError(
                f"{self.file}: {self.path}{name} must be a list of layers below {num_layers}, got {value!r}"
            )
        return value

    def _take(self, name: str, default: Any) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            raise ValueError(f"{self.file}: the field {self.path + name!r} is missing")
        return default


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a checkpoint."""
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; a Hugging Face checkpoint has one")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """An object; `source` is named in errors."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(values).__name__}")
    return values
