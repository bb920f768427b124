"""Tenants: what each of them has in the system and has used, against its quota.

Z slots of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from expertwire.scheduler.outputs import Rejection
from expertwire.scheduler.quotas import TenantQuota
from expertwire.scheduler.request import Request

MAX_UNLISTED = 1024  # tenants without a quota of their own in the table


class PerMinute:
    """A limit of so much a minute: a bucket that holds one minute's and fills evenly.

    Args:
        limit: of a minute.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = float(limit)
        self._filled_at = 0.0

    def wait_s(self, amount: int, now: float) -> float:
        """Return the seconds until `amount` can be taken."""
        self.left = min(self.left + max(now - self._filled_at, 0.0) * self.limit / 60, float(self.limit))
        self._filled_at = max(now, self._filled_at)
        return max(amount - self.left, 0.0) * 60 / self.limit

    def take(self, amount: int) -> None:
        """Take an amount; a negative one is given back."""
        self.left = min(self.left - amount, float(self.limit))


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's requests and use.

    Args:
        tenant: its name.
        quota: its share and limits.
        index: in arrays by tenant; that of a forgotten tenant is used again.
        num_unfinished: requests that wait, run or are held.
        num_running: of these, those that run.
        num_reserved: slots that are kept for others of these (`WaitingGroups`).
        num_tokens: prompt and output tokens of the requests that have ended.
        num_refused: requests refused with RESOURCE_EXHAUSTED.
        served: tokens computed for it while somebody waited, over its weight; for the policy "fair", which says how an output
            token counts.
        waits_since: number of the step since which requests of it wait, or in which they last began to.
    """

    tenant: str
    quota: TenantQuota
    index: int
    num_unfinished: int = 0
    num_running: int = 0
    num_reserved: int = 0
    num_tokens: int = 0
    num_refused: int = 0
    served: float = 0.0
    waits_since: int = 0
    tokens: PerMinute | None = field(init=False)
    requests: PerMinute | None = field(init=False)
    limited: bool = field(init=False)  # whether it may be refused

    def __post_init__(self) -> None:
        limits = self.quota.tokens_per_minute, self.quota.requests_per_minute
        self.tokens, self.requests = (None if limit is None else PerMinute(limit) for limit in limits)
        self.limited = any(limit is not None for limit in (*limits, self.quota.max_requests))

    def idle(self, now: float) -> bool:
        """Return whether nothing is lost if the tenant is forgotten, but for its statistics."""
        rates = [rate for rate in (self.tokens, self.requests) if rate is not None]
        return not self.num_unfinished and all(rate.wait_s(rate.limit, now) == 0 for rate in rates)

    def excess(self, num_branches: int, num_tokens: int) -> str | None:
        """Return why requests that may have `num_tokens` tokens together can never be accepted, or None."""
        quota = self.quota
        if quota.tokens_per_minute is not None and num_tokens > quota.tokens_per_minute:
            each = "prompt and max_tokens are" if num_branches == 1 else f"{num_branches} x (prompt + max_tokens) are"
            return f"{each} {num_tokens} tokens; tenant {self.tenant!r} may have tokens_per_minute = {quota.tokens_per_minute}"
        for name in ("max_requests", "requests_per_minute"):
            most = getattr(quota, name)
            if most is not None and num_branches > most:
                return f"the request has {num_branches} branches; tenant {self.tenant!r} may have {name} = {most}"
        return None

    def refusal(self, num_branches: int, num_tokens: int, now: float) -> tuple[str, float | None] | None:
        """Return why requests that may have `num_tokens` tokens together are refused now, and the seconds to wait; or None."""
        quota = self.quota
        if quota.max_requests is not None and self.num_unfinished + num_branches > quota.max_requests:
            return f"has {self.num_unfinished} requests; allowed are max_requests = {quota.max_requests}", None
        if self.requests is not None and (wait_s := self.requests.wait_s(num_branches, now)):
            return f"has sent its requests_per_minute = {self.requests.limit}", wait_s
        if self.tokens is not None and (wait_s := self.tokens.wait_s(num_tokens, now)):
            left, limit = max(int(self.tokens.left), 0), self.tokens.limit
            return (
                f"has {left} tokens left of its tokens_per_minute = {limit}; "
                f"this request may have {num_tokens} (prompt and max_tokens)"
            ), wait_s
        return None


class TenantAccounts:
    """The accounts of all tenants.

    `quotas_hold`: whether there is a quota that lets requests wait.

    Tenants that no quota names are at most `max_unlisted`: the one that has been idle for longest is forgotten for a new
    one, its statistics too; if none is idle, new ones are refused. So names that nobody verifies cannot fill the memory.
    """

    def __init__(
        self,
        quotas: Mapping[str, TenantQuota],
        default: TenantQuota | None = None,
        max_unlisted: int = MAX_UNLISTED,
    ) -> None:
        self._default, self._max_unlisted = default or TenantQuota(), max_unlisted
        self._listed = {name: Account(name, quota, i) for i, (name, quota) in enumerate(quotas.items())}
        self._others: dict[str, Account] = {}  # the longest unused first
        self.num_forgotten = 0
        every = [*quotas.values(), self._default]
        self.quotas_hold = any(quota.max_running is not None or quota.kv_share is not None for quota in every)

    def __iter__(self) -> Iterator[Account]:
        return iter([*self._listed.values(), *self._others.values()])

    def find(self, tenant: str, now: float) -> Account | None:
        """Return the tenant's account, perhaps a new one; None if there is no room for one."""
        if (account := self._listed.get(tenant)) is not None:
            return account
        if (account := self._others.pop(tenant, None)) is None:
            index = len(self._listed) + len(self._others)
            if len(self._others) == self._max_unlisted:
                idle = next((other for other in self._others.values() if other.idle(now)), None)
                if idle is None:
                    return None
                del self._others[idle.tenant]
                self.num_forgotten += 1
                index = idle.index
            account = Account(tenant, self._default, index)
        self._others[tenant] = account
        return account

    def accept(self, request: Request, now: float, num_branches: int = 1) -> Rejection | None:
        """Charge a request, whose `limit` and `account` are set, to its tenant; or return why it is refused.

        `num_branches`: of a group, all of whose branches are such requests.
        """
        account, num_tokens = request.account, num_branches * request.limit
        if not account.limited:
            account.num_unfinished += num_branches
            return None
        if (excess := account.excess(num_branches, num_tokens)) is not None:
            return Rejection(request.key, "INVALID_ARGUMENT", excess)
        if (refusal := account.refusal(num_branches, num_tokens, now)) is not None:
            why, retry_after_s = refusal
            message = f"tenant {request.tenant!r} {why}: try later"
            return Rejection(request.key, "RESOURCE_EXHAUSTED", message, retry_after_s)
        for rate, amount in ((account.requests, num_branches), (account.tokens, num_tokens)):
            if rate is not None:
                rate.take(amount)
        account.num_unfinished += num_branches
        return None

    def ended(self, request: Request, num_tokens: int) -> None:
        """Settle an accepted request that has ended with `num_tokens` prompt and output tokens."""
        account = request.account
        account.num_unfinished -= 1
        account.num_tokens += num_tokens
        if account.tokens is not None:
            account.tokens.take(num_tokens - request.limit)

    def stats(self) -> dict[str, dict[str, int]]:
        """Return the accounts of tenants that have asked for anything, by name, as JSON values.

        `waiting` counts requests that are held, too; `tokens` are the prompt and output tokens of ended requests.
        """
        return {
            account.tenant: {
                "running": account.num_running,
                "waiting": account.num_unfinished - account.num_running,
                "tokens": account.num_tokens,
                "refused": account.num_refused,
            }
            for account in self
            if account.num_unfinished or account.num_tokens or account.num_refused
        }

    def check_integrity(self, running: Iterable[Request], tenant_Z: np.ndarray, num_unfinished: int) -> None:
        """Assert that the counts are those of the running and of all unfinished requests."""
        rows: dict[Account, list[int]] = {account: [] for account in self}
        for request in running:
            rows[request.account].append(request.row)
        for account, mine in rows.items():
            assert account.num_running == len(mine), (account, mine)
            assert (tenant_Z[mine] == account.index).all(), (account, tenant_Z[mine])
        unfinished = [account.num_unfinished for account in self]
        assert sum(unfinished) == num_unfinished, (unfinished, num_unfinished)
