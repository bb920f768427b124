"""First-k-finish: take what the first k branches that finish say, and end the others (first-finish search, arXiv 2505.18149)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import UNLIMITED, Action, Budget, Finish, Group, Needs, Selection, Status
from expertwire.strategies.checks import require_callable, require_integer
from expertwire.strategies.votes import start_missing, unfinished, vote


@dataclass(frozen=True)
class FirstKFinish:
    """The answer of most of the first `k` of `n` branches to finish; with k = 1 the first one.

    The first are those with fewest tokens among the branches that have finished when the k-th does, the lowest index among
    equals: branches advance in lock step, and so the result does not depend on the order of messages.

    Args:
        n: branches.
        k: branches that have to finish.
        answer: extracts answers; needed with k > 1.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    k: int = 1
    answer: AnswerExtractor | None = None
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("n", self.n, minimum=1)
        require_integer("k", self.k, minimum=1, maximum=self.n)
        if self.k > 1 or self.answer is not None:
            require_callable("answer", self.answer, why="k > 1 branches vote")

    @property
    def needs(self) -> Needs:
        """Answers, if branches vote."""
        return Needs(answer=self.answer, budget=self.budget)

    def decide(self, group: Group) -> Sequence[Action]:
        """Start all branches at once; end the group when k have finished."""
        if len(group.with_status(Status.FINISHED)) >= self.k:
            return [Finish()]
        return start_missing(group, self.n)

    def select(self, group: Group) -> Selection:
        """Return the first branch, or the one with the answer of most of the first."""
        finished = group.with_status(Status.FINISHED)
        first = sorted(finished, key=lambda branch: (len(branch.token_ids), branch.index))[: self.k]
        if not first:
            return unfinished(group)
        if self.answer is None:
            return Selection(branches=(first[0].index,), reason="the first to finish")
        return vote(group, first, reason=f"most votes of the first {len(first)} to finish")
