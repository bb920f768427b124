"""Options of the gRPC server."""

from __future__ import annotations

import ipaddress
import os
import resource
from dataclasses import dataclass, field
from typing import Literal, get_args

from expertwire.scheduler.config import is_int, is_number

_UNLIMITED = 1 << 30

LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one front.

    Args:
        max_connections: connections; None: 4,096, or a quarter of the descriptors that the process may open, if that is less.
        max_calls_per_connection: calls that run at once on a connection; gRPC lets a client's further ones wait.
        max_calls: calls that run at once.
        max_message_mib: size of a client's message in MiB.
        message_timeout_s: seconds within which a call's message must arrive.
        max_connection_idle_s: seconds after which a connection without calls is closed.
        max_connection_age_s: seconds after which a connection takes no new calls; clients then open another one by themselves.
            Calls that run may go on for as long again.

    Raises:
        ValueError: names the field and the values it allows.
    """

    max_connections: int | None = None
    max_calls_per_connection: int = 256
    max_calls: int = 16384
    max_message_mib: int = 8
    message_timeout_s: float = 5.0
    max_connection_idle_s: float = 300.0
    max_connection_age_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_calls_per_connection", "max_calls", "max_message_mib"):
            value = getattr(self, name)
            if value is None and name == "max_connections":
                continue
            if not is_int(value) or not 1 <= value <= 1 << 20:
                raise ValueError(f"{name} must be an integer in [1, 1048576], got {value!r}")
        for name in ("message_timeout_s", "max_connection_idle_s", "max_connection_age_s"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value <= 1e6:
                raise ValueError(f"{name} must be a number of seconds in (0, 1e6], got {value!r}")

    def options(self) -> tuple[tuple[str, int], ...]:
        """Return the options of a gRPC server with these limits."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        connections = self.max_connections or max(1, min(4096, descriptors // 4))
        return (
            ("grpc.max_allowed_incoming_connections", connections),
            ("grpc.max_concurrent_streams", self.max_calls_per_connection),
            ("grpc.max_receive_message_length", self.max_message_mib << 20),
            # gRPC answers CANCELLED at random beyond these; `Overload` answers RESOURCE_EXHAUSTED.
            ("grpc.server.max_pending_requests", _UNLIMITED),
            ("grpc.server.max_pending_requests_hard_limit", _UNLIMITED),
            ("grpc.server_max_unrequested_time_in_server", 3600),
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.absolute_max_metadata_size", 16 << 10),
            ("grpc.http2.bdp_probe", 0),  # otherwise the unread bytes of each call grow to 4 MiB
            ("grpc.server_handshake_timeout_ms", 5_000),
            ("grpc.max_connection_idle_ms", round(self.max_connection_idle_s * 1e3)),
            ("grpc.max_connection_age_ms", round(self.max_connection_age_s * 1e3)),
            ("grpc.max_connection_age_grace_ms", round(self.max_connection_age_s * 1e3)),
            # Notice clients that vanish; the time-outs of ping and settings bound it, the one of keepalive does not.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.ping_timeout_ms", 10_000),
            ("grpc.http2.settings_timeout", 10_000),
            # Clients may ping every 10 s, also between calls.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        )


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of `expertwire serve`, besides the engine's.

    Args:
        host: name or address to listen on; one that other machines can reach needs TLS, tenants or `insecure`.
        port: port to listen on; 0 chooses a free one.
        fronts: processes that serve gRPC on the port, each on a core of its own; None: one for every eight cores, at most 8.
        drain_timeout_s: seconds for running requests to finish after SIGTERM.
        ssl_keyfile: PEM file of the server's private key, not encrypted; with ssl_certfile, the server speaks TLS only. The files
            are read again when they change.
        ssl_certfile: PEM file of the server's certificate chain.
        ssl_ca_certs: PEM file of authorities; only clients with a certificate of theirs can connect (mTLS).
        tenants: TOML file of the tenants that may call, with digests of their tokens or names in their certificates, and their
            quotas; a call without a token or certificate of one is refused. Unset: anybody may call, for any tenant.
        insecure: listen where other machines can connect, without TLS and tenants; for private networks.
        audit_log: file to which administrative calls and failed authentications are appended, as lines of JSON.
        cascade: a cascade over the models, as NAME=FILE with a policy (docs/test_time_compute.md); requests name it like a model.
        decision_log: file to which a record of each request of a cascade is appended, as a line of JSON.
        disable_log_stats: do not write a line of statistics to standard error every 10 s while requests run.
        strategies: name of an installed module, or a .py file, with a dictionary STRATEGIES of classes, VERIFIERS of callables,
            or both, which requests may then name.
        verifier: NAME=HOST:PORT of a verifier that is a gRPC service (`expertwire.v1.Verifier`); may be repeated.
        verifier_ca_certs: PEM file of the authorities of these services; None: they have no TLS.
        log_level: least severe messages to write to standard error: "debug" (also a line for each request and its end), "info",
            "warning" or "error".
        limits: what clients may hold of a front.

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
    tenants: str | None = None
    insecure: bool = False
    audit_log: str | None = None
    cascade: list[str] | None = None
    decision_log: str | None = None
    disable_log_stats: bool = False
    strategies: str | None = None
    verifier: str | list[str] | tuple[str, ...] | None = None
    verifier_ca_certs: str | None = None
    log_level: LogLevel = "warning"
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not is_int(self.port) or not 0 <= self.port < 65536:
            raise ValueError(f"port must be an integer in [0, 65536), got {self.port!r}")
        if self.fronts is not None and (not is_int(self.fronts) or not 1 <= self.fronts <= 64):
            raise ValueError(f"fronts must be None or an integer in [1, 64], got {self.fronts!r}")
        if not is_number(self.drain_timeout_s) or self.drain_timeout_s < 0:
            raise ValueError(f"drain_timeout_s must be a number of seconds >= 0, got {self.drain_timeout_s!r}")
        if not isinstance(self.disable_log_stats, bool):
            raise ValueError(f"disable_log_stats must be True or False, got {self.disable_log_stats!r}")
        if self.log_level not in get_args(LogLevel):
            raise ValueError(f"log_level must be one of {', '.join(get_args(LogLevel))}, got {self.log_level!r}")
        self._check_security()

    def _check_security(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile must be given together")
        if self.ssl_ca_certs is not None and self.ssl_certfile is None:
            raise ValueError("ssl_ca_certs needs ssl_keyfile and ssl_certfile")
        if not isinstance(self.insecure, bool):
            raise ValueError(f"insecure must be True or False, got {self.insecure!r}")
        if not (self.ssl_certfile or self.tenants or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"--host {self.host} can be reached by other machines: give --ssl-keyfile and --ssl-certfile, "
                "--tenants, or --insecure in a private network"
            )

    def services(self) -> tuple[str, ...]:
        """Return "NAME=HOST:PORT" of each verifier that is a service."""
        return (self.verifier,) if isinstance(self.verifier, str) else tuple(self.verifier or ())

    def num_fronts(self) -> int:
        """Return the number of fronts for this machine."""
        return self.fronts or min(8, max(1, len(os.sched_getaffinity(0)) // 8))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host. Names but localhost are not looked up: others may reach them."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
