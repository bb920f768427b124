"""Bad inputs and their error messages: writes the page docs/errors.md and checks the messages.

    python -m expertwire.bench.bad_inputs.run > docs/errors.md

Every bad input must give an error that names what is wrong and what is allowed, if possible before any process is started, and
must leave no process running. Cases that do not are printed on stderr.
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
from expertwire.bench.bad_inputs.environment import CommandFailed, Environment
from expertwire.deploy.grpc.client import ServerError

_PREAMBLE = """# Errors

Written by `python -m expertwire.bench.bad_inputs.run > docs/errors.md`; a test checks it. Every input below is refused with this
message and leaves no process running. Errors marked * are found by a rank, after the engine's processes have been started. The
model is the demo model, or a broken copy of it.

- The Python API raises `ValueError` for a wrong value, `TypeError` for an unknown argument, and `EngineFailed` if the engine
  could not start or has failed; the message names the rank.
- Commands print one line on stderr and exit with 2 for a wrong option, model or input, with 1 if the engine failed.
- The server answers with a gRPC status. Besides those below: `UNAVAILABLE` while it drains and after its engine has failed (the
  message names the rank), `DEADLINE_EXCEEDED` when the client's deadline has passed, and `RESOURCE_EXHAUSTED` when too many
  requests wait or the first token cannot come before the deadline. Then the details may have a `google.rpc.RetryInfo`, the
  time to wait before trying again (`ServerError.retry_after_s` of the Python client).
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The error of a case; `complaints` says what is wrong with it."""

    kind: str
    message: str
    complaints: tuple[str, ...]


def try_case(case: Case, env: Environment) -> Answer:
    """Try a bad input; return its error."""
    kind, message = "nothing", ""
    with _started_processes() as started:
        try:
            case.run(env)
        except CommandFailed as error:
            kind, message = f"exit code {error.code}", str(error)
        except ServerError as error:
            kind, message = error.code, error.message
        except ValueError as error:
            kind, message = "ValueError", str(error)
        except Exception as error:  # noqa: BLE001 - any kind is recorded
            kind, message = type(error).__name__, str(error)
    message = env.plain(message)
    complaints = [f"does not mention {word!r}" for word in case.words if word not in message]
    if kind != case.expected:
        complaints.append(f"answered with {kind}, not with {case.expected}")
    if started and not case.starts_processes:
        complaints.append(f"started {len(started)} processes first")
    if left := [process.pid for process in started if process.poll() is None]:
        complaints.append(f"left processes running: {left}")
    return Answer(kind=kind, message=message, complaints=tuple(complaints))


def page(answers: Sequence[tuple[Case, Answer]]) -> str:
    """Return the page docs/errors.md."""
    lines = [_PREAMBLE]
    for area in dict.fromkeys(case.area for case, _ in answers):
        lines += [f"## {area}\n", "| input | error | message |", "|---|---|---|"]
        lines += [
            f"| {_code(case.description)}{' *' if case.starts_processes else ''} | {found.kind} | {_code(found.message)} |"
            for case, found in answers
            if case.area == area
        ]
        lines.append("")
    return "\n".join(lines)


@contextlib.contextmanager
def _started_processes() -> Iterator[list[subprocess.Popen]]:
    """Yield a list to which the processes started within the block are appended."""
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
    """Print the page; return 1 if a message is not as it must be."""
    with Environment() as env:
        answers = [(case, try_case(case, env)) for case in cases()]
    print(page(answers), end="")
    wrong = [(case, found) for case, found in answers if found.complaints]
    for case, found in wrong:
        print(f"{case.area}: {case.description}: {'; '.join(found.complaints)}: {found.message!r}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
