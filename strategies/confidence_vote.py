"""Vote over answers with weights by confidence (self-certainty and DeepConf's offline vote, arXiv 2508.15260)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import UNLIMITED, Action, Branch, Budget, Group, Needs, Selection, Status
from expertwire.strategies.checks import require_callable, require_integer, require_one_of
from expertwire.strategies.votes import mean_logprob, start_missing, vote


@dataclass(frozen=True)
class ConfidenceVote:
    """The answer with the largest sum of confidences over `n` branches.

    A branch's confidence is `exp` of a mean log-probability of its sampled tokens, so it lies between 0 and 1. The paper
    takes the mean over the most likely tokens of each position instead.

    Args:
        n: branches.
        answer: extracts answers.
        confidence: "mean": over all tokens; "lowest_window": over the `window` consecutive tokens where it is lowest.
        window: tokens of a window.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    answer: AnswerExtractor
    confidence: str = "mean"
    window: int = 128
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("n", self.n, minimum=1)
        require_callable("answer", self.answer, why="votes need answers")
        require_one_of("confidence", self.confidence, ("mean", "lowest_window"))
        require_integer("window", self.window, minimum=1)

    @property
    def needs(self) -> Needs:
        """Answers and log-probabilities."""
        return Needs(logprobs=True, answer=self.answer, budget=self.budget)

    def decide(self, group: Group) -> Sequence[Action]:
        """Start all branches at once."""
        return start_missing(group, self.n)

    def select(self, group: Group) -> Selection:
        """Return the most confident branch with the answer of the largest weight."""
        return vote(
            group,
            group.with_status(Status.FINISHED),
            self._weight,
            prefer=self._weight,
            reason=f"largest sum of confidences ({self.confidence})",
        )

    def _weight(self, branch: Branch) -> float:
        if self.confidence == "mean":
            return math.exp(mean_logprob(branch))
        return math.exp(branch.lowest_window(self.window))
