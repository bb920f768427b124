"""Search for a text in the tokens of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BETWEEN = "\ud800"  # a lone surrogate, which no decoded text has


class VocabularyText:
    """The texts of all tokens, joined: a client's text is found in some milliseconds, without a loop over tokens.

    Args:
        texts: of the tokens, by id.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._joined = _BETWEEN.join(texts)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        self._starts = np.cumsum(lengths + 1) - lengths - 1

    def ids_with(self, text: str) -> np.ndarray:
        """Return the ids of the tokens whose text contains `text`, i32 ascending."""
        if not text or _BETWEEN in text:
            return np.zeros(0, np.int32)
        parts = self._joined.split(text)  # several times as fast as a loop over matches
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)) + len(text))
        ids = np.searchsorted(self._starts, ends[:-1] - len(text), side="right") - 1
        return ids[np.diff(ids, prepend=-1) > 0].astype(np.int32)
