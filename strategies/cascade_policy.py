"""Policies of cascades as JSON: what `expertwire calibrate` writes, and a server or a program reads.

An object with the fields of `Cascade`; `router` is one with the fields of `Router`. Fields that are missing have
their defaults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertwire.strategies.cascade import Cascade, Router

_MAX_BYTES = 1 << 20


def read_cascade(path: str | Path) -> Cascade:
    """Return the policy in a file.

    Raises:
        ValueError: it cannot be read, or a field is wrong; the message names the file and the field.
    """
    try:
        data = Path(path).read_bytes()[: _MAX_BYTES + 1]
    except OSError as error:
        raise ValueError(f"the cascade's policy {path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ValueError(f"the cascade's policy {path} must have at most {_MAX_BYTES} bytes")
    try:
        return cascade_from_json(data.decode())
    except ValueError as error:
        raise ValueError(f"the cascade's policy {path} cannot be used: {error}") from error


def cascade_from_json(text: str) -> Cascade:
    """Return the policy that a JSON text says.

    Raises:
        ValueError: it is no JSON, or names the field and the values it allows.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a policy must be JSON: {error}") from error
    fields = dict(_checked("cascade", values, Cascade))
    if fields.get("router") is not None:
        router: Any = _checked("cascade.router", fields["router"], Router)
        lists = ("features", "means", "scales", "weights")
        for name in lists:
            if not isinstance(router[name], list):
                raise ValueError(f"cascade.router.{name} must be a list, got {router[name]!r:.100}")
        features, means, scales, weights = (tuple(router[name]) for name in lists)
        fields["router"] = Router(features, means, scales, weights, router["bias"])
    return Cascade(**fields)


def cascade_to_json(cascade: Cascade) -> str:
    """Return the JSON text of a policy, of which `cascade_from_json` makes an equal one."""
    return json.dumps(dataclasses.asdict(cascade), indent=2)


def _checked(what: str, values: Any, kind: type) -> Mapping[str, Any]:
    """Return the fields of an object; one that is not known, or is missing, is a ValueError."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be an object, got {values!r:.100}")
    fields = {field.name: field.default is dataclasses.MISSING for field in dataclasses.fields(kind)}
    if unknown := [str(name) for name in values if name not in fields]:
        raise ValueError(f"{what} has the fields {', '.join(fields)}, got {', '.join(unknown)}")
    if missing := [name for name, is_needed in fields.items() if is_needed and name not in values]:
        raise ValueError(f"{what} must have the fields {', '.join(missing)}")
    return values
