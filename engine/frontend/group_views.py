"""A group's branches as its run knows them, and the immutable view of them that a strategy is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar, overload

import numpy as np

from expertwire.engine.frontend.api import Logprob, Position, Update
from expertwire.engine.frontend.logprobs import sampled_logprob
from expertwire.strategies.base import Branch, Score, Status
from expertwire.strategies.confidence import FallingWindow, Windows
from expertwire.strategies.verifiers import Candidate

T = TypeVar("T")


class Prefix(Sequence[T]):
    """The first entries of a list to which others are only appended; making one takes no copy."""

    __slots__ = ("_entries", "_length")

    def __init__(self, entries: list[T]) -> None:
        self._entries, self._length = entries, len(entries)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            begin, end, step = index.indices(self._length)
            return tuple(self._entries[begin:end] if step == 1 else [self._entries[i] for i in range(begin, end, step)])
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} of a sequence of {self._length}")
        return self._entries[index % self._length]

    def __iter__(self) -> Iterator[T]:
        return islice(self._entries, self._length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class BranchRun:
    """A branch while its group runs, and after it.

    Attributes:
        index, label, parent, num_shared, num_forced, step_ends: as in `strategies.base.Branch`.
        request_id: the frontend's request that the branch belongs to.
        sequence_id: of the branch in messages to the controller; None if it had no room for a token of its own.
        falling: notices when its confidence falls, if the strategy asked for that.
        positions: log-probabilities of its tokens, if the client asked for them.
        problems: why scores are missing, in the order in which they were asked for.
    """

    def __init__(self, index: int, request_id: int, label: str, falling_window: int | None) -> None:
        self.index = index
        self.label = label
        self.parent: int | None = None
        self.num_shared = self.num_forced = 0
        self.step_ends: list[int] = []
        self.request_id = request_id
        self.sequence_id: int | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self._windows = Windows()
        self.falling = None if falling_window is None else FallingWindow(falling_window)
        self.positions: list[Position] = []
        self.text = ""
        self.status = Status.RUNNING
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.expert_load: list[list[int]] | None = None
        self.answer: str | None = None
        self.scores: list[Score] = []
        self.problems: list[str] = []
        self.num_asked = 0  # scores that have been asked for and have not come
        self._view: Branch | None = None

    @property
    def num_own_tokens(self) -> int:
        """Tokens that were sampled for this branch alone."""
        return len(self.token_ids) - self.num_shared

    @property
    def ends_with_stop_token(self) -> bool:
        """True when the last token is the end-of-sequence or stop token that ended the branch."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)

    @property
    def is_over(self) -> bool:
        """True when the branch has ended."""
        return self.status in (Status.FINISHED, Status.PRUNED)

    def add(self, update: Update, *, logprobs: bool) -> None:
        """Add what the engine has sampled."""
        self._view = None
        self.token_ids.extend(update.token_ids)
        self.text += update.text
        self.logprobs.extend(update.sampled_logprobs)
        if update.logprobs is not None:  # the client has asked for them
            if logprobs:
                self.logprobs.extend(map(sampled_logprob, update.logprobs))
            self.positions.extend(update.logprobs)

    def continue_from(self, parent: BranchRun, num_tokens: int, forced: Sequence[int]) -> None:
        """Begin with the first tokens of another branch, and then with given ones."""
        self.parent = parent.index
        self.num_shared, self.num_forced = num_tokens + len(forced), len(forced)
        self.token_ids = [*parent.token_ids[:num_tokens], *forced]
        if parent.logprobs:
            self.logprobs = parent.logprobs[:num_tokens] + [0.0] * len(forced)
            if self.falling is not None:
                for logprob in self.logprobs:
                    self.falling.push(logprob)
        if parent.positions:
            given: list[Position] = [{token: Logprob(0.0, 1, None)} for token in forced]
            self.positions = parent.positions[:num_tokens] + given
        self.step_ends = [end for end in parent.step_ends if end <= num_tokens]

    def change(self, **values: Any) -> None:
        """Set attributes."""
        self._view = None
        for name, value in values.items():
            setattr(self, name, value)

    def candidate(self, prompt: str, prompt_token_ids: np.ndarray) -> Candidate:
        """Return what a verifier is shown of the branch."""
        return Candidate(
            prompt=prompt,
            text=self.text,
            prompt_token_ids=prompt_token_ids.tolist(),
            token_ids=tuple(self.token_ids),
            complete=self.status is Status.FINISHED,
        )

    def view(self) -> Branch:
        """Return the branch as it is now."""
        if self._view is None:
            self._view = Branch(
                index=self.index,
                parent=self.parent,
                num_shared=self.num_shared,
                num_forced=self.num_forced,
                label=self.label,
                token_ids=Prefix(self.token_ids),
                logprobs=Prefix(self.logprobs),
                text=self.text,
                status=self.status,
                finish_reason=self.finish_reason,
                answer=self.answer,
                scores=tuple(self.scores),
                scoring=self.num_asked > 0,
                step_ends=tuple(self.step_ends),
                windows=self._windows,
            )
        return self._view
