"""Thinking control by its definition: a request alone, in plain Python, looking at all of its output for every token."""

from __future__ import annotations

from typing import NamedTuple


class Marks(NamedTuple):
    """Tokens of a model: see `expertwire.kernels.ops.thinking`."""

    start: tuple[int, ...]
    end: int
    wait: int
    eos: frozenset[int]
    sentence_ends: frozenset[int]


class Limits(NamedTuple):
    """The limits of a request; no budget: infinity."""

    budget: float = float("inf")
    grace: int = 0
    minimum: int = 0


def split(output, marks, is_open):
    """Return the stretches of reasoning, whether the last one is open, and what follows the last closing delimiter."""
    stretches, rest = [], list(output)
    while True:
        if is_open:
            stretches.append(rest[: rest.index(marks.end)] if marks.end in rest else rest)
            if marks.end not in rest:
                return stretches, True, []
            rest, is_open = rest[rest.index(marks.end) + 1 :], False
        size = len(marks.start)
        found = [i for i in range(len(rest)) if tuple(rest[i : i + size]) == marks.start]
        if not found:
            return stretches, False, rest
        rest, is_open = rest[found[0] + size :], True


def num_reasoning(output, marks, is_open):
    return sum(map(len, split(output, marks, is_open)[0]))


def banned(output, marks, limits, is_open):
    """Return the token that cannot be drawn next, or None."""
    stretches, is_open, rest = split(output, marks, is_open)
    if is_open or sum(map(len, stretches)) < limits.budget:
        return None
    if len(marks.start) == 1:
        return marks.start[0]
    return marks.start[1] if rest[-1:] == [marks.start[0]] else None


def chosen(drawn, output, marks, limits, is_open):
    """Return the token that takes the place of the drawn one."""
    stretches, is_open, _ = split(output, marks, is_open)
    if not is_open:
        return drawn
    num, last = sum(map(len, stretches)), stretches[-1][-1:]
    sentence_ended = not last or last[0] in marks.sentence_ends
    if num >= limits.budget + limits.grace or (num >= limits.budget and sentence_ended):
        return marks.end
    return marks.wait if num < limits.minimum and drawn in {marks.end, *marks.eos} else drawn
