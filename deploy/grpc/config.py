"""Options of the gRPC server."""

from __future__ import annotations

import os
from dataclasses import dataclass

from expertwire.scheduler.config import is_int, is_number


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of `expertwire serve`, besides the engine's.

    Args:
        host: name or address to listen on.
        port: port to listen on; 0 chooses a free one.
        fronts: processes that serve gRPC on the port, each on a core of its own; None: one for every eight cores, at most 8.
        drain_timeout_s: seconds for running requests to finish after SIGTERM.

    Raises:
        ValueError: names the field and the values it allows.
    """

    host: str = "127.0.0.1"
    port: int = 50051
    fronts: int | None = None
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if not is_int(self.port) or not 0 <= self.port < 65536:
            raise ValueError(f"port must be an integer in [0, 65536), got {self.port!r}")
        if self.fronts is not None and (not is_int(self.fronts) or not 1 <= self.fronts <= 64):
            raise ValueError(f"fronts must be None or an integer in [1, 64], got {self.fronts!r}")
        if not is_number(self.drain_timeout_s) or self.drain_timeout_s < 0:
            raise ValueError(f"drain_timeout_s must be a number of seconds >= 0, got {self.drain_timeout_s!r}")

    def num_fronts(self) -> int:
        """Return the number of fronts for this machine."""
        return self.fronts or min(8, max(1, len(os.sched_getaffinity(0)) // 8))
