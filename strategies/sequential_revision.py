"""Sequential revision with budget forcing: an output that would end goes on after a word such as "Wait" (arXiv 2501.19393)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.base import (
    UNLIMITED,
    Action,
    Branch,
    Budget,
    Fork,
    Group,
    Needs,
    Prune,
    Resume,
    Selection,
    Start,
    Status,
)
from expertwire.strategies.checks import require_callable, require_integer, require_one_of, require_string
from expertwire.strategies.votes import unfinished, vote


@dataclass(frozen=True)
class SequentialRevision:
    """Chains of outputs, each of which is forced to go on `revisions` times.

    Where an output ends by a stop token or, with `end_text`, ends its reasoning, a fork without that token continues it with
    `text`. Outputs that ended for their length are not revised.

    Args:
        revisions: times that a chain is made to go on.
        text: forced each time; its tokens are forced, not sampled.
        chains: chains at the same time.
        end_text: the end of reasoning, such as "</think>", which has to be one token; None: the end of the output.
        choose: "last": the last output of the first chain that has finished one; "majority": the answer of most outputs. Without
            `end_text` these are all outputs of all chains, before and after each revision; with it the last one of each chain,
            as only those are finished.
        answer: extracts answers for "majority".
        budget: limits of the group; each revision is a branch.

    Raises:
        ValueError: names the field and what it allows.
    """

    revisions: int
    text: str = "Wait"
    chains: int = 1
    end_text: str | None = None
    choose: str = "last"
    answer: AnswerExtractor | None = None
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("revisions", self.revisions, minimum=1)
        require_string("text", self.text)
        require_integer("chains", self.chains, minimum=1)
        if self.end_text is not None:
            require_string("end_text", self.end_text)
        require_one_of("choose", self.choose, ("last", "majority"))
        if self.choose == "majority":
            require_callable("answer", self.answer, why='choose="majority" votes')

    @property
    def needs(self) -> Needs:
        """Token ids of the forced text, and pauses at the end of reasoning."""
        return Needs(step_text=self.end_text, answer=self.answer, forced_texts=(self.text,), budget=self.budget)

    def decide(self, group: Group) -> Sequence[Action]:
        """Start the chains; continue what has ended, until it was revised often enough."""
        if not group.branches:
            return [Start(1, label=f"chain-{chain}") for chain in range(self.chains)]
        (forced,) = group.forced_texts
        revised = {branch.parent for branch in group.branches}
        actions: list[Action] = []
        limit = self.budget.branches
        for branch in group.branches:
            num_forks = sum(isinstance(action, Fork) for action in actions)
            room = limit is None or len(group.branches) + num_forks < limit
            again = room and branch.index not in revised and _num_revisions(group, branch) < self.revisions
            if branch.status is Status.PAUSED:
                if again:
                    before_end = len(branch.token_ids) - 1
                    actions += [Fork(branch.index, 1, before_end, forced, label=branch.label), Prune(branch.index)]
                else:
                    actions.append(Resume(branch.index))
            elif again and self.end_text is None and branch.finish_reason == "stop":
                actions.append(Fork(branch.index, 1, forced=forced, label=branch.label))
        return actions

    def select(self, group: Group) -> Selection:
        """Return the last revision of the first chain that has one, or the answer of most."""
        finished = group.with_status(Status.FINISHED)
        if not finished:
            return unfinished(group)
        if self.choose == "majority":
            return vote(group, finished, reason="most votes of all revisions")
        chain = [branch for branch in finished if branch.label == finished[0].label]
        count = _num_revisions(group, chain[-1])
        return Selection(branches=(chain[-1].index,), answer=chain[-1].answer, reason=f"after {count} revisions")


def _num_revisions(group: Group, branch: Branch) -> int:
    count = 0
    while branch.parent is not None:
        branch, count = group.branches[branch.parent], count + 1
    return count
