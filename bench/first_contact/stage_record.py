"""The record that a stage of `bench first_contact` writes as it runs and its supervisor reads.

One JSON object a line, written at once, so that nothing is lost with the process. An item that has begun is not begun
again by the process that goes on after a crash.

    {"item": name}                                              it has begun
    {"figure": name, "value": x, "unit": "tok/s", "bar": b, "at_most": false, "source": "..."}
    {"check": name, "ok": true, "says": "..."}
    {"fact": name, "value": anything}
    {"error": name, "traceback": "..."}
    {"end": true}                                               the stage has done all
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_KINDS = ("item", "figure", "check", "fact", "error", "end")
_MOST_TRACEBACK = 6000  # characters
NOT_RUN = "not run"  # the fact, and the verdict, of a stage that has nothing to do on this machine; the value says why


class Record:
    """The lines of a stage.

    Args:
        file: appended to.
        timed: whether the device has a clock worth reading; without, there are no figures.
        broken: says whether the device is of no use any more, after an error.
    """

    def __init__(self, file: Path, *, timed: bool, broken: Callable[[], bool] = lambda: False) -> None:
        self._file, self.timed, self._broken = file, timed, broken
        self._begun = {row["item"] for row in read(file)[0] if "item" in row}

    @contextmanager
    def item(self, name: str, *, fatal: bool = False) -> Iterator[None]:
        """Run the body as one item: an error ends the item and not the stage.

        Args:
            name: unique in the stage.
            fatal: an error ends the process; the stage goes on in another one.

        Raises:
            RuntimeError: the process is of no use any more.
        """
        self._write({"item": name})
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this item's result
            self.error(name, error)
            if fatal or self._broken():
                raise RuntimeError(f"this process is of no use after {name}") from None

    def wants(self, name: str) -> bool:
        """Return True if the item has not begun before."""
        return name not in self._begun

    def figure(
        self, name: str, value: float, unit: str, *, bar: float | None = None, at_most: bool = False, source: str = ""
    ) -> None:
        """Record a measured number and the bar that `source` sets for it; nothing if this run is not timed."""
        if self.timed:
            more = {} if bar is None else {"bar": bar, "at_most": at_most, "source": source}
            self._write({"figure": name, "value": value if math.isfinite(value) else None, "unit": unit, **more})

    def check(self, name: str, ok: bool, says: str) -> None:
        """Record whether a check passed."""
        self._write({"check": name, "ok": bool(ok), "says": says})

    def fact(self, name: str, value: Any) -> None:
        """Record something that is neither a figure nor a check."""
        self._write({"fact": name, "value": value})

    def error(self, name: str, error: BaseException) -> None:
        """Record an exception with its traceback."""
        self.failure(name, "".join(traceback.format_exception(error)))

    def failure(self, name: str, text: str) -> None:
        """Record an error given as text."""
        self._write({"error": name, "traceback": text[-_MOST_TRACEBACK:]})

    def end(self) -> None:
        """Record that the stage is complete."""
        self._write({"end": True})

    def _write(self, row: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a record, and the number of lines that are not rows."""
    if not file.exists():
        return [], 0
    rows, rubbish = [], 0
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and any(kind in row for kind in _KINDS):
            rows.append(row)
        else:
            rubbish += 1
    return rows, rubbish
