"""Weighted best-of-n: the answer with the largest sum of a verifier's scores (arXiv 2206.02336, 2408.03314)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import UNLIMITED, Action, Branch, Budget, Group, Needs, Selection, Status
from expertwire.strategies.checks import require_callable, require_integer
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy
from expertwire.strategies.votes import last_score, start_missing, verify_finished, vote, without_score


@dataclass(frozen=True)
class VerifierVote:
    """The answer whose branches' scores have the largest sum; its branch with the highest score.

    Meant for scores that are not negative. Branches without a score have no vote.

    Args:
        n: branches.
        answer: extracts answers.
        verifier: scores finished branches.
        verifier_policy: limits of the verifier.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    answer: AnswerExtractor
    verifier: Verifier
    verifier_policy: VerifierPolicy = DEFAULT_POLICY
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("n", self.n, minimum=1)
        require_callable("answer", self.answer, why="votes need answers")
        require_callable("verifier", self.verifier, why="it weighs the votes")

    @property
    def needs(self) -> Needs:
        """Answers and scores."""
        return Needs(
            answer=self.answer, verifier=self.verifier, verifier_policy=self.verifier_policy, budget=self.budget
        )

    def decide(self, group: Group) -> Sequence[Action]:
        """Start all branches at once; ask for a score of each that finishes."""
        return [*start_missing(group, self.n), *verify_finished(group)]

    def select(self, group: Group) -> Selection:
        """Return the best branch with the answer of the largest weight."""
        scored = [branch for branch in group.with_status(Status.FINISHED) if last_score(branch) is not None]
        if not scored:
            return without_score(group)
        return vote(group, scored, _score, prefer=_score, reason="largest sum of scores")


def _score(branch: Branch) -> float:
    value = last_score(branch)
    assert value is not None, branch
    return value
