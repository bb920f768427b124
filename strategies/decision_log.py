"""The file of a cascade's decision records: written by many processes at once, read by `expertwire replay`."""

from __future__ import annotations

import logging
import os
import queue
import threading
from pathlib import Path

from expertwire.strategies.cascade_log import DecisionRecord, record_from_json

MAX_WAITING = 10_000  # records; more are dropped, and counted
_log = logging.getLogger(__name__)


class DecisionLog:
    """Appends records to a file, which only its owner can read, from a thread of its own.

    The processes of a server may share a file: a line is one write. It may be moved away. `record` never waits: when the disk is
    slow, or full, records are dropped and counted.

    Args:
        path: the file.

    Attributes:
        num_dropped: records that are not in the file.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self.num_dropped = 0
        self._is_torn = False  # whether the last line may have no end
        self._lines: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING)
        try:
            self._append(b"")
        except OSError as error:
            raise ValueError(f"decision_log {path} cannot be written: {error.strerror}") from error
        self._thread = threading.Thread(target=self._write, name="decision log", daemon=True)
        self._thread.start()

    def record(self, record: DecisionRecord) -> None:
        """Append a record, or drop it if too many wait."""
        try:
            self._lines.put_nowait(record.to_json().encode() + b"\n")
        except queue.Full:
            self.num_dropped += 1

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, for at most `timeout_s` seconds."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._thread.join(timeout_s)

    def _write(self) -> None:
        has_failed = False
        while (line := self._lines.get()) is not None:
            try:
                self._append(line)
                has_failed = False
            except OSError as error:
                self.num_dropped += 1
                if not has_failed:
                    _log.error("error: decision_log %s cannot be written: %s", self._path, error.strerror)
                has_failed = True

    def _append(self, line: bytes) -> None:
        # Opened for each line, so that the file may be rotated; lines of several processes do not mix (O_APPEND).
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # A disk that is full may take a part of a line, which the next one must not continue.
            line = b"\n" + line if self._is_torn and line else line
            written = os.write(descriptor, line)
            self._is_torn = written < len(line)
            if self._is_torn:
                raise OSError(0, "only a part of a record fits", str(self._path))
        finally:
            os.close(descriptor)


def read_records(path: str | Path) -> tuple[list[DecisionRecord], int]:
    """Return the records of a file, and the number of lines that are none, as a full disk may leave them.

    Raises:
        ValueError: the file cannot be read, or none of its lines is a record.
    """
    try:
        lines = Path(path).read_bytes().decode(errors="replace").split("\n")
    except OSError as error:
        raise ValueError(f"the decision log {path} cannot be read: {error.strerror}") from error
    records, wrong = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                records.append(record_from_json(line))
            except ValueError as error:
                wrong.append(f"line {number}: {error}")
    if not records:
        raise ValueError(f"the decision log {path} must have at least one record; {(wrong or ['it is empty'])[0]}")
    return records, len(wrong)
