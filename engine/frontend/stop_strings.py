"""Search for stop strings in an output's text, in one pass however many they are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

ROOT = 0  # the state before any text


class StopAutomaton:
    """The Aho-Corasick automaton of a request's stop strings, which all of its branches share.

    A state is a prefix of at least one stop string, which the text ends with. States are made when a text first reaches them, so
    a request pays for sorting its strings and for what the model writes, and not for every character of the strings. They are
    numbers, as objects would refer to each other in circles. Libraries do not tell a state's depth, which is the length of the
    text to hold back.

    Args:
        strings: the stop strings; at least one, none empty.

    Attributes:
        initials: first characters of the strings; any other leads from the root to the root.
        depth: by state, the length of the prefix.
        found: by state, the longest stop string that the prefix ends with, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(set(strings))
        self.initials = frozenset(string[0] for string in self._strings)
        self.depth = [0]
        self.found: list[str | None] = [None]
        self._range = [(0, len(self._strings))]  # by state, the place of the sorted strings with this prefix
        self._children: dict[tuple[int, str], int] = {}  # by state and one more character
        # By state, that of the longest proper suffix that is a prefix of a stop string; None until `step` links it.
        self._fail: list[int | None] = [None]

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character; amortised constant time."""
        unlinked: list[int] = []
        node: int | None = state
        target = ROOT
        while node is not None:
            if (child := self._child(node, character)) is not None:
                if node == ROOT:
                    self._fail[child] = ROOT
                if self._fail[child] is not None:
                    target = child
                    break
                unlinked.append(child)
            node = self._fail[node]
        for child in reversed(unlinked):
            self._fail[child] = target
            self.found[child] = self.found[child] or self.found[target]
            target = child
        return target

    def _child(self, state: int, character: str) -> int | None:
        """Return the state of the prefix with one more character, or None if no string has it."""
        if (child := self._children.get((state, character))) is not None:
            return child
        if state == ROOT and character not in self.initials:
            return None
        depth, (begin, stop) = self.depth[state], self._range[state]
        end = depth + 1

        def letter(string: str) -> str:
            return string[depth:end]

        first = bisect_left(self._strings, character, begin, stop, key=letter)
        last = bisect_right(self._strings, character, first, stop, key=letter)
        if first == last:
            return None
        child = self._children[state, character] = len(self.depth)
        self.depth.append(end)
        self.found.append(
            self._strings[first] if len(self._strings[first]) == end else None
        )  # the shortest sorts first
        self._range.append((first, last))
        self._fail.append(None)
        return child


class StopStrings:
    """Search for stop strings in text that arrives in pieces.

    The first stop string to be completed is found, however the text is cut; of several completed by the same character it is
    the longest.

    Args:
        automaton: the automaton of the stop strings.

    Attributes:
        found: the stop string that was found, or None.
    """

    def __init__(self, automaton: StopAutomaton) -> None:
        self.found: str | None = None
        self._automaton = automaton
        self._state = ROOT
        self._held = ""  # as long as the state is deep

    def push(self, text: str) -> str:
        """Add text; return what certainly comes before any stop string. Not to be called once `found` is set."""
        initials, step, all_found = self._automaton.initials, self._automaton.step, self._automaton.found
        held, state = self._held + text, self._state
        for end, character in enumerate(text, start=len(self._held) + 1):
            if state == ROOT and character not in initials:
                continue
            state = step(state, character)
            if (found := all_found[state]) is not None:
                self.found = found
                self._held = ""
                return held[: end - len(found)]
        self._state = state
        cut = len(held) - self._automaton.depth[state]
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """Return the text held back, as no more follows."""
        held, self._held, self._state = self._held, "", ROOT
        return held
