"""Quotas of tenants: the share and the limits of what one tenant may have of the whole engine."""

from __future__ import annotations

from dataclasses import dataclass

from expertwire.scheduler.config import is_int, is_number

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000  # a range in which sums of tokens over weights keep their precision


@dataclass(frozen=True, kw_only=True)
class TenantQuota:
    """The share and the limits of one tenant, over all ranks and fronts together; None sets no limit.

    Args:
        weight: its share of the tokens relative to other tenants', 0.001 to 1000; for the scheduling policy "fair".
        max_requests: requests that wait, run or are held at once, each of `n` outputs counted; more are refused.
        max_running: requests that run at once; more wait.
        tokens_per_minute: prompt and output tokens. A request is charged with its prompt and `max_tokens` when it is
            submitted, and what it has not had is given back when it ends. More are refused.
        requests_per_minute: requests submitted, each of `n` outputs counted; more are refused.
        kv_share: fraction of the blocks of the KV caches that its running requests may hold, in (0, 1]; more wait. One
            request may run however large it is.

    Raises:
        ValueError: names the field and the values it allows.
    """

    weight: float = 1.0
    max_requests: int | None = None
    max_running: int | None = None
    tokens_per_minute: int | None = None
    requests_per_minute: int | None = None
    kv_share: float | None = None

    def __post_init__(self) -> None:
        if not is_number(self.weight) or not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight must be a number from {MIN_WEIGHT} to {MAX_WEIGHT}, got {self.weight!r}")
        for field in ("max_requests", "max_running", "tokens_per_minute", "requests_per_minute"):
            value = getattr(self, field)
            if value is not None and (not is_int(value) or value < 1):
                raise ValueError(f"{field} must be an integer >= 1 or None, got {value!r}")
        share = self.kv_share
        if share is not None and (not is_number(share) or not 0 < share <= 1):
            raise ValueError(f"kv_share must be a number in (0, 1] or None, got {share!r}")
