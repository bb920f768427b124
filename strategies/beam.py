"""Beam search over steps with a process verifier (arXiv 2408.03314; the definitions of Hugging Face's search-and-learn)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import UNLIMITED, Action, Budget, Finish, Group, Needs, Prune, Selection, Status
from expertwire.strategies.steps import before_choice, expand, needs_of_search, ranked, require_search, select_by_steps
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy
from expertwire.strategies.votes import start_missing


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
        if (actions := before_choice(group.branches, self.max_steps)) is not None:
            return actions
        if len(group.with_status(Status.FINISHED)) >= self.n:
            return [Finish()]
        paused = group.with_status(Status.PAUSED)
        kept = ranked(group, paused, self.aggregation)[: self.n // self.width]
        going_on = {branch.index for branch in kept}
        return [*(Prune(branch.index) for branch in paused if branch.index not in going_on), *expand(kept, self.n)]

    def select(self, group: Group) -> Selection:
        """Return the best of the complete beams."""
        return select_by_steps(group, group.branches, self.aggregation, self.answer)
