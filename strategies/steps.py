"""Steps of outputs and their scores: what searches over steps share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import Action, Branch, Budget, Fork, Group, Needs, Resume, Selection, Status, Verify
from expertwire.strategies.checks import (
    require_callable,
    require_integer,
    require_one_of,
    require_string,
)
from expertwire.strategies.verifiers import Verifier, VerifierPolicy
from expertwire.strategies.votes import is_scored, vote, without_score

AGGREGATIONS = ("last", "min", "prod")


class SearchOptions(Protocol):
    """Options that searches over steps share."""

    @property
    def n(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def verifier(self) -> Verifier: ...
    @property
    def step_text(self) -> str: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def answer(self) -> AnswerExtractor | None: ...
    @property
    def verifier_policy(self) -> VerifierPolicy: ...
    @property
    def budget(self) -> Budget: ...


def require_search(options: SearchOptions, aggregation: str) -> None:
    """Raise a ValueError that names the field, unless these are options of a search over steps."""
    require_integer("n", options.n, minimum=1)
    require_integer("width", options.width, minimum=1, maximum=options.n)
    if options.n % options.width:
        raise ValueError(f"width must divide n = {options.n}, got {options.width}")
    require_callable("verifier", options.verifier, why="it scores steps")
    require_string("step_text", options.step_text)
    require_one_of("aggregation", aggregation, AGGREGATIONS)
    require_integer("max_steps", options.max_steps, minimum=1)
    if options.answer is not None:
        require_callable("answer", options.answer, why="votes need answers")


def needs_of_search(options: SearchOptions) -> Needs:
    """Return the needs of a search over steps: pauses at their ends, and scores."""
    return Needs(
        step_text=options.step_text,
        answer=options.answer,
        verifier=options.verifier,
        verifier_policy=options.verifier_policy,
        budget=options.budget,
    )


def aggregate(scores: Sequence[float | None], aggregation: str) -> float | None:
    """Return the score of an output from those of its steps: the last one, the least, or their product.

    None if there is none, or if one that matters is None.
    """
    if not scores:
        return None
    if aggregation == "last":
        return scores[-1]
    values = [score for score in scores if score is not None]
    if len(values) < len(scores):
        return None
    return min(values) if aggregation == "min" else math.prod(values)


def step_scores(group: Group, branch: Branch) -> list[float | None]:
    """Return the score after each of a branch's steps, those of its parents included; the end of a finished one is a step."""
    scores: dict[int, float | None] = {}
    limit, current = len(branch.token_ids), branch
    while True:
        own = {score.num_tokens: score.value for score in current.scores if score.num_tokens <= limit}
        scores = {**own, **scores}
        if current.parent is None:
            break
        limit = min(limit, current.num_shared - current.num_forced)
        current = group.branches[current.parent]
    ends = [*branch.step_ends]
    if branch.status is Status.FINISHED and (not ends or ends[-1] < len(branch.token_ids)):
        ends.append(len(branch.token_ids))
    return [scores.get(end) for end in ends]


def num_steps(branch: Branch) -> int:
    """Return the number of steps of a branch that pauses or has finished; what comes before the end is a step."""
    last = branch.step_ends[-1] if branch.step_ends else 0
    return len(branch.step_ends) + (branch.status is Status.FINISHED and last < len(branch.token_ids))


def before_choice(branches: Sequence[Branch], max_steps: int) -> list[Action] | None:
    """Return what has to come before a choice among these branches: those of `max_steps` steps go on without one, and all others
    pause or end and get a score. None: the choice is due.
    """
    paused = [branch for branch in branches if branch.status is Status.PAUSED]
    if free := [branch for branch in paused if len(branch.step_ends) >= max_steps]:
        return [Resume(branch.index) for branch in free]
    complete = [branch for branch in branches if branch.status is Status.FINISHED]
    if unscored := [branch for branch in (*paused, *complete) if not is_scored(branch)]:
        return [Verify(branch.index) for branch in unscored]
    return [] if any(branch.scoring or branch.status is Status.RUNNING for branch in branches) else None


def ranked(group: Group, branches: Sequence[Branch], aggregation: str) -> list[Branch]:
    """Return the branches that have an aggregate of their steps' scores, the highest first, the lowest index among equals."""
    scored = [(aggregate(step_scores(group, branch), aggregation), branch) for branch in branches]
    found = [(-score, branch.index, branch) for score, branch in scored if score is not None]
    return [branch for _, _, branch in sorted(found, key=lambda each: each[:2])]


def expand(kept: Sequence[Branch], count: int) -> list[Action]:
    """Return what makes `count` branches of those kept, the best first: each goes on, and forks continue it.

    Where `count` is no multiple, the best ones get one more.
    """
    actions: list[Action] = []
    for rank, branch in enumerate(kept):
        copies = count // len(kept) + (rank < count % len(kept))
        if copies > 1:
            actions.append(Fork(branch.index, copies - 1, label=branch.label))
        actions.append(Resume(branch.index))
    return actions


def select_by_steps(
    group: Group, candidates: Sequence[Branch], aggregation: str, answer: AnswerExtractor | None
) -> Selection:
    """Return the candidate with the highest aggregate, or the answer with the largest sum of aggregates."""
    scored = {
        branch.index: score
        for branch in candidates
        if branch.status is Status.FINISHED
        and (score := aggregate(step_scores(group, branch), aggregation)) is not None
    }
    if not scored:
        return without_score(group)
    if answer is not None:
        voters = [branch for branch in candidates if branch.index in scored]
        weight = {**scored}
        return vote(
            group,
            voters,
            lambda branch: weight[branch.index],
            prefer=lambda branch: weight[branch.index],
            reason=f"largest sum of scores ({aggregation})",
        )
    best = min(scored, key=lambda index: (-scored[index], index))
    return Selection(
        branches=(best,), reason=f"highest score ({aggregation}) of {len(scored)} complete: {scored[best]:.6g}"
    )
