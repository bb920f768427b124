"""Log-probabilities of a step's outputs, as arrays until somebody looks at them. Shape letters as in `scheduler.outputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from expertwire.engine.frontend.api import Logprob, Position
from expertwire.engine.frontend.open_requests import Branch
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.scheduler.outputs import StepOutputs

_NO_IDS, _NO_LOGPROBS = np.zeros(0, np.int32), np.zeros(0, np.float32)


class PositionLogprobs(Mapping[int, Logprob]):
    """Log-probabilities at one position by token id: the sampled (or the prompt's) token first, then the most probable ones.

    Args:
        own: id, log-probability and rank of the sampled token.
        top_ids: the most probable tokens in descending order, i32.
        top_logprobs: theirs, f32.
        text_of: returns the text of a token.
    """

    __slots__ = ("_own", "_text_of", "_top_ids", "_top_logprobs")

    def __init__(
        self,
        own: tuple[int, float, int],
        top_ids: np.ndarray,
        top_logprobs: np.ndarray,
        text_of: Callable[[int], str | None],
    ) -> None:
        self._own = own
        self._top_ids = top_ids
        self._top_logprobs = top_logprobs
        self._text_of = text_of

    def rows(self) -> Iterator[tuple[int, float, int, str | None]]:
        """Return id, log-probability, rank and text of each token."""
        token, logprob, rank = self._own
        ids, values = self._top_ids.tolist(), self._top_logprobs.tolist()
        ranks = list(range(1, len(ids) + 1))
        if token in ids:
            at = ids.index(token)
            del ids[at], values[at], ranks[at]
        ids.insert(0, token)
        return zip(ids, [logprob, *values], [rank, *ranks], map(self._text_of, ids), strict=True)

    @property
    def sampled(self) -> float:
        """Log-probability of the sampled (or the prompt's) token."""
        return self._own[1]

    def to_dict(self) -> dict[int, Logprob]:
        """Return the entries by token id."""
        return {token: Logprob(logprob, rank, text) for token, logprob, rank, text in self.rows()}

    def __getitem__(self, token: int) -> Logprob:
        return self.to_dict()[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return 1 + len(self._top_ids) - (self._own[0] in self._top_ids)

    def __eq__(self, other: object) -> bool:
        return self.to_dict() == (other.to_dict() if isinstance(other, PositionLogprobs) else other)

    def __repr__(self) -> str:
        return repr(self.to_dict())

    __hash__ = None  # type: ignore[assignment]  # as a dictionary


class SampledLogprobs:
    """Log-probabilities of the rows of a step's outputs.

    Args:
        message: the outputs.
        start, end: the rows.
        tokenizer: None: tokens have no text.
    """

    def __init__(self, message: StepOutputs, start: int, end: int, tokenizer: Tokenizer | None) -> None:
        columns = message.token_O[start:end], message.logprob_O[start:end], message.token_rank_O[start:end]
        self._own = list(zip(*(column.tolist() for column in columns), strict=True))
        self._offsets = message.top_offsets_O1[start : end + 1].tolist()
        self._message = message
        self._start = start
        self._text_of = _text_of(tokenizer)

    def of_row(self, row: int) -> PositionLogprobs:
        """Return those of one row. They are copies, as rows of other requests lie in the same arrays."""
        at = row - self._start
        begin, end, message = self._offsets[at], self._offsets[at + 1], self._message
        if begin == end:
            return PositionLogprobs(self._own[at], _NO_IDS, _NO_LOGPROBS, self._text_of)
        ids, logprobs = message.top_ids[begin:end].copy(), message.top_logprobs[begin:end].copy()
        return PositionLogprobs(self._own[at], ids, logprobs, self._text_of)


def add_prompt_logprobs(message: StepOutputs, sequences: Mapping[int, Branch], tokenizer: Tokenizer | None) -> None:
    """Note the log-probabilities of prompt tokens in the requests of `sequences`, by sequence id."""
    text_of, offsets = _text_of(tokenizer), message.prompt_top_offsets_I1.tolist()
    values = zip(message.prompt_logprob_I.tolist(), message.prompt_token_rank_I.tolist(), strict=True)
    rows = zip(message.prompt_key_I.tolist(), message.prompt_position_I.tolist(), values, strict=True)
    for row, (sequence_id, position, (logprob, rank)) in enumerate(rows):
        branch = sequences.get(sequence_id)
        # The prompt of a preempted request is computed again; its log-probabilities have been reported.
        if branch is None or branch.request.prompt_logprobs is None:
            continue
        top = slice(offsets[row], offsets[row + 1])
        own = int(branch.request.prompt[position]), logprob, rank
        entries = PositionLogprobs(own, message.prompt_top_ids[top], message.prompt_top_logprobs[top], text_of)
        branch.request.prompt_logprobs[position] = entries


def to_dict(position: Position) -> dict[int, Logprob]:
    """Return a position's log-probabilities as a dictionary."""
    return position.to_dict() if isinstance(position, PositionLogprobs) else dict(position)


def sampled_logprob(position: Position) -> float:
    """Return the log-probability of a position's sampled token."""
    return position.sampled if isinstance(position, PositionLogprobs) else next(iter(position.values())).logprob


def rows_of(position: Position) -> Iterable[tuple[int, float, int, str | None]]:
    """Return id, log-probability, rank and text of each token of a position."""
    if isinstance(position, PositionLogprobs):
        return position.rows()
    return [(token, *entry) for token, entry in position.items()]


def _text_of(tokenizer: Tokenizer | None) -> Callable[[int], str | None]:
    return tokenizer.token_text if tokenizer else _no_text


def _no_text(token: int) -> None:
    return None
