"""What a client may ask of the scheduler for one request: `RequestOptions`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from expertwire.scheduler.config import is_int, is_number

MAX_NAME = 128  # characters


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """When a request is served and with whom it shares, beside how its tokens are sampled.

    Args:
        priority: lower is served earlier, by the policies that look at it; in [-2**31, 2**31).
        tenant: whose request it is, for fair shares and limits; at most 128 characters.
        cache_salt: requests share cached prefixes only within one tenant and salt; at most 128 characters.
        deadline_s: the first token is wanted within so many seconds from now; None: whenever it comes.

    Raises:
        ValueError: names the field and the values it allows.
    """

    priority: int = 0
    tenant: str = ""
    cache_salt: str = ""
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not is_int(self.priority) or not -(2**31) <= self.priority < 2**31:
            raise ValueError(f"priority must be an integer in [-2**31, 2**31), got {self.priority!r}")
        for field in ("tenant", "cache_salt"):
            check_name(field, getattr(self, field))
        value = self.deadline_s
        if value is not None and (not is_number(value) or value < 0):
            raise ValueError(f"deadline_s must be None or a number of seconds >= 0, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The arguments, as values that JSON can carry."""
        return dataclasses.asdict(self)


def check_name(field: str, value: object) -> None:
    """Whether `value` can name a tenant or a salt. Names are hashed as UTF-8, which has no lone surrogates.

    Raises:
        ValueError: it cannot.
    """
    if (
        isinstance(value, str)
        and len(value) <= MAX_NAME
        and not any("\ud800" <= letter <= "\udfff" for letter in value)
    ):
        return
    got = f"{len(value)} characters" if isinstance(value, str) and len(value) > MAX_NAME else repr(value)
    raise ValueError(f"{field} must be a string of at most {MAX_NAME} characters of valid Unicode, got {got:.100}")
