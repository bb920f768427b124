"""The security of a server: certificates, tenants and the audit log, read from the files that `ServerConfig` names."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import grpc

from expertwire.deploy.grpc.audit import AuditLog
from expertwire.deploy.grpc.config import ServerConfig, is_loopback
from expertwire.deploy.grpc.credentials import ServerCertificates
from expertwire.deploy.grpc.identity import Authenticator
from expertwire.deploy.grpc.reloading import Reloading, keep_fresh
from expertwire.deploy.tenants import Tenants

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Security:
    """Rules on who may connect and call.

    Args:
        certificates: those of the server; None speaks plain text.
        tenants: who may call; None lets everybody.
        audit: the log of administrative calls and failed authentications.
    """

    certificates: ServerCertificates | None
    tenants: Reloading[Tenants] | None
    audit: AuditLog

    @classmethod
    def open(cls, config: ServerConfig) -> Security:
        """Read the files of a server's options.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        certificates = None
        if config.ssl_keyfile is not None and config.ssl_certfile is not None:
            certificates = ServerCertificates(config.ssl_keyfile, config.ssl_certfile, config.ssl_ca_certs)
        tenants, path = None, config.tenants
        if path is not None:
            tenants = Reloading([path], lambda: Tenants.read(path))
        if tenants is not None and certificates is None and not is_loopback(config.host):
            _log.warning("warning: without TLS (--ssl-keyfile, --ssl-certfile) tokens can be read on the way")
        return cls(certificates=certificates, tenants=tenants, audit=AuditLog(config.audit_log))

    def credentials(self) -> grpc.ServerCredentials | None:
        """Return credentials for the server's port; None for plain text."""
        return None if self.certificates is None else self.certificates.credentials()

    def authenticator(self) -> Authenticator:
        """Return what finds out who makes a call."""
        return Authenticator(self.tenants, self.audit)

    async def keep_fresh(self) -> None:
        """Read the files again when they change, for ever."""
        certificates = [] if self.certificates is None else [self.certificates.files]
        tenants = [] if self.tenants is None else [self.tenants]
        await keep_fresh([*certificates, *tenants], self._report)

    def _report(self, changed: Reloading[Any]) -> None:
        if changed is self.tenants:
            self.audit.record("TenantsReload", "OK")
