"""Tokens of a group by what became of them. Kept, pruned and verifier tokens add up to what the engine computed."""

from __future__ import annotations

from dataclasses import dataclass

from expertwire.strategies.base import Group, Selection, Status


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of a group.

    Attributes:
        kept: sampled tokens that are part of an output that finished or was selected, each once, however many share it.
        pruned: other sampled tokens.
        verifier: tokens that an engine computed for scores.
    """

    kept: int
    pruned: int
    verifier: int


def count_tokens(group: Group, selection: Selection) -> TokenCounts:
    """Return the tokens of a group that has ended. `kept + pruned` is `group.num_tokens`."""
    kept = [0] * len(group.branches)  # tokens of each branch, from its beginning, that are kept
    for branch in reversed(group.branches):  # children come after their parents
        if branch.status is Status.FINISHED or branch.index in selection.branches:
            kept[branch.index] = len(branch.token_ids)
        if branch.parent is not None and kept[branch.index]:
            from_parent = min(kept[branch.index], branch.num_shared - branch.num_forced)
            kept[branch.parent] = max(kept[branch.parent], from_parent)
    num_kept = sum(max(0, kept[branch.index] - branch.num_shared) for branch in group.branches)
    return TokenCounts(
        kept=num_kept,
        pruned=group.num_tokens - num_kept,
        verifier=sum(score.verifier_tokens for branch in group.branches for score in branch.scores),
    )
