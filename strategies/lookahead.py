"""Lookahead search: beam search whose steps are scored by what follows them (arXiv 2408.03314)."""

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
    Fork,
    Group,
    Needs,
    Prune,
    Resume,
    Selection,
    Status,
    Verify,
)
from expertwire.strategies.checks import require_integer
from expertwire.strategies.steps import expand, needs_of_search, require_search, select_by_steps
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy
from expertwire.strategies.votes import is_scored, last_score, start_missing

ROLLOUT = "rollout"


@dataclass(frozen=True)
class Lookahead:
    """Beam search in which a step's score is the verifier's after `lookahead` further steps, sampled greedily.

    At each step every beam is continued by a rollout, which is scored and pruned; the beams with the best rollouts go on from
    where they are. This costs about lookahead + 1 times a beam search's tokens. A complete beam has its own score.

    Args:
        n: beams.
        width: beams that continue each one kept; divides n.
        verifier: scores outputs; the score of an output is the last one.
        lookahead: steps of a rollout.
        step_text: text at which a step ends.
        max_steps: steps after which beams are neither scored nor pruned until they end.
        answer: if given, complete beams vote for answers with their scores; else the highest score is chosen.
        verifier_policy: limits of the verifier; beams without a score do not go on.
        budget: limits of the group; rollouts are branches.

    Raises:
        ValueError: names the field and what it allows.
    """

    n: int
    width: int
    verifier: Verifier
    lookahead: int = 1
    step_text: str = "\n\n"
    max_steps: int = 40
    answer: AnswerExtractor | None = None
    verifier_policy: VerifierPolicy = DEFAULT_POLICY
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_search(self, "last")
        require_integer("lookahead", self.lookahead, minimum=1)

    @property
    def needs(self) -> Needs:
        """Pauses at the ends of steps, and scores."""
        return needs_of_search(self)

    def decide(self, group: Group) -> Sequence[Action]:
        """Roll out beams that pause; when all rollouts have scores, prune and expand."""
        if not group.branches:
            return start_missing(group, self.n)
        beams, rollouts = _split(group)
        actions = [action for rollout in rollouts for action in self._go_on(rollout)]
        complete = [beam for beam in beams if beam.status is Status.FINISHED]
        actions += [Verify(beam.index) for beam in complete if not is_scored(beam)]
        paused = [beam for beam in beams if beam.status is Status.PAUSED]
        for beam in paused:
            if len(beam.step_ends) >= self.max_steps:
                actions.append(Resume(beam.index))
            elif _rollout_of(beam, rollouts) is None:
                actions.append(Fork(beam.index, 1, greedy=True, label=ROLLOUT))
        waits = any(branch.scoring or branch.status is Status.RUNNING for branch in group.branches)
        if actions or waits:
            return actions
        if len(complete) >= self.n:
            return [Finish()]
        done: list[Action] = [Prune(rollout.index) for rollout in rollouts if rollout.status is Status.PAUSED]
        scores = {beam.index: self._score(beam, rollouts) for beam in paused}
        kept = [beam for beam in paused if scores[beam.index] is not None]
        kept = sorted(kept, key=lambda beam: (-(scores[beam.index] or 0.0), beam.index))[: self.n // self.width]
        going_on = {beam.index for beam in kept}
        done += [Prune(beam.index) for beam in paused if beam.index not in going_on]
        return [*done, *expand(kept, self.n)]

    def select(self, group: Group) -> Selection:
        """Return the best of the complete beams."""
        return select_by_steps(group, _split(group)[0], "last", self.answer)

    def _go_on(self, rollout: Branch) -> list[Action]:
        """Return what a rollout that pauses or has finished does next."""
        if rollout.status not in (Status.PAUSED, Status.FINISHED) or rollout.scoring:
            return []
        assert rollout.parent is not None
        steps = sum(end > rollout.num_shared for end in rollout.step_ends)
        if rollout.status is Status.PAUSED and steps < self.lookahead:
            return [Resume(rollout.index)]
        return [] if is_scored(rollout) else [Verify(rollout.index)]

    def _score(self, beam: Branch, rollouts: Sequence[Branch]) -> float | None:
        rollout = _rollout_of(beam, rollouts)
        return None if rollout is None else last_score(rollout)


def _split(group: Group) -> tuple[list[Branch], list[Branch]]:
    beams = [branch for branch in group.branches if branch.label != ROLLOUT]
    return beams, [branch for branch in group.branches if branch.label == ROLLOUT]


def _rollout_of(beam: Branch, rollouts: Sequence[Branch]) -> Branch | None:
    """Return the rollout of a beam's present step."""
    now = (beam.index, len(beam.token_ids))
    return next((rollout for rollout in rollouts if (rollout.parent, rollout.num_shared) == now), None)
