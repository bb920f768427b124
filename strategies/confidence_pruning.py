"""Confidence pruning: end branches whose confidence falls below that of the first ones (DeepConf online, arXiv 2508.15260)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import UNLIMITED, Action, Branch, Budget, Finish, Group, Needs, Prune, Selection, Status
from expertwire.strategies.checks import require_callable, require_integer, require_number
from expertwire.strategies.votes import start_missing, tally, vote, without_answer


@dataclass(frozen=True)
class ConfidencePruning:
    """Confidence-weighted vote of `n` branches, of which unsure ones end early.

    A branch's confidence is the lowest mean log-probability of `window` consecutive tokens. The first `warm_up` branches run to
    their ends. Their confidences, in ascending order, give the threshold: the one with index floor((1 - keep_share) * number).
    Later branches are pruned when they fall below it. Branches at or above it vote with the weight exp(confidence).

    The paper takes the mean over the most likely tokens of a position where this takes the sampled token's log-probability.

    Args:
        n: branches.
        answer: extracts answers.
        warm_up: branches that set the threshold.
        keep_share: share of the warm-up's branches at or above the threshold.
        window: tokens of a window.
        top_share: share of the voters, the most confident ones, whose votes count.
        consensus: end the group when the leading answer has this share of the weights after the warm-up; None: never.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    answer: AnswerExtractor
    warm_up: int = 8
    keep_share: float = 0.75
    window: int = 128
    top_share: float = 1.0
    consensus: float | None = None
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("n", self.n, minimum=1)
        require_callable("answer", self.answer, why="votes need answers")
        require_integer("warm_up", self.warm_up, minimum=1, maximum=self.n)
        require_number("keep_share", self.keep_share, above=0, maximum=1)
        require_integer("window", self.window, minimum=1)
        require_number("top_share", self.top_share, above=0, maximum=1)
        if self.consensus is not None:
            require_number("consensus", self.consensus, minimum=0.5, maximum=1)

    @property
    def needs(self) -> Needs:
        """Answers, log-probabilities, and a decision when a branch after the warm-up becomes less confident."""
        return Needs(
            logprobs=True,
            falling_window=self.window,
            falling_from=self.warm_up,
            answer=self.answer,
            budget=self.budget,
        )

    def decide(self, group: Group) -> Sequence[Action]:
        """Start the warm-up, then the other branches; prune those below the threshold."""
        if len(group.branches) < self.warm_up:
            return start_missing(group, self.warm_up)
        threshold = self.threshold(group)
        if threshold is None:
            return []
        if len(group.branches) < self.n:
            return start_missing(group, self.n)
        if self.consensus is not None:  # votes take long
            weights = tally(self._voters(group), self._weight)
            if weights and max(weights.values()) >= self.consensus * sum(weights.values()):
                return [Finish()]
        return [Prune(branch.index) for branch in group.with_status(Status.RUNNING) if self._fell(branch, threshold)]

    def select(self, group: Group) -> Selection:
        """Return the most confident branch with the answer of the largest weight."""
        voters = self._voters(group)
        if not voters:
            return without_answer(group, group.with_status(Status.FINISHED))
        return vote(group, voters, self._weight, prefer=self._weight, reason=f"confidences, {len(voters)} voters")

    def threshold(self, group: Group) -> float | None:
        """Return the least confidence of branches that go on; None before the warm-up has ended, or if nothing of it finished."""
        warm_up = group.branches[: self.warm_up]
        if any(branch.status in (Status.RUNNING, Status.PAUSED) for branch in warm_up):
            return None
        ranked = sorted(self._confidence(branch) for branch in warm_up if branch.status is Status.FINISHED)
        # The small number keeps a product such as (1 - 0.9) * 10 from being rounded down to the integer below.
        return ranked[min(int((1 - self.keep_share) * len(ranked) + 1e-9), len(ranked) - 1)] if ranked else None

    def _confidence(self, branch: Branch) -> float:
        return branch.lowest_window(self.window)

    def _weight(self, branch: Branch) -> float:
        return math.exp(self._confidence(branch))

    def _fell(self, branch: Branch, threshold: float) -> bool:
        return len(branch.logprobs) >= self.window and self._confidence(branch) < threshold

    def _voters(self, group: Group) -> list[Branch]:
        finished = group.with_status(Status.FINISHED)
        threshold = self.threshold(group)
        voters = [branch for branch in finished if threshold is None or self._confidence(branch) >= threshold]
        voters = [branch for branch in voters if branch.answer is not None]
        ranked = sorted(voters, key=lambda branch: (-self._confidence(branch), branch.index))
        return sorted(ranked[: math.ceil(self.top_share * len(ranked))], key=lambda branch: branch.index)
