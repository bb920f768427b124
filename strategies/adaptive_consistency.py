"""Adaptive consistency: sample until the leading answer is the majority's with a given probability (arXiv 2305.11860)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import UNLIMITED, Action, Budget, Finish, Group, Needs, Selection, Start, Status
from expertwire.strategies.checks import require_callable, require_integer, require_number
from expertwire.strategies.votes import tally, vote


def probability_of_majority(first: int, second: int) -> float:
    """Return the probability that the leading answer is more likely than the second one, from their votes.

    The leading answer's share of the two has the posterior Beta(first + 1, second + 1); this is its mass above one half. For
    whole numbers that is the binomial sum of C(m, j) / 2^m over j <= first, with m = first + second + 1.
    """
    trials = first + second + 1
    return sum(math.comb(trials, heads) for heads in range(first + 1)) / 2**trials


@dataclass(frozen=True)
class AdaptiveConsistency:
    """Majority vote that ends as soon as its result is likely enough.

    The rule is applied after each branch that finishes. Branches that run at the same time are partly wasted when it holds, and
    short outputs are seen first; with `concurrency=1` it is the paper's.

    Args:
        n: most branches.
        answer: extracts answers; branches without one have no vote.
        threshold: least probability that the leading answer is the majority's.
        concurrency: most branches at a time.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    answer: AnswerExtractor
    threshold: float = 0.95
    concurrency: int = 4
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("n", self.n, minimum=1)
        require_callable("answer", self.answer, why="votes need answers")
        require_number("threshold", self.threshold, minimum=0.5, maximum=1)
        require_integer("concurrency", self.concurrency, minimum=1)

    @property
    def needs(self) -> Needs:
        """Answers."""
        return Needs(answer=self.answer, budget=self.budget)

    def decide(self, group: Group) -> Sequence[Action]:
        """End the group when it is sure enough; else keep `concurrency` branches running."""
        votes = sorted(tally(group.with_status(Status.FINISHED), lambda branch: 1.0).values(), reverse=True)
        second = votes[1] if len(votes) > 1 else 0
        if votes and probability_of_majority(int(votes[0]), int(second)) >= self.threshold:
            return [Finish()]
        running = len(group.with_status(Status.RUNNING, Status.PAUSED))
        count = min(self.concurrency - running, self.n - len(group.branches))
        return [Start(count)] if count > 0 else []

    def select(self, group: Group) -> Selection:
        """Return the lowest branch with the answer of most."""
        return vote(group, group.with_status(Status.FINISHED), reason="most votes")
