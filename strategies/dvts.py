"""Diverse verifier tree search: independent subtrees, each of which follows its best step (Hugging Face's search-and-learn)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import (
    UNLIMITED,
    Action,
    Branch,
    Budget,
    Group,
    Needs,
    Prune,
    Selection,
    Start,
    Status,
)
from expertwire.strategies.steps import (
    before_choice,
    expand,
    needs_of_search,
    num_steps,
    ranked,
    require_search,
    select_by_steps,
)
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy


@dataclass(frozen=True)
class DVTS:
    """Search with n / width subtrees, each of which tries `width` continuations of a step and goes on with the best.

    Subtrees do not compete and do not wait for each other, so that one of a high early score cannot take all beams. A subtree
    ends when its best continuation is complete. After `max_steps` steps its branches run to their ends.

    Args:
        n: branches that run at a time.
        width: branches of a subtree; divides n.
        verifier: scores an output after each step.
        step_text: text at which a step ends.
        aggregation: score of an output from those of its steps: "last", "min" or "prod".
        max_steps: steps after which branches are neither scored nor pruned until they end.
        answer: if given, complete branches vote for answers with their scores; else the highest score is chosen.
        verifier_policy: limits of the verifier; branches without a score do not go on.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    width: int
    verifier: Verifier
    step_text: str = "\n\n"
    aggregation: str = "last"
    max_steps: int = 40
    answer: AnswerExtractor | None = None
    verifier_policy: VerifierPolicy = DEFAULT_POLICY
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_search(self, self.aggregation)

    @property
    def needs(self) -> Needs:
        """Pauses at the ends of steps, and scores."""
        return needs_of_search(self)

    def decide(self, group: Group) -> Sequence[Action]:
        """Start the subtrees; ask for scores; let each subtree whose branches have theirs take its step."""
        if not group.branches:
            return [Start(self.width, label=f"tree-{tree}") for tree in range(self.n // self.width)]
        actions: list[Action] = []
        for label in sorted({branch.label for branch in group.branches}):
            actions += self._grow(group, [branch for branch in group.branches if branch.label == label])
        return actions

    def select(self, group: Group) -> Selection:
        """Return the best of the complete branches of all subtrees."""
        return select_by_steps(group, group.branches, self.aggregation, self.answer)

    def _grow(self, group: Group, tree: Sequence[Branch]) -> list[Action]:
        if (actions := before_choice(tree, self.max_steps)) is not None:
            return actions
        paused = [branch for branch in tree if branch.status is Status.PAUSED]
        if not paused:
            return []
        # Branches that completed in an earlier step were worse than the one that the tree went on with.
        step = max(num_steps(branch) for branch in paused)
        complete = [branch for branch in tree if branch.status is Status.FINISHED and num_steps(branch) == step]
        best = next(iter(ranked(group, [*paused, *complete], self.aggregation)), None)
        prune: list[Action] = [Prune(branch.index) for branch in paused if branch is not best]
        if best is None or best.status is Status.FINISHED:
            return prune
        return [*prune, *expand([best], self.width)]
