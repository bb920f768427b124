"""Step retries: one branch, each step of which is sampled again until a process verifier accepts it."""

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
from expertwire.strategies.checks import require_callable, require_integer, require_number, require_string
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy
from expertwire.strategies.votes import is_dropped, unfinished


@dataclass(frozen=True)
class StepRetries:
    """Verify each step when it ends; forget one that scores below `least` and sample another from where it began.

    Unlike a search it compares nothing: it stands and falls with a verifier whose score of a single step can be trusted, also
    in outputs that are not complete. One branch runs at a time, so that it takes few tokens and many steps in a row.

    Args:
        verifier: scores an output after each step, and when it is complete.
        step_text: text at which a step ends.
        least: score at which a step is accepted.
        max_retries: steps sampled again in all; then the output runs to its end without being judged.
        verifier_policy: limits of the verifier; a step without a score is not accepted.
        budget: limits of the group.

    Raises:
        ValueError: names the field and what it allows.
    """

    verifier: Verifier
    step_text: str = "\n\n"
    least: float = 0.5
    max_retries: int = 64
    verifier_policy: VerifierPolicy = DEFAULT_POLICY
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_callable("verifier", self.verifier, why="it accepts steps")
        require_string("step_text", self.step_text)
        require_number("least", self.least)
        require_integer("max_retries", self.max_retries, minimum=0)

    @property
    def needs(self) -> Needs:
        """Pauses at the ends of steps, and scores."""
        return Needs(
            step_text=self.step_text,
            verifier=self.verifier,
            verifier_policy=self.verifier_policy,
            budget=self.budget,
        )

    def decide(self, group: Group) -> Sequence[Action]:
        """Verify the last branch, then let it go on, end the group, or take its last step back."""
        if not group.branches:
            return [Start(1)]
        branch = group.branches[-1]
        if branch.scoring or branch.status not in (Status.PAUSED, Status.FINISHED):
            return []
        go_on: Action = Resume(branch.index) if branch.status is Status.PAUSED else Finish()
        if len(group.branches) > self.max_retries:
            return [go_on]
        scores = [score.value for score in branch.scores if score.num_tokens == len(branch.token_ids)]
        if not scores:
            return [Verify(branch.index)]
        return [go_on] if scores[-1] is not None and scores[-1] >= self.least else _again(branch)

    def select(self, group: Group) -> Selection:
        """Return the last branch, of which all steps but those after the last retry were accepted."""
        last = group.branches[-1] if group.branches else None
        if last is None or last.status is not Status.FINISHED or is_dropped(last):
            return unfinished(group)
        return Selection(branches=(last.index,), reason=f"{len(group.branches) - 1} steps were sampled again")


def _again(branch: Branch) -> list[Action]:
    """Return what samples the last step of a branch once more."""
    ends = [end for end in branch.step_ends if end < len(branch.token_ids)]
    again: Action = Fork(branch.index, 1, num_tokens=ends[-1]) if ends else Start(1)
    return [again, Prune(branch.index)] if branch.status is Status.PAUSED else [again]
