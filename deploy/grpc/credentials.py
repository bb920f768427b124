"""TLS of the server and its clients: PEM files to gRPC credentials."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from expertwire.deploy.grpc.reloading import Reloading

_AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class _Pem:
    """Contents of the files: private key, certificate chain, and the authorities of client certificates, if any."""

    key: bytes
    chain: bytes
    client_authorities: bytes | None


class ServerCertificates:
    """Certificate and key of the server, and the authorities that sign its clients' certificates.

    Args:
        keyfile: private key, not encrypted.
        certfile: certificate chain, the server's own certificate first.
        ca_certs: certificates of the authorities; with them only clients with a certificate may connect (mTLS).

    Attributes:
        files: the files' contents; refreshed, they hold for new connections.

    Raises:
        ValueError: a file cannot be read, or key and certificate do not fit.
    """

    def __init__(self, keyfile: str, certfile: str, ca_certs: str | None = None) -> None:
        paths = [keyfile, certfile] if ca_certs is None else [keyfile, certfile, ca_certs]
        self.files = Reloading(paths, lambda: _read_server_files(keyfile, certfile, ca_certs))
        self._needs_client_certificate = ca_certs is not None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one port of a server, which follow the files."""
        given = self.files.version

        def changed() -> grpc.ServerCertificateConfiguration | None:
            # gRPC asks in a thread of its own at every connection, so this must not wait.
            nonlocal given
            if given == self.files.version:
                return None
            given = self.files.version
            return self._configuration()

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            changed,  # type: ignore[arg-type]  # None is allowed: no change
            require_client_authentication=self._needs_client_certificate,
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pem = self.files.value
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.chain)], pem.client_authorities)


def ssl_credentials(
    ca_certs: _AnyPath | None = None, *, certfile: _AnyPath | None = None, keyfile: _AnyPath | None = None
) -> grpc.ChannelCredentials:
    """Return a client's credentials for a server with TLS.

    Args:
        ca_certs: PEM file of the authorities that the server's certificate must come from; None: those that gRPC knows.
        certfile: PEM file of the client's certificate chain, for servers that ask for one.
        keyfile: PEM file of its private key.

    Raises:
        ValueError: a file cannot be read, or only one of `certfile` and `keyfile` is given.
    """
    if (certfile is None) != (keyfile is None):
        raise ValueError("certfile and keyfile must be given together")
    return grpc.ssl_channel_credentials(
        root_certificates=None if ca_certs is None else _read("ca_certs", ca_certs),
        private_key=None if keyfile is None else _read("keyfile", keyfile),
        certificate_chain=None if certfile is None else _read("certfile", certfile),
    )


def _read_server_files(keyfile: str, certfile: str, ca_certs: str | None) -> _Pem:
    """Read and check the files. gRPC itself would not say what is wrong with them."""
    pem = _Pem(
        key=_read("ssl_keyfile", keyfile),
        chain=_read("ssl_certfile", certfile),
        client_authorities=None if ca_certs is None else _read("ssl_ca_certs", ca_certs),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile, password="")  # an encrypted key is an error, not a question
    except (ssl.SSLError, ValueError) as error:
        message = (
            f"ssl_keyfile {keyfile} and ssl_certfile {certfile} must be an unencrypted key and its certificate in PEM"
        )
        raise ValueError(f"{message}: {_reason(error)}") from error
    if pem.client_authorities is not None:
        try:
            context.load_verify_locations(cadata=pem.client_authorities.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(f"ssl_ca_certs {ca_certs} must have certificates in PEM: {_reason(error)}") from error
    return pem


def _read(field: str, path: _AnyPath) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{field} {path} cannot be read: {error.strerror}") from error


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)
