"""Values from files that are read again when the files change."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_REFRESH_S = 1.0
_log = logging.getLogger(__name__)


class Reloading(Generic[T]):
    """A value from files, read again after they have changed.

    Args:
        paths: the files.
        read: reads them; raises ValueError or OSError if they are not usable.

    Attributes:
        value: what was read last without an error.
        version: how often `value` has been replaced.

    Raises:
        ValueError, OSError: from `read`.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], read: Callable[[], T]) -> None:
        self._paths = [Path(path) for path in paths]
        self._read = read
        self._stamps = self._look()
        self.value = read()
        self.version = 0

    def refresh(self) -> bool:
        """Read the files again if they have changed; return whether `value` is new. After an error the old one stays."""
        stamps = self._look()
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        try:
            value = self._read()
        except (ValueError, OSError) as error:
            _log.error("error: %s; what was read before stays in use", error)
            return False
        if self._look() != stamps:  # replaced while it was read: parts of two versions
            self._stamps = []
            return False
        self.value, self.version = value, self.version + 1
        _log.info("read again: %s", ", ".join(map(str, self._paths)))
        return True

    def _look(self) -> list[tuple[int, int, int] | None]:
        return [_stamp(path) for path in self._paths]


async def keep_fresh(values: Sequence[Reloading[Any]], on_change: Callable[[Reloading[Any]], None]) -> None:
    """Refresh the values once a second, for ever. Files are read in a thread, so that a slow disk does not stop the loop."""
    while values:
        await asyncio.sleep(_REFRESH_S)
        for value in values:
            if await asyncio.to_thread(value.refresh):
                on_change(value)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file does; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
