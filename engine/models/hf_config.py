"""JSON files of a checkpoint, whose fields are validated as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertwire.scheduler.config import is_int, is_number

REQUIRED: Any = object()
MAX_JSON_BYTES = 64 << 20  # of a file; an index of 100,000 tensors has 10 MB
MAX_INTEGER = 2**31 - 1  # a larger count of anything is a mistake


class HfConfig:
    """`config.json` of a checkpoint, or an object in it.

    A field that is null counts as missing. A method whose field is missing returns its `default`, if it has one.

    Args:
        file: the file, which errors name.
        values: the object; None: the whole file.
        prefix: path of the object in the file, such as "text_config.".

    Raises:
        ValueError: the file is missing or holds no object. The methods raise it for a field that is missing or wrong.
    """

    def __init__(self, file: Path, values: dict[str, Any] | None = None, prefix: str = "") -> None:
        self.file, self.prefix = file, prefix
        self._values = read_json(file) if values is None else values

    def error(self, message: str) -> ValueError:
        """Return the error for a wrong field; `message` begins with the field's name."""
        return ValueError(f"{self.file}: {self.prefix}{message}")

    def get(self, name: str) -> Any:
        """Return the value as it is, or None if the field is missing."""
        return self._values.get(name)

    def first_present(self, *names: str) -> str:
        """Return the first of the names that has a value, or the first name if none has."""
        return next((name for name in names if self.get(name) is not None), names[0])

    def section(self, name: str) -> HfConfig:
        """Return the object in field `name`; an empty one if the field is missing."""
        values = self.get(name)
        if values is not None and not isinstance(values, dict):
            raise self.error(f"{name} must be an object or null, got {values!r}")
        return HfConfig(self.file, values or {}, f"{self.prefix}{name}.")

    def integer(self, name: str, *, low: int = 1, high: int = MAX_INTEGER, default: Any = REQUIRED) -> Any:
        """Return an integer from `low` to `high`."""
        value = self._take(name, default, lambda v: is_int(v) and v >= low, f"an integer >= {low}")
        if value is not default and value > high:
            raise self.error(f"{name} must be at most {high}, got {value!r}")
        return value

    def number(self, name: str, *, low: float | None = None, default: Any = REQUIRED) -> Any:
        """Return a finite float that is > 0, or >= `low`."""
        bound = "> 0" if low is None else f">= {low:g}"
        value = self._take(
            name, default, lambda v: is_number(v) and (v > 0 if low is None else v >= low), f"a number {bound}"
        )
        return value if value is default else float(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """Return a list of `length` floats > 0."""
        values = self._take(name, REQUIRED, _are_positive, "a list of numbers > 0")
        if len(values) != length:
            raise self.error(f"{name} must be a list of {length} numbers, got {len(values)}")
        return tuple(map(float, values))

    def flag(self, name: str, *, default: Any = REQUIRED) -> bool:
        """Return the field as a boolean."""
        return self._take(name, default, lambda v: isinstance(v, bool), "true or false")

    def one_of(self, name: str, *allowed: Any, default: Any = REQUIRED) -> Any:
        """Return one of the allowed values."""
        return self._take(name, default, lambda v: v in allowed, " or ".join(map(repr, allowed)))

    def choices(self, name: str, length: int, *allowed: str) -> list[str] | None:
        """Return a list of `length` of the allowed values, or None if the field is missing."""

        def is_valid(value: Any) -> bool:
            return isinstance(value, list) and len(value) == length and all(entry in allowed for entry in value)

        return self._take(name, None, is_valid, f"a list of {length} values out of {', '.join(allowed)}")

    def layer_indices(self, name: str, num_layers: int) -> list[int] | None:
        """Return a list of layers, or None if the field is missing."""

        def is_valid(value: Any) -> bool:
            return isinstance(value, list) and all(is_int(i) and 0 <= i < num_layers for i in value)

        return self._take(name, None, is_valid, f"a list of layers below {num_layers}")

    def _take(self, name: str, default: Any, is_valid: Callable[[Any], bool], allowed: str) -> Any:
        value = self.get(name)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self.file}: the field {self.prefix + name!r} is missing")
            return default
        if not is_valid(value):
            raise self.error(f"{name} must be {allowed}, got {value!r}")
        return value


def _are_positive(values: Any) -> bool:
    return isinstance(values, list) and all(is_number(value) and value > 0 for value in values)


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a file of a checkpoint."""
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; a Hugging Face checkpoint has one")
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{file} must have at most {MAX_JSON_BYTES} bytes, got {size}")
    return parse_json(file.read_bytes(), str(file))


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """Return the object in a JSON text; `source` is named in errors."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(values).__name__}")
    return values
