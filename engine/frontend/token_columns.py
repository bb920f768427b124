"""Outputs for readers of many sequences: steps' rows as arrays, over which Python does not loop but to make their text.

A frontend has one table of such sequences. Their ids are `FIRST_ID` and above, which tells their rows from others; an id's place
in the table is its remainder by the size of the table, in which no two have the same place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from expertwire.engine.frontend.tokenizer import ReasoningIds

FIRST_ID = 1 << 39
_SIZE = 1024  # of the table, to begin with; a power of two, as all later ones are
_NO_LIMIT = 1 << 60
_ROW = np.dtype(
    [
        ("sequence_id", np.int64),  # -1: free
        ("reader", np.int64),
        ("key", np.int64),  # of the sequence's request, chosen by the reader
        ("branch", np.int64),
        ("num_tokens", np.int64),  # sampled so far
        ("num_reasoning", np.int64),  # of them, those between the delimiters of reasoning
        ("begun", np.int64),  # tokens of the start of reasoning that have come; all of them: within reasoning
        ("num_uncredited", np.int64),  # tokens taken since the last `messages.Credit`
        ("threshold", np.int64),  # of uncredited tokens, from which on they are credited
        ("allowance", np.int64),  # tokens that the reader allows beyond those credited
    ]
)


class Tokens(NamedTuple):
    """Tokens of some sequences, i64: an entry for each, whose `num_tokens` tokens are the next in `token_ids`.

    `texts` has their text; it is empty if the reader takes token ids only.
    """

    keys: np.ndarray
    branches: np.ndarray
    num_tokens: np.ndarray
    token_ids: np.ndarray
    texts: list[str]


class _Part(NamedTuple):
    """A token of each of some sequences, and its text, as in `Tokens`."""

    sequence_ids: np.ndarray
    keys: np.ndarray
    branches: np.ndarray
    token_ids: np.ndarray
    texts: list[str]


class Credited(NamedTuple):
    """Sequences that may sample more, and how many tokens each, i64."""

    sequence_ids: np.ndarray
    tokens: np.ndarray


class ColumnReader:
    """A reader of some sequences.

    Args:
        on_news: called when there are tokens that have not been taken, for each step.

    Attributes:
        number: the table's number of it; -1 until it has a sequence.
        push_text: by sequence, returns the text of its next token and finish reason; of all sequences, or of none.
    """

    def __init__(self, on_news: Callable[[], None]) -> None:
        self.number = -1
        self.push_text: dict[int, Callable[[int, int], str]] = {}
        self._on_news = on_news
        self._parts: deque[_Part] = deque()

    @property
    def has_tokens(self) -> bool:
        """True if there are tokens that have not been taken."""
        return bool(self._parts)

    def put(
        self,
        sequence_ids: np.ndarray,
        keys: np.ndarray,
        branches: np.ndarray,
        token_ids: np.ndarray,
        finish: np.ndarray,
    ) -> None:
        """Add a token of each of these sequences, with its finish reason."""
        texts: list[str] = []
        if push := self.push_text:
            rows = zip(sequence_ids.tolist(), token_ids.tolist(), finish.tolist(), strict=True)
            texts = [push[sequence_id](token, why) for sequence_id, token, why in rows]
        self._parts.append(_Part(sequence_ids, keys, branches, token_ids, texts))
        self._on_news()

    def take(self, max_tokens: int) -> tuple[np.ndarray, Tokens]:
        """Return at most about so many of the tokens, and the ids of the entries' sequences."""
        parts: list[_Part] = []
        size = 0
        while self._parts and size < max_tokens:
            parts.append(self._parts.popleft())
            size += len(parts[-1].keys)
        if len(parts) == 1:
            [part] = parts
            num_tokens = np.ones(len(part.keys), np.int64)
            return part.sequence_ids, Tokens(part.keys, part.branches, num_tokens, part.token_ids, part.texts)
        sequence_ids, keys, branches, token_ids = (
            np.concatenate(columns) for columns in list(zip(*parts, strict=True))[:4]
        )
        order = np.argsort(sequence_ids, kind="stable")
        sequence_ids = sequence_ids[order]
        starts = np.flatnonzero(np.diff(sequence_ids, prepend=-1))
        counts, first = np.diff(starts, append=len(order)), order[starts]
        texts = [text for part in parts for text in part.texts]
        if texts:
            sorted_texts = [texts[row] for row in order.tolist()]
            bounds = zip(starts.tolist(), (starts + counts).tolist(), strict=True)
            texts = ["".join(sorted_texts[start:end]) for start, end in bounds]
        return sequence_ids[starts], Tokens(keys[first], branches[first], counts, token_ids[order], texts)


