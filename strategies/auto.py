"""The strategy for those who have no table of `compute_optimal`: adaptive consistency within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.adaptive_consistency import AdaptiveConsistency
from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import Action, Budget, Group, Needs, Selection
from expertwire.strategies.checks import require_callable


@dataclass(frozen=True)
class Auto:
    """Adaptive consistency of at most 32 branches, four at a time, with threshold 0.95, within a budget.

    Args:
        answer: extracts answers.
        budget: limits of the group; at least one has to be given.

    Raises:
        ValueError: names the field and what it allows.
    """

    answer: AnswerExtractor
    budget: Budget

    def __post_init__(self) -> None:
        require_callable("answer", self.answer, why="votes need answers")
        if not isinstance(self.budget, Budget) or self.budget == Budget():
            raise ValueError(f"budget must limit tokens, branches or seconds, got {self.budget!r}")

    @property
    def _strategy(self) -> AdaptiveConsistency:
        return AdaptiveConsistency(self.budget.branches or 32, self.answer, budget=self.budget)

    @property
    def needs(self) -> Needs:
        """Answers."""
        return self._strategy.needs

    def decide(self, group: Group) -> Sequence[Action]:
        """Decide as adaptive consistency."""
        return self._strategy.decide(group)

    def select(self, group: Group) -> Selection:
        """Select as adaptive consistency."""
        return self._strategy.select(group)
