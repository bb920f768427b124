"""Options of the gRPC server."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertwire.scheduler.config import is_int, is_number

if TYPE_CHECKING:
    from expertwire.deploy.grpc.credentials import ServerCertificates


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of `expertwire serve`, besides the engine's.

    Args:
        host: name or address to listen on; one that other machines can reach needs TLS or `insecure`.
        port: port to listen on; 0 chooses a free one.
        fronts: processes that serve gRPC on the port, each on a core of its own; None: one for every eight cores, at most 8.
        drain_timeout_s: seconds for running requests to finish after SIGTERM.
        ssl_keyfile: PEM file of the server's private key, not encrypted; with ssl_certfile, the server speaks TLS only. The files
            are read again when they change.
        ssl_certfile: PEM file of the server's certificate chain.
        ssl_ca_certs: PEM file of authorities; only clients with a certificate of theirs can connect (mTLS).
        insecure: listen where other machines can connect, without TLS; for private networks.

    Raises:
        ValueError: names the field and the values it allows.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    fronts: int | None = None
    drain_timeout_s: float = 30.0
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_ca_certs: str | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if not is_int(self.port) or not 0 <= self.port < 65536:
            raise ValueError(f"port must be an integer in [0, 65536), got {self.port!r}")
        if self.fronts is not None and (not is_int(self.fronts) or not 1 <= self.fronts <= 64):
            raise ValueError(f"fronts must be None or an integer in [1, 64], got {self.fronts!r}")
        if not is_number(self.drain_timeout_s) or self.drain_timeout_s < 0:
            raise ValueError(f"drain_timeout_s must be a number of seconds >= 0, got {self.drain_timeout_s!r}")
        self._check_security()

    def certificates(self) -> ServerCertificates | None:
        """Read the files of TLS; return None without TLS.

        Raises:
            ValueError: names the file and what is wrong with it.
        """
        if self.ssl_keyfile is None or self.ssl_certfile is None:
            return None
        from expertwire.deploy.grpc.credentials import ServerCertificates  # imports grpc, which --help does without

        return ServerCertificates(self.ssl_keyfile, self.ssl_certfile, self.ssl_ca_certs)

    def _check_security(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile must be given together")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("ssl_ca_certs needs ssl_keyfile and ssl_certfile")
        if not isinstance(self.insecure, bool):
            raise ValueError(f"insecure must be True or False, got {self.insecure!r}")
        if not (self.ssl_certfile or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"--host {self.host} can be reached by other machines: give --ssl-keyfile and --ssl-certfile, "
                "or --insecure in a private network"
            )

    def num_fronts(self) -> int:
        """Return the number of fronts for this machine."""
        return self.fronts or min(8, max(1, len(os.sched_getaffinity(0)) // 8))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host. Names but localhost are not looked up: others may reach them."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
