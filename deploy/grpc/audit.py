"""The audit log: a line of JSON for each administrative call and failed authentication. No token and no prompt is in it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

_MAX_FAILURES = 10  # lines on failed authentications in a second; more are counted
_log = logging.getLogger(__name__)


class AuditLog:
    """Appends lines to a file, which only its owner can read. The processes of a server may share one; it may be moved away.

    Args:
        path: the file; None writes nothing.
        clock: returns a time in seconds.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._second = 0
        self._num_failures = 0  # of this second
        self._num_suppressed = 0
        if path is not None:
            try:
                self._append(b"")
            except OSError as error:
                raise ValueError(f"audit_log {path} cannot be written: {error.strerror}") from error

    def record(self, method: str, outcome: str, *, tenant: str = "", peer: str = "", **details: Any) -> None:
        """Append a line.

        Args:
            method: what was done, by the name of its gRPC method, or "TenantsReload".
            outcome: name of the gRPC status.
            tenant: who did it.
            peer: the client's address.
            details: further values, of JSON's types.
        """
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        values = {"time": now, "tenant": tenant, "peer": peer, "method": method, "outcome": outcome, **details}
        try:
            self._append(json.dumps(values).encode() + b"\n")
        except OSError as error:
            _log.error("error: audit_log %s cannot be written: %s", self._path, error.strerror)

    def record_failure(self, method: str, outcome: str, *, peer: str) -> None:
        """Append a line on a failed authentication, unless there have been too many within this second."""
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_failures = second, 0
        self._num_failures += 1
        if self._num_failures > _MAX_FAILURES:
            self._num_suppressed += 1
            return
        details: dict[str, Any] = {"num_suppressed": self._num_suppressed} if self._num_suppressed else {}
        self._num_suppressed = 0
        self.record(method, outcome, peer=peer, **details)

    def _append(self, line: bytes) -> None:
        assert self._path is not None, "an audit log without a file writes nothing"
        # Opened for each line, so that the file may be rotated; lines of several processes do not mix (O_APPEND).
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
