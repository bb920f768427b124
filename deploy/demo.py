"""`expertwire demo`: a server with experts sharded over ranks, and a client that asks it questions and checks the answers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import psutil

from expertwire.deploy import experts
from expertwire.deploy.demo_task import Kind, Problem, check, make_problem
from expertwire.deploy.grpc.client import Client, ServerError
from expertwire.engine.frontend.api import EngineFailed

ONE_BY_ONE: tuple[tuple[Kind, int], ...] = (
    ("SUM", 2), ("SUM", 3), ("SUM", 4), ("SUM", 5), ("COUNTDOWN", 2), ("COUNTDOWN", 3), ("COUNTDOWN", 3), ("COUNTDOWN", 4),
)  # fmt: skip
AT_ONCE: tuple[tuple[Kind, int], ...] = (("SUM", 3), ("SUM", 4), ("COUNTDOWN", 3)) * 8
RANKS_PER_CORE = 4  # at most; each is a process of several hundred MB
NEEDED = 0.75  # fraction of answers that must be right
MAX_TOKENS = 128
_START_S = 330.0
_STOP_S = 60.0
_PROGRESS_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one problem; times in seconds since the question."""

    problem: Problem
    text: str
    num_tokens: int
    first_s: float
    total_s: float

    @property
    def correct(self) -> bool:
        return check(self.problem, self.text)


def demo(*, launcher: str, ep_size: int) -> int:
    """Run the demonstration.

    Returns:
        The exit code: 0 if enough answers were right and nothing was left running.

    Raises:
        ValueError: this machine is too small for so many ranks.
        EngineFailed: the server did not start, did not answer, or did not end as it should.
    """
    cores = len(os.sched_getaffinity(0))
    if ep_size > RANKS_PER_CORE * cores:
        raise ValueError(f"--ep-size must be at most {RANKS_PER_CORE} for each of {cores} cores, got {ep_size}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with _server(launcher, ep_size) as address, _client(address) as client:
        info = client.model_info()
        print(
            f"\n{info['name']}: {info['architecture']}, {info['num_layers']} layers of {info['num_experts']} experts, "
            f"{info['top_k']} for each token, sharded over {info['ep_size']} ranks\n"
        )
        answers = [_ask_and_print(client, problem) for problem in _problems(ONE_BY_ONE, seed=1)]
        together, seconds = _ask_together(client, _problems(AT_ONCE, seed=2))
        stats = client.stats()
    print("", *experts.lines(stats), sep="\n")
    return _summarise(answers, together, seconds)


@contextlib.contextmanager
def _client(address: str) -> Iterator[Client]:
    try:
        with Client(address) as client:
            yield client
    except ServerError as error:
        raise EngineFailed(f"the server at {address} answered {error}") from error


@contextlib.contextmanager
def _server(launcher: str, ep_size: int) -> Iterator[str]:
    """Start a server process and yield its address; on exit, end it and its children."""
    options = ["serve", "--launcher", launcher, "--ep-size", str(ep_size), "--port", "0"]
    print(f"$ expertwire {' '.join(options)}")
    with tempfile.TemporaryFile("w+") as log:
        # -P: do not import from the current folder.
        command = [sys.executable, "-P", "-m", "expertwire.deploy.cli", *options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield _address(server, log, f"starting {'Ray and ' if launcher == 'ray' else ''}{ep_size} ranks")
        finally:
            _stop(server)
        if server.returncode:
            raise EngineFailed(f"the server ended with exit code {server.returncode}:\n{_tail(log)}")


def _address(server: subprocess.Popen[str], log: IO[str], what: str) -> str:
    """Wait until the server is ready; return its address."""
    assert server.stdout
    begin = time.monotonic()
    while (seconds := time.monotonic() - begin) < _START_S:
        if sys.stdout.isatty():
            print(f"\r{what} ... {seconds:.0f} s", end="", flush=True)
        if select.select([server.stdout], [], [], _PROGRESS_S)[0]:
            line = server.stdout.readline()
            if not line:
                raise EngineFailed(f"the server did not start: {_tail(log)}")
            if not line.startswith("serving "):  # Ray's warnings
                continue
            print(f"\r{line.strip()} (started in {time.monotonic() - begin:.1f} s)")
            return line.split()[-1]
    raise EngineFailed(f"the server did not start within {_START_S:g} s: {_tail(log)}")


def _stop(server: subprocess.Popen[str]) -> None:
    """Send SIGTERM, as an operator would, and check that no process is left."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(server.pid).children(recursive=True)
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_S)
        _, left = psutil.wait_procs(family, timeout=5.0)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if server.poll() is None:
            server.kill()
            server.wait()
        if left:
            raise EngineFailed(f"the server left processes behind: {', '.join(str(process.pid) for process in left)}")


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return "".join(log.readlines()[-20:]).strip()


def _problems(kinds: Sequence[tuple[Kind, int]], seed: int) -> list[Problem]:
    return [make_problem(kind, size, 1000 * seed + i) for i, (kind, size) in enumerate(kinds)]


def _ask(client: Client, problem: Problem, *, is_printed: bool) -> Answer:
    begin, first, text, num_tokens = time.monotonic(), 0.0, "", 0
    for chunk in client.generate(problem.prompt, temperature=0, max_tokens=MAX_TOKENS):
        first = first or time.monotonic() - begin
        text += chunk.text
        num_tokens += len(chunk.token_ids)
        if is_printed:
            print(chunk.text, end="", flush=True)
    total = time.monotonic() - begin
    return Answer(problem=problem, text=text, num_tokens=num_tokens, first_s=first, total_s=total)


def _ask_and_print(client: Client, problem: Problem) -> Answer:
    print(f"{problem.prompt} ", end="", flush=True)
    answer = _ask(client, problem, is_printed=True)
    print(f"   {'✓' if answer.correct else '✗'}")
    return answer


def _ask_together(client: Client, problems: Sequence[Problem]) -> tuple[list[Answer], float]:
    """Ask all at once; return the answers and the seconds until the last one."""
    begin = time.monotonic()
    with ThreadPoolExecutor(len(problems)) as pool:
        answers = list(pool.map(lambda problem: _ask(client, problem, is_printed=False), problems))
    return answers, time.monotonic() - begin


def _summarise(one_by_one: Sequence[Answer], together: Sequence[Answer], seconds: float) -> int:
    answers = [*one_by_one, *together]
    correct, needed = sum(answer.correct for answer in answers), int(NEEDED * len(answers))
    alone_rate = sum(answer.num_tokens for answer in one_by_one) / sum(answer.total_s for answer in one_by_one)
    together_rate = sum(answer.num_tokens for answer in together) / seconds
    first = statistics.median(answer.first_s for answer in one_by_one)
    print(f"""
  right answers            {correct} of {len(answers)} (at least {needed} expected)
  one question at a time   {alone_rate:.0f} tokens/s, first token after {1e3 * first:.0f} ms (median)
  {len(together)} questions at once    {together_rate:.0f} tokens/s
""")
    return 0 if correct >= needed else 1
