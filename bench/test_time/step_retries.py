"""A user's own strategy, as an example and as a line of the plot: one branch, whose wrong steps are done again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.base import (
    UNLIMITED,
    Action,
    Branch,
    Budget,
    Finish,
    Fork,
    Group,
    Needs,
    Prune,
    Resume,
    Selection,
    Start,
    Status,
    Verify,
)
from expertwire.strategies.verifiers import Verifier


@dataclass(frozen=True)
class StepRetries:
    """Verify each step when it ends; forget a wrong one and sample another in its place, from where the step began.

    Args:
        verifier: of steps: a score below `least` is a wrong step, or a wrong end.
        step_text: ends a step.
        least: score of a right step.
        budget: limits of the group.
    """

    verifier: Verifier
    step_text: str
    least: float = 0.5
    budget: Budget = UNLIMITED

    @property
    def needs(self) -> Needs:
        """Pauses at the ends of steps, and scores."""
        return Needs(step_text=self.step_text, verifier=self.verifier, budget=self.budget)

    def decide(self, group: Group) -> Sequence[Action]:
        """Verify the last branch, then let it go on, end the group, or take its last step back."""
        if not group.branches:
            return [Start(1)]
        branch = group.branches[-1]
        if branch.status is Status.RUNNING or branch.scoring:
            return []
        score = _score(branch)
        if score is None:
            return [Verify(branch.index)]
        if score >= self.least:
            return [Finish() if branch.status is Status.FINISHED else Resume(branch.index)]
        return self._again(branch)

    def select(self, group: Group) -> Selection:
        """Return the last branch: all of its steps but at most the last are right."""
        return Selection(branches=(len(group.branches) - 1,), reason=f"{len(group.branches) - 1} steps done again")

    def _again(self, branch: Branch) -> list[Action]:
        ends = [end for end in branch.step_ends if end < len(branch.token_ids)]
        again: Action = Fork(branch.index, 1, num_tokens=ends[-1]) if ends else Start(1)
        return [again, Prune(branch.index)] if branch.status is Status.PAUSED else [again]


def _score(branch: Branch) -> float | None:
    """Return the score of all of a branch's tokens; a verifier that failed has found a wrong step. None: not asked yet."""
    for score in branch.scores:
        if score.num_tokens == len(branch.token_ids):
            return -1.0 if score.value is None else score.value
    return None
