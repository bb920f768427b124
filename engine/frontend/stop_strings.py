"""Finding stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for the first stop string to be completed; how the text is cut into pieces makes no difference.

    Of several that are completed by the same character, the longest counts.

    Args:
        strings: at least one, none empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = tuple(strings)
        self._initials = frozenset(string[0] for string in strings)
        self._longest = max(map(len, strings))
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string. Once `found` is set, push no more."""
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
        """What is held back when no text follows."""
        held, self._held = self._held, ""
        return held

    def _begin_of_match(self, text: str) -> int:
        """Where the longest end of `text` begins that a stop string starts with."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._initials and any(string.startswith(text[at:]) for string in self._strings):
                return at
        return len(text)
