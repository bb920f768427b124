"""Bad inputs and what each is answered: the page docs/errors.md, and the check that it is true.

    python -m expertwire.bench.bad_inputs.run > docs/errors.md

Every bad input must be refused with an error that names what is wrong and what is allowed, before any process starts where that
can be told beforehand, and must leave no process behind. Prints the page, and on stderr the cases that behave otherwise.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from expertwire.bench.bad_inputs.cases import Case, cases
from expertwire.bench.bad_inputs.place import CommandFailed, Place
from expertwire.deploy.grpc.client import ServerError

_PREAMBLE = """# Bad inputs and their answers

This page is written by `python -m expertwire.bench.bad_inputs.run > docs/errors.md`, and a test checks that it is
true: every input
below is refused with this message and leaves nothing running. What is marked * only a rank can tell, so the engine's
processes start first, and end with the error. The model is the demo model, or a broken copy of it.

- The Python API raises `ValueError` for a wrong value, `TypeError` for an argument that does not exist, and `EngineFailed` if the
  engine could not start or has failed; the message names the rank.
- Commands print one line on stderr. They exit with 2 for a wrong option, model or input, with 1 if the engine failed.
- The server answers with a gRPC status. Besides those below: `UNAVAILABLE` while it drains and after its engine has failed
  (the message names the rank), `DEADLINE_EXCEEDED` when the client's deadline has passed, `RESOURCE_EXHAUSTED` when too many
  requests wait, or the first token cannot come before the deadline: then the trailing metadata may have `retry-after-ms`, the
  milliseconds to wait before the next try (`ServerError.retry_after_s` of our client).
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a case was answered. `complaints` is empty if that was right."""

    kind: str
    message: str
    complaints: tuple[str, ...]


def answer(case: Case, place: Place) -> Answer:
    """Try a bad input and see what comes of it."""
    kind, message = "nothing", ""
    with _starts() as started:
        try:
            case.attempt(place)
        except CommandFailed as error:
            kind, message = f"exit code {error.code}", str(error)
        except ServerError as error:
            kind, message = error.code, error.message
        except ValueError as error:
            kind, message = "ValueError", str(error)
        except Exception as error:  # noqa: BLE001 - which one is the question
            kind, message = type(error).__name__, str(error)
    message = place.plain(message)
    complaints = [f"says nothing of {word!r}" for word in case.says if word not in message]
    if kind != case.answer:
        complaints.append(f"answered with {kind}, not with {case.answer}")
    if started and not case.starts:
        complaints.append(f"started {len(started)} processes first")
    if left := [process.pid for process in started if process.poll() is None]:
        complaints.append(f"left processes running: {left}")
    return Answer(kind=kind, message=message, complaints=tuple(complaints))


def page(answers: Sequence[tuple[Case, Answer]]) -> str:
    """The page docs/errors.md."""
    lines = [_PREAMBLE]
    for area in dict.fromkeys(case.area for case, _ in answers):
        lines += [f"## {area}\n", "| input | answer | message |", "|---|---|---|"]
        lines += [
            f"| {_code(case.given)}{' *' if case.starts else ''} | {found.kind} | {_code(found.message)} |"
            for case, found in answers
            if case.area == area
        ]
        lines.append("")
    return "\n".join(lines)


@contextlib.contextmanager
def _starts() -> Iterator[list[subprocess.Popen]]:
    """The processes that are started within the block."""
    started: list[subprocess.Popen] = []
    start = subprocess.Popen.__init__

    def note(process: subprocess.Popen, *args: Any, **options: Any) -> None:
        start(process, *args, **options)
        started.append(process)

    with mock.patch.object(subprocess.Popen, "__init__", note):
        yield started


def _code(text: str) -> str:
    return (f"`` {text} ``" if "`" in text else f"`{text}`").replace("|", "\\|")


def main() -> int:
    """Print the page; exit code 1 if a case behaves otherwise."""
    with Place() as place:
        answers = [(case, answer(case, place)) for case in cases()]
    print(page(answers), end="")
    wrong = [(case, found) for case, found in answers if found.complaints]
    for case, found in wrong:
        print(f"{case.area}: {case.given}: {'; '.join(found.complaints)}: {found.message!r}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
