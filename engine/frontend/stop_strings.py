"""Search for stop strings in an output's text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Search for stop strings in text that arrives in pieces.

    The first stop string to be completed is found, however the text is cut; of several completed by the same character it is
    the longest.

    Args:
        strings: the stop strings; at least one, none empty.

    Attributes:
        found: the stop string that was found, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = tuple(strings)
        self._initials = frozenset(string[0] for string in strings)
        self._longest = max(map(len, strings))
        self._held = ""

    def push(self, text: str) -> str:
        """Add text; return what certainly comes before any stop string. Not to be called once `found` is set."""
        held = self._held + text
        matches = [(at + len(string), at, string) for string in self._strings if (at := held.find(string)) >= 0]
        if matches:
            _, cut, self.found = min(matches)
            self._held = ""
            return held[:cut]
        cut = self._begin_of_match(held)
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """Return the text held back, as no more follows."""
        held, self._held = self._held, ""
        return held

    def _begin_of_match(self, text: str) -> int:
        """Return where the longest suffix of `text` begins that is a prefix of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._initials and any(string.startswith(text[at:]) for string in self._strings):
                return at
        return len(text)
