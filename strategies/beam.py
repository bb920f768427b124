"""Beam search over steps with a process verifier (arXiv 2408.03314; the definitions of Hugging Face's search-and-learn)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import (
    UNLIMITED,
    Action,
    Branch,
    Budget,
    Finish,
    Group,
    Needs,
    Prune,
    Resume,
    Selection,
    Status,
    Verify,
)
from expertwire.strategies.steps import aggregate, expand, needs_of_search, require_search, select_by_steps, step_scores
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy
from expertwire.strategies.votes import is_scored, start_missing


@dataclass(frozen=True)
class BeamSearch:
    """Search with `n` beams, of which the best n / width go on after each step, each in equal shares of n.

    A step ends at a token whose text contains `step_text`, or where an output ends. Beams wait for each other. A complete one
    leaves the search and is a candidate; the others are still expanded to n. The search ends when n are complete or none goes
    on. After `max_steps` steps the beams run to their ends.

    Args:
        n: beams.
        width: beams that continue each one kept; divides n.
        verifier: scores an output after each step.
        step_text: text at which a step ends.
        aggregation: score of an output from those of its steps: "last", "min" or "prod".
        max_steps: steps after which beams are neither scored nor pruned until they end.
        answer: if given, complete beams vote for answers with their scores; else the highest score is chosen.
        verifier_policy: limits of the verifier; beams without a score do not go on.
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
        """Ask for scores; when all beams have theirs, prune and expand."""
        if not group.branches:
            return start_missing(group, self.n)
        paused = group.with_status(Status.PAUSED)
        free = [branch for branch in paused if len(branch.step_ends) >= self.max_steps]
        if free:
            return [Resume(branch.index) for branch in free]
        complete = group.with_status(Status.FINISHED)
        unscored = [branch for branch in (*paused, *complete) if not is_scored(branch)]
        if unscored:
            return [Verify(branch.index) for branch in unscored]
        if group.with_status(Status.RUNNING) or any(branch.scoring for branch in group.branches):
            return []
        if len(complete) >= self.n:
            return [Finish()]
        kept = self._ranked(group, paused)[: self.n // self.width]
        going_on = {branch.index for branch in kept}
        return [*(Prune(branch.index) for branch in paused if branch.index not in going_on), *expand(kept, self.n)]

    def select(self, group: Group) -> Selection:
        """Return the best of the complete beams."""
        return select_by_steps(group, group.branches, self.aggregation, self.answer)

    def _ranked(self, group: Group, paused: Sequence[Branch]) -> list[Branch]:
        scored = [
            (score, branch)
            for branch in paused
            if (score := aggregate(step_scores(group, branch), self.aggregation)) is not None
        ]
        return [branch for _, branch in sorted(scored, key=lambda pair: (-pair[0], pair[1].index))]
