"""Majority vote over answers (self-consistency, arXiv 2203.11171)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import UNLIMITED, Action, Budget, Finish, Group, Needs, Selection, Status
from expertwire.strategies.checks import require_callable, require_integer
from expertwire.strategies.votes import start_missing, tally, vote


@dataclass(frozen=True)
class MajorityVote:
    """The answer that most of `n` branches give; among equals that of the branch with the lowest index.

    Args:
        n: branches.
        answer: extracts answers.
        stop_when_decided: end the group when no answer can overtake the leading one any more. The answer is the same.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    answer: AnswerExtractor
    stop_when_decided: bool = True
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("n", self.n, minimum=1)
        require_callable("answer", self.answer, why="votes need answers")

    @property
    def needs(self) -> Needs:
        """Answers."""
        return Needs(answer=self.answer, budget=self.budget)

    def decide(self, group: Group) -> Sequence[Action]:
        """Start all branches at once; end the group when it is decided."""
        finished = group.with_status(Status.FINISHED)
        votes = sorted(tally(finished, lambda branch: 1.0).values(), reverse=True)
        second = votes[1] if len(votes) > 1 else 0.0
        if self.stop_when_decided and votes and votes[0] > second + self.n - len(finished):
            return [Finish()]
        return start_missing(group, self.n)

    def select(self, group: Group) -> Selection:
        """Return the lowest branch with the answer of most."""
        return vote(group, group.with_status(Status.FINISHED), reason="most votes")
