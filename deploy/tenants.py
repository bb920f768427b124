"""The tenants of a server: a TOML file of who they are and what they may use, and tokens for it."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertwire.scheduler.quotas import TenantQuota

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_NO_LIMITS = TenantQuota()
_QUOTA_FIELDS = tuple(each.name for each in dataclasses.fields(TenantQuota))
_FIELDS = ("tokens", "certificates", "admin", *_QUOTA_FIELDS)


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """A tenant of the file.

    Args:
        name: letters, digits and _ . -, at most 128.
        tokens: SHA-256 of each of its bearer tokens, as 64 hexadecimal digits.
        certificates: names in its clients' certificates: a URI or DNS name, or the common name.
        admin: whether it may see and end requests of other tenants, and call methods that concern all of them.
        quota: its share and limits.

    Raises:
        ValueError: names the field and the values it allows.
    """

    name: str
    tokens: tuple[str, ...] = ()
    certificates: tuple[str, ...] = ()
    admin: bool = False
    quota: TenantQuota = _NO_LIMITS

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                "the name of a tenant must have 1 to 128 letters, digits, _ . and -, and begin with a letter or digit"
            )
        for token in self.tokens:
            if not _DIGEST.fullmatch(token):
                raise ValueError(
                    f"tokens must be SHA-256 digests of 64 hexadecimal digits, got one of {len(token)} characters"
                )
        if not all(self.certificates):
            raise ValueError("certificates must not be empty names")
        if not isinstance(self.admin, bool):
            raise ValueError(f"admin must be true or false, got {self.admin!r}")
        if not self.tokens and not self.certificates:
            raise ValueError("tokens or certificates must have an entry, otherwise nobody is this tenant")


class Tenants:
    """The tenants of a server, found by what their clients show.

    Args:
        tenants: the tenants.
        default_quota: share and limits of tenants that come into the file later.

    Attributes:
        by_name: the tenants by name.
        default_quota: as given.

    Raises:
        ValueError: two tenants have the same token or certificate.
    """

    def __init__(self, tenants: Iterable[Tenant], default_quota: TenantQuota = _NO_LIMITS) -> None:
        self.default_quota = default_quota
        self.by_name: Mapping[str, Tenant] = {tenant.name: tenant for tenant in tenants}
        # By a keyed digest that nobody else can compute, so that the time of a look-up says nothing about the digests.
        self._key = secrets.token_bytes(32)
        self._by_token: dict[bytes, Tenant] = {}
        self._by_certificate: dict[str, Tenant] = {}
        for tenant in self.by_name.values():
            for digest in tenant.tokens:
                other = self._by_token.setdefault(self._keyed(bytes.fromhex(digest)), tenant)
                _check_own("token", tenant, other)
            for certificate in tenant.certificates:
                other = self._by_certificate.setdefault(certificate, tenant)
                _check_own("certificate", tenant, other)

    @classmethod
    def read(cls, path: str) -> Tenants:
        """Return the tenants of a file.

        Raises:
            ValueError: names the file, the tenant, the field and the values it allows.
        """
        try:
            with Path(path).open("rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise ValueError(f"tenants file {path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # of tomllib, or not UTF-8
            raise ValueError(f"tenants file {path} is not TOML: {error}") from error
        try:
            return _tenants(values)
        except ValueError as error:
            raise ValueError(f"tenants file {path}: {error}") from error

    def with_token(self, token: str) -> Tenant | None:
        """Return the tenant that a bearer token belongs to, or None; both take the same time."""
        return self._by_token.get(self._keyed(hashlib.sha256(token.encode()).digest()))

    def with_certificate(self, names: Iterable[str]) -> Tenant | None:
        """Return the tenant that the names of a certificate belong to; None if they belong to none, or to several."""
        found = {tenant.name: tenant for name in names if (tenant := self._by_certificate.get(name)) is not None}
        return next(iter(found.values())) if len(found) == 1 else None

    def quotas(self) -> dict[str, TenantQuota]:
        """Return the share and limits of every tenant by name."""
        return {name: tenant.quota for name, tenant in self.by_name.items()}

    def _keyed(self, digest: bytes) -> bytes:
        return hmac.digest(self._key, digest, "sha256")


def make_token() -> tuple[str, str]:
    """Return a new random token of 256 bits, and its digest for the tenants file."""
    token = secrets.token_urlsafe(32)
    return token, hashlib.sha256(token.encode()).hexdigest()


def _tenants(values: Mapping[str, Any]) -> Tenants:
    tables, default = values.get("tenants"), values.get("default", {})
    if (
        not isinstance(tables, dict)
        or not tables
        or not isinstance(default, dict)
        or set(values) - {"tenants", "default"}
    ):
        raise ValueError(
            "it must have a table [tenants.NAME] for each tenant, may have a table [default] of quotas, and nothing else; "
            f"it has {', '.join(values) or 'nothing'}"
        )
    try:
        default_quota = TenantQuota(**_known(default, _QUOTA_FIELDS))
    except ValueError as error:
        raise ValueError(f"[default]: {error}") from error
    tenants = []
    for name, table in tables.items():
        try:
            tenants.append(_tenant(name, table, default))
        except ValueError as error:
            raise ValueError(f"tenant {name!r}: {error}") from error
    return Tenants(tenants, default_quota)


def _tenant(name: str, table: Any, default: Mapping[str, Any]) -> Tenant:
    if not isinstance(table, dict):
        raise ValueError(f"it must be a table [tenants.{name}], got {table!r}")
    own = _known(table, _FIELDS)
    for key in ("tokens", "certificates"):
        value = own.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{key} must be a list of strings")
    quota = {**default, **{key: value for key, value in own.items() if key in _QUOTA_FIELDS}}
    return Tenant(
        name=name,
        tokens=tuple(own.get("tokens", ())),
        certificates=tuple(own.get("certificates", ())),
        admin=own.get("admin", False),
        quota=TenantQuota(**quota),
    )


def _known(table: Mapping[str, Any], fields: Sequence[str]) -> Mapping[str, Any]:
    """Return a table after a check that it has no other fields."""
    if unknown := sorted(set(table) - set(fields)):
        raise ValueError(f"{unknown[0]} is not a field; there are {', '.join(fields)}")
    return table


def _check_own(what: str, tenant: Tenant, other: Tenant) -> None:
    if tenant is not other:
        raise ValueError(f"tenants {other.name!r} and {tenant.name!r} have the same {what}")
