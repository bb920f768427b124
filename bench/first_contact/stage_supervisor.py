"""Runs a stage of `bench first_contact` in a process of its own, and says what became of it, however it ends.

Verdicts: "passed"; "wrong" (a check is not right); "failed" (an item raised an error); "crashed"; "hung" (it was ended
at its time limit); "rubbish" (it ended, but what it wrote is no result); "cut" (the time of the whole call was over).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertwire.bench.first_contact import stage_record
from expertwire.engine.process import describe_exit

VERDICTS = ("passed", "wrong", "failed", "crashed", "hung", "rubbish", "cut")
ENDED = "the process "  # begins the error of an item that did not come to its end
_POLL_S = 0.1
_GRACE_S = 2.0  # to print where it was
_MOST_STARTS = 6  # of a stage whose items crash
_MOST_OUTPUT = 4000  # characters of what a process printed that are kept


def supervise(command: Sequence[str], rows_file: Path, *, limit_s: float, until: float) -> dict[str, Any]:
    """Run `command`, again after a crash, until its rows have an end or its time is over.

    Args:
        command: it appends rows (`stage_record`) to `rows_file`.
        rows_file: it may have rows of an earlier run, which was cut.
        limit_s: after which the stage has hung.
        until: on the clock of `time.time`: when the whole call is over.

    Returns:
        {"verdict", "seconds", "figures", "checks", "facts", "errors", "output"}, JSON values.
    """
    began = time.time()
    end = min(began + limit_s, until)
    starts, ended = 0, ""
    with tempfile.TemporaryFile() as output:
        while starts < _MOST_STARTS:
            starts += 1
            before = _last_item(rows_file)
            ended = _run(command, output, end)
            rows, rubbish = stage_record.read(rows_file)
            if ended in ("", "time") or _last_item(rows_file) == before:
                break
            _blame(rows_file, ended)
        text = _tail(output)
    if ended == "time":
        verdict = "hung" if time.time() - began >= limit_s else "cut"
        if verdict == "hung":
            _blame(rows_file, f"did not return within {limit_s:.0f} s")
    elif ended:
        verdict = "crashed"
        _blame(rows_file, ended)
    else:
        verdict = "passed"
    rows, rubbish = stage_record.read(rows_file)
    return {**_summed_up(rows, verdict, rubbish), "seconds": round(time.time() - began, 1), "output": text}


def _run(command: Sequence[str], output: Any, end: float) -> str:
    """Returns "" if the process ended well, "time" if it was killed, else how it ended."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        while process.poll() is None and time.time() < end:
            time.sleep(_POLL_S)
        ended = (
            "time"
            if process.returncode is None
            else ""
            if process.returncode == 0
            else describe_exit(process.returncode)
        )
    finally:
        _end_group(process)
    return ended


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and its process group; children in sessions of their own end by their lifelines."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGABRT)  # faulthandler prints where it was
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_item(rows_file: Path) -> tuple[int, str]:
    items = [row["item"] for row in stage_record.read(rows_file)[0] if "item" in row]
    return len(items), items[-1] if items else ""


def _blame(rows_file: Path, ended: str) -> None:
    """Record that the item that was running has failed."""
    rows = stage_record.read(rows_file)[0]
    name = _last_item(rows_file)[1] or "before its first item"
    if not any(row.get("error") == name for row in rows):
        stage_record.Record(rows_file, timed=False).error(name, RuntimeError(ENDED + ended))


def _tail(output: Any) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - 4 * _MOST_OUTPUT))
    text = output.read().decode(errors="replace")
    return "".join(c for c in text if c.isprintable() or c == "\n")[-_MOST_OUTPUT:]


def _summed_up(rows: list[dict[str, Any]], verdict: str, rubbish: int) -> dict[str, Any]:
    """Return the rows by kind and the verdict, where "passed" becomes what the rows say."""
    by_kind: dict[str, list[dict[str, Any]]] = {
        kind: [row for row in rows if kind in row] for kind in ("figure", "check", "fact", "error")
    }
    facts = {row["fact"]: row["value"] for row in by_kind["fact"]}
    if verdict == "passed":
        if rubbish or not any("end" in row for row in rows):
            verdict = "rubbish"
        elif by_kind["error"]:
            verdict = "failed"
        elif not all(row["ok"] for row in by_kind["check"]):
            verdict = "wrong"
        elif stage_record.NOT_RUN in facts and not (by_kind["check"] or by_kind["figure"]):
            verdict = stage_record.NOT_RUN
    return {
        "verdict": verdict,
        "figures": by_kind["figure"],
        "checks": by_kind["check"],
        "facts": facts,
        "errors": by_kind["error"],
        "unreadable_lines": rubbish,
    }