class TokenColumns:
    """The table of one frontend.

    Args:
        reasoning: the tokens around reasoning; None if the model has none.
    """

    def __init__(self, reasoning: ReasoningIds | None) -> None:
        self._reasoning_start = np.array([] if reasoning is None else reasoning.start, np.int64)
        self._reasoning_end = None if reasoning is None else reasoning.end
        self._rows = np.zeros(_SIZE, _ROW)
        self._rows["sequence_id"] = -1
        self._num_used = 0
        self._next_id = FIRST_ID
        self._readers: dict[int, ColumnReader] = {}
        self._next_reader = 0

    def add(
        self,
        reader: ColumnReader,
        key: int,
        branch: int,
        window: int | None,
        allowance: int | None,
        *,
        opens_reasoning: bool,
    ) -> int:
        """Add a sequence; return its id.

        Args:
            reader: gets its tokens.
            key, branch: for the reader.
            window: tokens that may be sampled and not taken; None if all that it can sample fit.
            allowance: tokens that the reader allows beyond the window; None: any number.
            opens_reasoning: whether the prompt ends with the start of reasoning.
        """
        if reader.number < 0:
            reader.number = self._next_reader
            self._readers[reader.number] = reader
            self._next_reader += 1
        if 2 * self._num_used >= len(self._rows):
            self._grow()
        while self._rows["sequence_id"][self._next_id % len(self._rows)] >= 0:
            self._next_id += 1
        sequence_id = self._next_id
        self._next_id += 1
        threshold = _NO_LIMIT if window is None else window // 2
        allowance = _NO_LIMIT if allowance is None else allowance
        row = self._rows[sequence_id % len(self._rows)]
        for name, value in (
            ("sequence_id", sequence_id), ("reader", reader.number), ("key", key), ("branch", branch), ("num_tokens", 0),
            ("num_reasoning", 0), ("begun", len(self._reasoning_start) if opens_reasoning else 0), ("num_uncredited", 0),
            ("threshold", threshold), ("allowance", allowance),
        ):  # fmt: skip
            row[name] = value
        self._num_used += 1
        return sequence_id

    def remove(self, sequence_id: int) -> tuple[int, int]:
        """Remove a sequence; return the number of its tokens, and of those of reasoning."""
        row = self._rows[sequence_id % len(self._rows)]
        assert row["sequence_id"] == sequence_id, f"sequence {sequence_id} is not in the table"
        row["sequence_id"] = -1
        self._readers[int(row["reader"])].push_text.pop(sequence_id, None)
        self._num_used -= 1
        return int(row["num_tokens"]), int(row["num_reasoning"])

    def remove_reader(self, reader: ColumnReader) -> None:
        """Remove a reader, whose sequences have been removed."""
        self._readers.pop(reader.number, None)

    def push(self, sequence_ids: np.ndarray, token_ids: np.ndarray, finish: np.ndarray) -> np.ndarray:
        """Give a token of each of these sequences, with its finish reason, to its reader; removed sequences are ignored.

        Returns:
            Whether it is the sequence's first token.
        """
        place = sequence_ids % len(self._rows)
        known = self._rows["sequence_id"][place] == sequence_ids
        is_first = known & (self._rows["num_tokens"][place] == 0)
        if not known.all():
            place, sequence_ids, token_ids, finish = (
                column[known] for column in (place, sequence_ids, token_ids, finish)
            )
        if not len(place):
            return is_first
        self._rows["num_tokens"][place] += 1
        if self._reasoning_end is not None:
            self._count_reasoning(place, token_ids)
        readers, keys, branches = (self._rows[name][place] for name in ("reader", "key", "branch"))
        if (readers == readers[0]).all():
            self._readers[int(readers[0])].put(sequence_ids, keys, branches, token_ids, finish)
            return is_first
        for number in np.unique(readers).tolist():
            own = readers == number
            columns = (sequence_ids, keys, branches, token_ids, finish)
            self._readers[number].put(*(column[own] for column in columns))
        return is_first

    def taken(self, sequence_ids: np.ndarray, num_tokens: np.ndarray) -> Credited:
        """Take note that so many tokens of these sequences, each once, have been taken; return what may be sampled instead."""
        place = sequence_ids % len(self._rows)
        place = place[runs := self._rows["sequence_id"][place] == sequence_ids]
        self._rows["num_uncredited"][place] += num_tokens[runs]
        return self._credit(place)

    def grant(self, sequence_id: int, tokens: int) -> Credited:
        """Take note that the reader of a sequence allows more tokens; return what may be sampled now."""
        place = np.array([sequence_id % len(self._rows)])
        assert self._rows["sequence_id"][place[0]] == sequence_id, f"sequence {sequence_id} is not in the table"
        self._rows["allowance"][place] += tokens
        return self._credit(place)

    def _count_reasoning(self, place: np.ndarray, token_ids: np.ndarray) -> None:
        begun, start = self._rows["begun"][place], self._reasoning_start
        is_open, is_end = begun == len(start), token_ids == self._reasoning_end
        self._rows["num_reasoning"][place] += is_open & ~is_end
        matches = token_ids == start[np.minimum(begun, len(start) - 1)]
        begins = np.where(matches, begun + 1, token_ids == start[0])
        self._rows["begun"][place] = np.where(is_open, np.where(is_end, 0, begun), begins)

    def _credit(self, place: np.ndarray) -> Credited:
        place = place[self._rows["num_uncredited"][place] >= self._rows["threshold"][place]]
        tokens = np.minimum(self._rows["num_uncredited"][place], self._rows["allowance"][place])
        place, tokens = place[tokens > 0], tokens[tokens > 0]
        self._rows["num_uncredited"][place] -= tokens
        self._rows["allowance"][place] -= tokens
        return Credited(self._rows["sequence_id"][place], tokens)

    def _grow(self) -> None:
        """Double the table: places that differ by the smaller size differ by the larger one."""
        used = self._rows[self._rows["sequence_id"] >= 0]
        self._rows = np.zeros(2 * len(self._rows), _ROW)
        self._rows["sequence_id"] = -1
        self._rows[used["sequence_id"] % len(self._rows)] = used
