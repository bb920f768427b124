"""Results of strategies: as messages, and as the values that clients get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from expertwire.deploy.grpc.messages import FINISH_REASONS
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.group_run import Fate, GroupRun
from expertwire.engine.frontend.group_views import BranchRun

_MAX_ANSWER, _MAX_PROBLEM = 1024, 200  # characters
_MAX_PROBLEMS, _MAX_WEIGHTS = 4, 256
_FATES: Mapping[Fate, pb.BranchFate] = {"kept": pb.BRANCH_FATE_KEPT, "pruned": pb.BRANCH_FATE_PRUNED}
_FATE_NAMES = {code: name for name, code in _FATES.items()}
_REASON_NAMES = {code: name for name, code in FINISH_REASONS.items()}


@dataclass(frozen=True, kw_only=True)
class BranchResult:
    """One of a group's branches, as in the .proto.

    Attributes:
        index: of the branch, which `Chunk.branch` names.
        fate: "kept" if it ended by itself, else "pruned".
        parent: index of the branch that it continues; None if it began at the prompt.
        num_tokens, num_shared: its output tokens, and those of them that it has from its parent.
        finish_reason: "stop", "length", or "abort" if it was pruned.
        answer: extracted from its text; None if there is none.
        score: the verifier's last; None if there is none.
        problems: why scores are missing.
    """

    index: int
    fate: str
    parent: int | None
    num_tokens: int
    num_shared: int
    finish_reason: str | None
    answer: str | None
    score: float | None
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """The way in which a strategy came to the outputs of a request.

    Attributes:
        branches: all branches, by index.
        selected: indices of those whose output the request has, best first; empty if it was aborted.
        answer: the answer chosen, if the strategy chooses among answers.
        weights: what each answer got, in the order of first appearance; None without answers.
        reason: why, in a few words.
    """

    branches: list[BranchResult]
    selected: list[int]
    answer: str | None
    weights: dict[str, float] | None
    reason: str


def write_branch(message: pb.BranchResult, run: GroupRun, branch: BranchRun) -> None:
    """Write what became of a branch into an empty message."""
    fate = run.fate(branch)
    message.index, message.fate = branch.index, _FATES[fate]
    message.num_tokens, message.num_shared_tokens = len(branch.token_ids), branch.num_shared
    message.finish_reason = finish_reason(branch)
    message.problems.extend(problem[:_MAX_PROBLEM] for problem in branch.problems[:_MAX_PROBLEMS])
    if branch.parent is not None:
        message.parent = branch.parent
    if branch.answer is not None:
        message.answer = branch.answer[:_MAX_ANSWER]
    if branch.scores and (score := branch.scores[-1].value) is not None:
        message.score = score


def write_selection(message: pb.GroupResult, run: GroupRun) -> None:
    """Write what a group's strategy has selected into a message without it."""
    if (selection := run.selection) is None:
        message.reason = "the request was aborted"
        return
    message.selected.extend(selection.branches)
    message.reason = selection.reason[:_MAX_ANSWER]
    if selection.answer is not None:
        message.answer = selection.answer[:_MAX_ANSWER]
    for answer, weight in islice((selection.weights or {}).items(), _MAX_WEIGHTS):
        message.weights.add(answer=answer[:_MAX_ANSWER], weight=weight)


def finish_reason(branch: BranchRun) -> pb.FinishReason:
    """Return the finish reason of a branch that has ended."""
    return FINISH_REASONS[branch.finish_reason or "abort"]


def from_group_result(message: pb.GroupResult) -> GroupResult:
    """Return the value of a message."""
    return GroupResult(
        branches=[_branch(branch) for branch in message.branches],
        selected=list(message.selected),
        answer=message.answer if message.HasField("answer") else None,
        weights={each.answer: each.weight for each in message.weights} or None,
        reason=message.reason,
    )


def _branch(message: pb.BranchResult) -> BranchResult:
    return BranchResult(
        index=message.index,
        fate=_FATE_NAMES[message.fate],
        parent=message.parent if message.HasField("parent") else None,
        num_tokens=message.num_tokens,
        num_shared=message.num_shared_tokens,
        finish_reason=_REASON_NAMES.get(message.finish_reason),
        answer=message.answer if message.HasField("answer") else None,
        score=message.score if message.HasField("score") else None,
        problems=list(message.problems),
    )
