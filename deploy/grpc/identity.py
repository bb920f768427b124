"""Identities of callers: the tenant of a bearer token or client certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from expertwire.deploy.grpc.audit import AuditLog
from expertwire.deploy.grpc.reloading import Reloading
from expertwire.deploy.tenants import Tenant, Tenants
from expertwire.engine.frontend.api import RequestError, RequestFailed

# One message for whatever is wrong, so that nobody learns which tokens and names exist.
_UNAUTHENTICATED = RequestError(
    "UNAUTHENTICATED",
    "the call must have a tenant's token, as `authorization: Bearer TOKEN` in its metadata, or a tenant's client certificate",
)
_FOR_ADMINISTRATORS = ("FlushCache", "GetServerInfo")
_AUDITED = (*_FOR_ADMINISTRATORS, "GetStats")
_CERTIFICATE_NAMES = ("peer_uri", "peer_dns", "x509_common_name")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The maker of a call.

    Args:
        tenant: the verified tenant; "" if the server has no tenants file, and everybody is one tenant who may claim any name.
        is_verified: whether there is a tenants file.
        is_admin: whether the call may concern other tenants.
    """

    tenant: str = ""
    is_verified: bool = False
    is_admin: bool = True

    def tenant_of(self, claimed: str) -> str:
        """Return the tenant that a request counts for.

        Args:
            claimed: the tenant that the request names, or "".

        Raises:
            RequestFailed: it is another than the verified one.
        """
        if not self.is_verified:
            return claimed
        if claimed not in ("", self.tenant):
            text = f"tenant must be empty or {self.tenant!r}, whose token or certificate the call has"
            raise RequestFailed(RequestError("PERMISSION_DENIED", text))
        return self.tenant

    def check_admin(self, method: str) -> None:
        """Check that the caller may call a method that concerns all tenants.

        Raises:
            RequestFailed: the caller is no administrator.
        """
        if not self.is_admin:
            text = f"{method} is for tenants with `admin = true` in the server's tenants file"
            raise RequestFailed(RequestError("PERMISSION_DENIED", text))

    def visible(self, stats: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return statistics of the engine without the part of other tenants."""
        if self.is_admin:
            return stats
        return {
            **stats,
            "tenants": {name: own for name, own in stats.get("tenants", {}).items() if name == self.tenant},
        }


ANYBODY = Identity()


class CallContext(Protocol):
    """The client of a call as gRPC shows it; a `grpc.aio.ServicerContext` is one."""

    def invocation_metadata(self) -> Any:
        """Return the metadata that the client sent, as pairs of name and value."""

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Return the verified names of the client's certificate, by kind."""

    def peer(self) -> str:
        """Return the client's address."""


class Authenticator:
    """Finds out who makes a call.

    Args:
        tenants: the tenants; None believes everybody.
        audit: the log of failures and administrative calls; None: there is none.
    """

    def __init__(self, tenants: Reloading[Tenants] | None = None, audit: AuditLog | None = None) -> None:
        self._tenants = tenants
        self._audit = audit or AuditLog()

    def identify(self, connection: CallContext, method: str) -> Identity:
        """Return who makes a call of `method`.

        Raises:
            RequestFailed: nobody that the server knows.
        """
        if self._tenants is None:
            return ANYBODY
        tenant = _tenant_of(self._tenants.value, connection)
        if tenant is None:
            self._audit.record_failure(method, _UNAUTHENTICATED.code, peer=connection.peer())
            raise RequestFailed(_UNAUTHENTICATED)
        return Identity(tenant=tenant.name, is_verified=True, is_admin=tenant.admin)

    @contextlib.contextmanager
    def call(self, connection: CallContext, method: str) -> Iterator[Callable[[], Identity]]:
        """Admit a call of `method`, and audit it if it is an administrative one.

        Yields:
            A function that returns who makes the call. It looks again after the tenants have changed, since a call may last.

        Raises:
            RequestFailed: nobody that the server knows, or somebody who may not.
        """
        identity = self.identify(connection, method)
        version = self._version

        def current() -> Identity:
            nonlocal identity, version
            if version != self._version:
                identity, version = self.identify(connection, method), self._version
            return identity

        if method not in _AUDITED:
            yield current
            return
        with self._audited(connection, identity, method):
            if method in _FOR_ADMINISTRATORS:
                identity.check_admin(method)
            yield current

    @property
    def _version(self) -> int:
        return 0 if self._tenants is None else self._tenants.version

    @contextlib.contextmanager
    def _audited(self, connection: CallContext, identity: Identity, method: str) -> Iterator[None]:
        """Audit a call of `method` when it ends."""
        outcome = "CANCELLED"
        try:
            yield
            outcome = "OK"
        except RequestFailed as failed:
            outcome = failed.error.code
            raise
        finally:
            self._audit.record(method, outcome, tenant=identity.tenant, peer=connection.peer())

    def owner(self, connection: CallContext, identity: Identity, claimed: str, method: str) -> str:
        """Return the tenant whose requests an administrative call is about, and audit a call about those of another.

        Args:
            connection: of the call.
            identity: who makes it.
            claimed: the tenant that the call names, or "".
            method: of the call.

        Raises:
            RequestFailed: it is another tenant, and the caller is no administrator.
        """
        if not identity.is_verified or claimed in ("", identity.tenant):
            return identity.tenant
        identity.check_admin(f"{method} for another tenant")
        self._audit.record(method, "OK", tenant=identity.tenant, peer=connection.peer(), of=claimed)
        return claimed


def _tenant_of(tenants: Tenants, connection: CallContext) -> Tenant | None:
    """Return the tenant whose token the call has, or, without a token, the one of the client's certificate.

    A certificate of one tenant with the token of another is neither's; one of no tenant may be a proxy's.
    """
    names = connection.auth_context()
    certified = tenants.with_certificate(
        {name.decode(errors="replace") for kind in _CERTIFICATE_NAMES for name in names.get(kind, ())}
    )
    headers = [value for name, value in connection.invocation_metadata() or () if name == "authorization"]
    if not headers:
        return certified
    scheme, _, token = str(headers[0]).partition(" ")
    bearer = tenants.with_token(token) if len(headers) == 1 and scheme.lower() == "bearer" else None
    return bearer if certified in (None, bearer) else None
