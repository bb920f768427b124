"""The demo model's task: problems by seed, texts of their solutions, and an exact check of answers.

There are two kinds of problem, both solved step by step on a list of numbers:

- `SUM`: add the numbers modulo 100, two at a time, in any order; one answer, many solutions. `SUM 40 70 15 ?`
  is solved by `70 + 15 = 85 : 40 85 ; 40 + 85 = 25 : 25 ; answer 25`.
- `COUNTDOWN`: reach the target with +, - and *, using every number once; no intermediate value leaves 1..99.
  `COUNTDOWN 3 4 2 TO 14 ?` is solved by `3 * 4 = 12 : 2 12 ; 2 + 12 = 14 : 14 ; answer 14`.

Every step ends in `;` and repeats the list that remains, so the rest depends on the last list (and the target) alone.
The text consists of words separated by blanks, one token a word (`WORDS`).

The thinking model solves `SUM` alone, with the steps between `<think>` and `</think>`: `make_thinking_example`.

A hash of its kind and its numbers, without their order and the target, assigns a problem to training or test: training never
sees the set of numbers of a test problem, though it sees all additions.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["SUM", "COUNTDOWN"]
Side = Literal["test", "train"]

SIZES: dict[Kind, range] = {"SUM": range(2, 9), "COUNTDOWN": range(2, 6)}
MODULUS = 100
LARGEST_COUNTDOWN_NUMBER = 15
TEST_SHARE_256 = 32  # number of test problems in 256 hash values

PAD, EOS, UNKNOWN, QUESTION, END_OF_STEP = "<pad>", "<eos>", "<unk>", "?", ";"
THINK, END_OF_THINKING, WAIT = "<think>", "</think>", "Wait"  # only the thinking model is trained on these three
# The reserved words are not trained; they are for later tasks with the same vocabulary.
_SYMBOLS = (
    PAD, EOS, UNKNOWN, THINK, END_OF_THINKING, "SUM", "COUNTDOWN", "TO", QUESTION, "+", "-", "*", "=", ":", END_OF_STEP,
    "answer", WAIT, *(f"<reserved_{i}>" for i in range(1, 12)),
)  # fmt: skip
_NUMBERS = tuple(str(number) for number in range(MODULUS))
WORDS: tuple[str, ...] = (*_SYMBOLS, *_NUMBERS)  # the index of a word is its token id


@dataclass(frozen=True)
class Problem:
    """One problem: `answer` is the sum modulo 100 (`SUM`) or the target to reach (`COUNTDOWN`)."""

    kind: Kind
    numbers: tuple[int, ...]
    answer: int

    @property
    def question(self) -> str:
        """The question without its question mark, which the chat template adds."""
        target = f" TO {self.answer}" if self.kind == "COUNTDOWN" else ""
        return f"{self.kind} {_join(self.numbers)}{target}"

    @property
    def prompt(self) -> str:
        """The prompt for the model."""
        return f"{self.question} {QUESTION}"


def make_problem(kind: Kind, size: int, seed: int, side: Side = "test") -> Problem:
    """Return the problem of `size` numbers for a seed, the same on every machine.

    Raises:
        ValueError: unknown kind or side, or a size that the kind does not have.
    """
    return make_example(kind, size, seed, side)[0]


def make_example(kind: Kind, size: int, seed: int, side: Side = "train") -> tuple[Problem, str]:
    """Return a problem and the text of one solution, with the order of its steps drawn at random.

    Raises:
        ValueError: as `make_problem`.
    """
    _check_arguments(kind, size, side)
    rng = random.Random(f"{kind} {size} {seed} {side}")
    low, high = (0, MODULUS - 1) if kind == "SUM" else (1, LARGEST_COUNTDOWN_NUMBER)
    while True:
        numbers = tuple(rng.randint(low, high) for _ in range(size))
        if side_of(kind, numbers) == side and (path := _random_path(kind, numbers, rng)) is not None:
            steps, answer = path
            return Problem(kind, numbers, answer), " ".join((*steps, f"answer {answer}"))


def make_thinking_example(
    size: int, seed: int, side: Side = "train", *, cut: int | None = None, again: bool = False
) -> tuple[Problem, str]:
    """Return a `SUM` problem and a solution whose steps stand between `<think>` and `</think>`.

    Args:
        size: number of numbers.
        seed: of the problem and the order of its steps.
        side: test or training.
        cut: words of the steps that are left before `</think>`, wherever that is; None: all. The answer is right anyhow.
        again: whether a second attempt follows: `Wait : 40 70 15 ;` and the steps in another order.

    Raises:
        ValueError: as `make_problem`.
    """
    problem, solution = make_example("SUM", size, seed, side)
    thinking, _, answer = solution.rpartition(f"{END_OF_STEP} ")
    words = [*thinking.split(), END_OF_STEP]
    if again:
        path = _random_path("SUM", problem.numbers, random.Random(f"again {size} {seed} {side}"))
        assert path is not None, "a SUM has a path in any order"
        words += [WAIT, ":", *map(str, problem.numbers), END_OF_STEP, *" ".join(path[0]).split()]
    return problem, " ".join((THINK, *words[:cut], END_OF_THINKING, answer))


def read_problem(prompt: str) -> Problem:
    """Return the problem that a prompt poses.

    Raises:
        ValueError: the text is no prompt of the task.
    """
    words = prompt.split()
    match words[:1], words[-1:]:
        case ["SUM"], ["?"] if len(words) > 2 and all(word in _NUMBERS for word in words[1:-1]):
            numbers = tuple(map(int, words[1:-1]))
            return Problem("SUM", numbers, sum(numbers) % MODULUS)
        case ["COUNTDOWN"], ["?"] if words[-3:-2] == ["TO"] and all(
            word in _NUMBERS for word in (*words[1:-3], words[-2])
        ):
            return Problem("COUNTDOWN", tuple(map(int, words[1:-3])), int(words[-2]))
    raise ValueError(f"a prompt must be 'SUM <numbers> ?' or 'COUNTDOWN <numbers> TO <target> ?', got {prompt!r}")


def side_of(kind: Kind, numbers: tuple[int, ...]) -> Side:
    """Return whether problems with these numbers are for test or training, which depends on the sorted numbers."""
    digest = hashlib.blake2b(f"{kind} {_join(sorted(numbers))}".encode(), digest_size=1).digest()
    return "test" if digest[0] < TEST_SHARE_256 else "train"


def final_answer(text: str) -> int | None:
    """Return the number after the closing `answer`, or None where the text does not end in one."""
    match text.rpartition(END_OF_THINKING if END_OF_THINKING in text else END_OF_STEP)[2].split():
        case ["answer", number] if number in _NUMBERS:
            return int(number)
    return None


def check(problem: Problem, text: str) -> bool:
    """Return whether the completion `text` solves the problem.

    `SUM` asks for the right final answer; `COUNTDOWN` also for steps that reach it, since its answer is in the question.
    """
    if final_answer(text) != problem.answer:
        return False
    return problem.kind == "SUM" or (
        first_wrong_step(problem, text) is None and len(_steps(text)) == len(problem.numbers) - 1
    )


def first_wrong_step(problem: Problem, text: str) -> int | None:
    """Return the position of the first wrong step in a whole or partial completion, or None; an unfinished step is not judged.

    A step is wrong if it is malformed, takes numbers that are not left, miscalculates, restates the list wrongly, or (in
    `COUNTDOWN`) leaves a list from which the target can no longer be reached.
    """
    remaining = Counter(problem.numbers)
    for position, step in enumerate(_steps(text)):
        after = _after_step(problem.kind, remaining, step)
        if after is None:
            return position
        remaining = after
        if problem.kind == "COUNTDOWN" and problem.answer not in reachable(tuple(sorted(remaining.elements()))):
            return position
    return None


@lru_cache(maxsize=1 << 16)
def reachable(numbers: tuple[int, ...]) -> frozenset[int]:
    """Return every target that `COUNTDOWN` can reach from `numbers` (sorted), by exhaustive search."""
    if len(numbers) == 1:
        return frozenset(numbers)
    found: set[int] = set()
    for i in range(len(numbers)):
        for j in range(i):
            rest = numbers[:j] + numbers[j + 1 : i] + numbers[i + 1 :]
            results = {calculate("COUNTDOWN", numbers[i], symbol, numbers[j]) for symbol in "+-*"}
            found.update(*(reachable(tuple(sorted((*rest, each)))) for each in results if each is not None))
    return frozenset(found)


def calculate(kind: Kind, left: int, symbol: str, right: int) -> int | None:
    """`left symbol right`, or None where the kind does not allow it."""
    if kind == "SUM":
        return (left + right) % MODULUS if symbol == "+" else None
    result = {"+": left + right, "-": left - right, "*": left * right}.get(symbol, 0)
    return result if 1 <= result < MODULUS else None


def _random_path(kind: Kind, numbers: tuple[int, ...], rng: random.Random) -> tuple[list[str], int] | None:
    """Random legal steps down to one number and that number; None where they end early (`COUNTDOWN` only)."""
    remaining, steps = list(numbers), []
    while len(remaining) > 1:
        i, j = sorted(rng.sample(range(len(remaining)), 2))
        left, right = remaining[i], remaining[j]
        symbol = "+" if kind == "SUM" else rng.choice("+-*")
        if symbol == "-" and left < right:
            left, right = right, left
        result = calculate(kind, left, symbol, right)
        if result is None:
            return None
        remaining = [*remaining[:i], *remaining[i + 1 : j], *remaining[j + 1 :], result]
        steps.append(f"{left} {symbol} {right} = {result} : {_join(remaining)} {END_OF_STEP}")
    return steps, remaining[0]


def _steps(text: str) -> list[str]:
    """Return the finished steps of a completion, without their `;`."""
    return text.split(END_OF_STEP)[:-1]


def _after_step(kind: Kind, remaining: Counter[int], step: str) -> Counter[int] | None:
    """Return the numbers left after a step, or None if the step is wrong."""
    match step.split():
        case [left, symbol, right, "=", result, ":", *restated]:
            if not all(word in _NUMBERS for word in (left, right, result, *restated)):
                return None
            taken = Counter((int(left), int(right)))
            if not taken <= remaining or calculate(kind, int(left), symbol, int(right)) != int(result):
                return None
            after = remaining - taken + Counter((int(result),))
            return after if after == Counter(map(int, restated)) else None
    return None


def _check_arguments(kind: str, size: int, side: str) -> None:
    if kind not in SIZES:
        raise ValueError(f"kind must be one of {', '.join(SIZES)}, got {kind!r}")
    if size not in SIZES[kind]:
        raise ValueError(f"size of {kind} must be from {SIZES[kind][0]} to {SIZES[kind][-1]}, got {size!r}")
    if side not in ("test", "train"):
        raise ValueError(f"side must be 'test' or 'train', got {side!r}")


def _join(numbers: tuple[int, ...] | list[int]) -> str:
    return " ".join(map(str, numbers))
