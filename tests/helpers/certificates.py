"""Certificate authorities and certificates of tests, made when they are needed, so that none expires in the repository."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import trustme


@dataclasses.dataclass(frozen=True)
class CertificateFiles:
    """PEM files: a certificate chain and its private key."""

    certfile: str
    keyfile: str


class Authority:
    """A certificate authority whose files lie in a folder.

    Attributes:
        ca_certs: PEM file of its own certificate.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._ca = folder, trustme.CA()
        self.ca_certs = str(folder / "ca.pem")
        self._ca.cert_pem.write_to_path(self.ca_certs)

    def issue(
        self, name: str, *identities: str, common_name: str | None = None, expired: bool = False
    ) -> CertificateFiles:
        """Write the files `name`.pem and `name`.key of a certificate for host names, addresses or mail addresses."""
        not_after = datetime(2020, 1, 1, tzinfo=UTC) if expired else None
        issued = self._ca.issue_cert(*identities, common_name=common_name, not_after=not_after)
        certfile, keyfile = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certfile.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(keyfile))
        return CertificateFiles(str(certfile), str(keyfile))
