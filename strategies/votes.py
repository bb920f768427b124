"""Votes over answers, and what all strategies share when they select."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertwire.strategies.base import Action, Branch, Group, Selection, Start, Status, Verify


def tally(branches: Sequence[Branch], weight: Callable[[Branch], float]) -> dict[str, float]:
    """Return the sum of weights of each answer, in the order of the indices of the branches that gave it first."""
    weights: dict[str, float] = {}
    for branch in sorted(branches, key=lambda branch: branch.index):
        if branch.answer is not None:
            weights[branch.answer] = weights.get(branch.answer, 0.0) + weight(branch)
    return weights


def vote(
    group: Group,
    voters: Sequence[Branch],
    weight: Callable[[Branch], float] = lambda branch: 1.0,
    *,
    prefer: Callable[[Branch], float] | None = None,
    reason: str,
) -> Selection:
    """Return the answer with the largest sum of weights.

    Ties: the answer that the branch with the lowest index gave. The result is the branch that gave the answer and has the highest
    `prefer` (None: no preference), the lowest index among equals. Without any answer it is `without_answer`.
    """
    weights = tally(voters, weight)
    if not weights:
        return without_answer(group, voters)
    answer = max(weights, key=lambda answer: weights[answer])  # the first of equals
    givers = [branch for branch in voters if branch.answer == answer]
    best = min(givers, key=lambda branch: (-prefer(branch) if prefer else 0.0, branch.index))
    num_voters = sum(branch.answer is not None for branch in voters)
    return Selection(
        branches=(best.index,),
        answer=answer,
        weights=weights,
        reason=f"{reason}: {weights[answer]:.6g} of {sum(weights.values()):.6g}, {num_voters} branches with an answer",
    )


def without_answer(group: Group, voters: Sequence[Branch]) -> Selection:
    """Return the result of a vote in which nobody has an answer: the finished branch with the lowest index, or `unfinished`."""
    finished = [branch.index for branch in voters if branch.status is Status.FINISHED]
    if not finished:
        return unfinished(group)
    return Selection(branches=(min(finished),), reason=f"none of {len(finished)} finished branches has an answer")


def unfinished(group: Group) -> Selection:
    """Return the result of a group in which no branch that could be chosen has finished: the one with most tokens.

    That is what a budget leaves. The lowest index among equals; nothing if no branch has a token, or if the verifier failed for
    all that have.
    """
    begun = [branch for branch in group.branches if branch.token_ids]
    left = [branch for branch in begun if not is_dropped(branch)]
    if not left:
        failed = f"the verifier failed for {len(begun)} of {len(group.branches)} branches"
        return Selection(branches=(), reason=failed if begun else "no branch has any output")
    longest = min(left, key=lambda branch: (-len(branch.token_ids), branch.index))
    return Selection(branches=(longest.index,), reason="no branch finished within the budget: the one with most tokens")


def is_dropped(branch: Branch) -> bool:
    """Return whether the verifier failed for a branch, so that it cannot be chosen (`VerifierPolicy.on_failure` "drop")."""
    return any(score.value is None for score in branch.scores)


def last_score(branch: Branch) -> float | None:
    """Return the verifier's score of all of a branch's tokens; None if there is none."""
    for score in reversed(branch.scores):
        if score.num_tokens == len(branch.token_ids):
            return score.value
    return None


def is_scored(branch: Branch) -> bool:
    """Return whether the verifier was asked about all of a branch's tokens, be it in vain."""
    return branch.scoring or any(score.num_tokens == len(branch.token_ids) for score in branch.scores)


def start_missing(group: Group, count: int) -> list[Action]:
    """Return the start of the branches that a group lacks to have had `count`."""
    missing = count - len(group.branches)
    return [Start(missing)] if missing > 0 else []


def verify_finished(group: Group) -> list[Action]:
    """Return requests for the scores of finished branches that the verifier has not been asked about."""
    return [Verify(branch.index) for branch in group.with_status(Status.FINISHED) if not is_scored(branch)]


def without_score(group: Group) -> Selection:
    """Return the result of a group in which no finished branch has a score.

    If the budget ended the group before a score came, it is the finished branch with the lowest index; else `unfinished`.
    Branches for which the verifier failed are never chosen.
    """
    finished = [branch for branch in group.with_status(Status.FINISHED) if not is_dropped(branch)]
    if not finished:
        return unfinished(group)
    return Selection(branches=(finished[0].index,), reason="the group ended before any score came: the first branch")


def mean_logprob(branch: Branch) -> float:
    """Return the mean log-probability of a branch's tokens; minus infinity without any."""
    return sum(branch.logprobs) / len(branch.logprobs) if branch.logprobs else float("-inf")
