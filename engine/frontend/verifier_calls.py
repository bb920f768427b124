"""Calls of verifiers, which may be slow, raise or hang, for all groups of a frontend.

A verifier is called in a thread, with the candidates that have come for it meanwhile, of all groups together. If it fails, it is
called once more for each group alone, so that one group's candidates cannot cost another one its scores.

Python cannot end a thread, so one that hangs is abandoned: its candidates have failed, and the thread counts as a call in flight
until it returns. Calls in flight are bounded, in all and for one verifier. When all that a verifier may have hang, it is refused
at once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from expertwire.strategies.verifiers import Candidate, Verifier, VerifierError, VerifierPolicy, checked_scores

MAX_CALLS = 16  # calls in flight
MAX_CALLS_OF_ONE = 4  # calls in flight of one verifier
_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """The outcome of a candidate: its score, or why there is none, and the tokens that an engine computed for it."""

    score: float | VerifierError
    num_tokens: int = 0


@dataclass(eq=False)
class _Question:
    group: int
    candidate: Candidate
    deliver: Callable[[Outcome], None]
    deadline_s: float
    is_open: bool = True

    def answer(self, outcome: Outcome) -> None:
        if self.is_open:
            self.is_open = False
            self.deliver(outcome)


@dataclass(eq=False)
class _Call:
    verifier: Verifier
    questions: list[_Question]
    outcomes: list[Outcome] = field(default_factory=list)


@dataclass(eq=False)
class _Queue:
    verifier: Verifier
    policy: VerifierPolicy
    questions: deque[_Question] = field(default_factory=deque)


class VerifierCalls:
    """Verifiers' calls and what came of them. All methods belong to one thread, that of the frontend.

    Attributes:
        num_calls: calls made.
        num_failed: candidates without a score.
        num_tokens: tokens that engines computed for candidates, late and forgotten ones included.
    """

    def __init__(self) -> None:
        self.num_calls = self.num_failed = self.num_tokens = 0
        self._queues: dict[tuple[int, VerifierPolicy], _Queue] = {}  # by the verifier's id
        self._in_flight: dict[_Call, None] = {}
        self._ended: deque[_Call] = deque()  # written by threads
        self._ready, self._wake = socket.socketpair()
        for end in (self._ready, self._wake):
            end.setblocking(False)

    @property
    def deadline_s(self) -> float | None:
        """When `deliver` must be called though nothing is readable, by `time.monotonic`; None: never."""
        return min((question.deadline_s for question in self._open_questions()), default=None)

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `deliver` has something to deliver."""
        return self._ready.fileno()

    def ask(
        self,
        verifier: Verifier,
        policy: VerifierPolicy,
        group: int,
        candidate: Candidate,
        deliver: Callable[[Outcome], None],
    ) -> None:
        """Queue a candidate of a group. `deliver` is called once, by a later call of `VerifierCalls.deliver`.

        The time limit counts from now. `dispatch` starts the call.
        """
        queue = self._queues.setdefault((id(verifier), policy), _Queue(verifier, policy))
        queue.questions.append(_Question(group, candidate, deliver, time.monotonic() + policy.timeout_s))

    def dispatch(self) -> None:
        """Start calls for the candidates that wait, as many as may be in flight."""
        for key, queue in list(self._queues.items()):
            while queue.questions and self._may_call(queue.verifier):
                count = min(len(queue.questions), queue.policy.max_batch)
                batch = [question for question in (queue.questions.popleft() for _ in range(count)) if question.is_open]
                if batch:
                    self._call(queue.verifier, batch)
            if not queue.questions:
                del self._queues[key]
        if self._refused():
            self._poke()

    def deliver(self) -> None:
        """Deliver what has come and what is late, and start further calls."""
        with contextlib.suppress(BlockingIOError):
            while self._ready.recv(4096):
                pass
        while self._ended:
            call = self._ended.popleft()
            del self._in_flight[call]
            for question, outcome in zip(call.questions, call.outcomes, strict=True):
                self.num_tokens += outcome.num_tokens
                self._answer(question, outcome)
        now = time.monotonic()
        for question in self._open_questions():
            if question.deadline_s <= now:
                self._answer(question, Outcome(VerifierError("the verifier has not answered in time")))
        self.dispatch()
        for queue, num_hanging in self._refused():
            while queue.questions:
                text = f"{num_hanging} calls of verifiers have not returned in time, and no more may be in flight"
                self._answer(queue.questions.popleft(), Outcome(VerifierError(text)))

    def forget(self, group: int) -> None:
        """Forget the candidates of a group that has ended."""
        for question in self._open_questions():
            if question.group == group:
                question.is_open = False

    def close(self) -> None:
        """Forget everything. Threads that are still in a verifier end when it returns. Idempotent."""
        self._queues.clear()
        self._ready.close()
        self._wake.close()

    def _open_questions(self) -> list[_Question]:
        waiting = [question for queue in self._queues.values() for question in queue.questions]
        asked = [question for call in self._in_flight for question in call.questions]
        return [question for question in waiting + asked if question.is_open]

    def _answer(self, question: _Question, outcome: Outcome) -> None:
        self.num_failed += question.is_open and isinstance(outcome.score, VerifierError)
        question.answer(outcome)

    def _may_call(self, verifier: Verifier) -> bool:
        of_one = sum(call.verifier is verifier for call in self._in_flight)
        return of_one < getattr(verifier, "max_calls", MAX_CALLS_OF_ONE) and len(self._in_flight) < MAX_CALLS

    def _refused(self) -> list[tuple[_Queue, int]]:
        """Return the queues that wait for calls of which all hang, and the number of these."""
        found = []
        for queue in self._queues.values():
            calls = [call for call in self._in_flight if call.verifier is queue.verifier] or list(self._in_flight)
            is_stuck = not self._may_call(queue.verifier) and not any(map(_has_time, calls))
            if queue.questions and is_stuck:
                found.append((queue, len(calls)))
        return found

    def _call(self, verifier: Verifier, questions: list[_Question]) -> None:
        call = _Call(verifier, questions)
        self._in_flight[call] = None
        self.num_calls += 1
        threading.Thread(target=self._run, args=(call,), name="verifier", daemon=True).start()

    def _run(self, call: _Call) -> None:
        """Call the verifier; runs in a thread of its own."""
        groups = {question.group for question in call.questions}
        call.outcomes = _outcomes(call.verifier, call.questions)
        if len(groups) > 1 and isinstance(call.outcomes[0].score, VerifierError):
            before = [outcome.num_tokens for outcome in call.outcomes]
            by_group = itertools.groupby(sorted(call.questions, key=attrgetter("group")), key=attrgetter("group"))
            alone = {id(q): o for _, of_one in by_group for q, o in _scored(call.verifier, list(of_one))}
            again = [alone[id(question)] for question in call.questions]
            call.outcomes = [
                Outcome(outcome.score, outcome.num_tokens + num) for outcome, num in zip(again, before, strict=True)
            ]
        self._ended.append(call)
        self._poke()

    def _poke(self) -> None:
        with contextlib.suppress(OSError):  # full: it is readable; closed: nobody waits
            self._wake.send(b"x")


def _has_time(call: _Call) -> bool:
    """Return whether anybody still waits for a call. Nobody does for one whose candidates are late."""
    now = time.monotonic()
    return any(question.deadline_s > now for question in call.questions)


def _scored(verifier: Verifier, questions: Sequence[_Question]) -> list[tuple[_Question, Outcome]]:
    return list(zip(questions, _outcomes(verifier, questions), strict=True))


def _outcomes(verifier: Verifier, questions: Sequence[_Question]) -> list[Outcome]:
    """Return the scores of all the candidates, or for each of them why there is none."""
    try:
        scores = verifier([question.candidate for question in questions])
        return [Outcome(score, getattr(score, "num_tokens", 0)) for score in checked_scores(scores, len(questions))]
    except VerifierError as error:
        failed = error
    except SystemExit as error:
        failed = VerifierError(f"the verifier has raised SystemExit: {error}")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the verifier's
        _log.warning("warning: a verifier has raised an exception", exc_info=True)
        failed = VerifierError(f"the verifier has raised {type(error).__name__}: {error}"[:1000])
    num_tokens = failed.num_tokens if len(failed.num_tokens) == len(questions) else (0,) * len(questions)
    return [Outcome(failed, num) for num in num_tokens]
