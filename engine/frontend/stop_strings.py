"""Search for stop strings in an output's text, in one pass however many they are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


class _State:
    """A state of the automaton: a prefix of at least one stop string, which the text ends with.

    Attributes:
        first, last: the sorted strings with this prefix are `strings[first:last]`.
        depth: length of the prefix.
        children: known states of one more character.
        fail: state of the longest proper suffix that is a prefix of a stop string; None until `StopAutomaton.step` links it.
        found: longest stop string that the prefix ends with, or None.
    """

    __slots__ = ("children", "depth", "fail", "first", "found", "last")

    def __init__(self, first: int, last: int, depth: int) -> None:
        self.first = first
        self.last = last
        self.depth = depth
        self.children: dict[str, _State] = {}
        self.fail: _State | None = None
        self.found: str | None = None


class StopAutomaton:
    """The Aho-Corasick automaton of a request's stop strings, which all of its branches share.

    Its states are made when a text first reaches them, so a request pays for sorting its strings and for what the model writes,
    and not for every character of the strings. Libraries do not tell a state's depth, which is the length of the text to hold
    back.

    Args:
        strings: the stop strings; at least one, none empty.

    Attributes:
        root: the state before any text.
        initials: first characters of the strings; any other leads from the root to the root.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(set(strings))
        self.root = _State(0, len(self._strings), 0)
        self.initials = frozenset(string[0] for string in self._strings)

    def step(self, state: _State, character: str) -> _State:
        """Return the state after one more character; amortised constant time."""
        unlinked: list[_State] = []
        node: _State | None = state
        target = self.root
        while node is not None:
            if (child := self._child(node, character)) is not None:
                if node is self.root:
                    child.fail = self.root
                if child.fail is not None:
                    target = child
                    break
                unlinked.append(child)
            node = node.fail
        for child in reversed(unlinked):
            child.fail = target
            child.found = child.found or target.found
            target = child
        return target

    def _child(self, state: _State, character: str) -> _State | None:
        """Return the state of the prefix with one more character, or None if no string has it."""
        if (child := state.children.get(character)) is not None:
            return child
        if state is self.root and character not in self.initials:
            return None
        end = state.depth + 1

        def letter(string: str) -> str:
            return string[state.depth : end]

        first = bisect_left(self._strings, character, state.first, state.last, key=letter)
        last = bisect_right(self._strings, character, first, state.last, key=letter)
        if first == last:
            return None
        child = state.children[character] = _State(first, last, end)
        if len(self._strings[first]) == end:  # the shortest sorts first
            child.found = self._strings[first]
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
        self._state = automaton.root
        self._held = ""  # as long as the state is deep

    def push(self, text: str) -> str:
        """Add text; return what certainly comes before any stop string. Not to be called once `found` is set."""
        root, initials, step = self._automaton.root, self._automaton.initials, self._automaton.step
        held, state = self._held + text, self._state
        for end, character in enumerate(text, start=len(self._held) + 1):
            if state is root and character not in initials:
                continue
            state = step(state, character)
            if state.found is not None:
                self.found = state.found
                self._held = ""
                return held[: end - len(state.found)]
        self._state = state
        cut = len(held) - state.depth
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """Return the text held back, as no more follows."""
        held, self._held, self._state = self._held, "", self._automaton.root
        return held
