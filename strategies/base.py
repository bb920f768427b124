"""The seam of strategies of test-time compute: what one is told, what it may do, what it returns.

A request with a strategy is one *group* of *branches*: outputs of one prompt, each with its own (seed, branch) and so its own
draws. The frontend runs the group (`engine.frontend.groups`): after each step that has news which the strategy asked for, it
calls `Strategy.decide` with the whole group, carries out the actions, and at the end calls `Strategy.select`.

A strategy keeps no state: what it decides is a function of the group alone. So a logged run can be replayed, and a strategy can
be tested without an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from expertwire.strategies.answers import AnswerExtractor
from expertwire.strategies.checks import require_integer, require_number
from expertwire.strategies.confidence import Windows
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy


class Status(Enum):
    """State of a branch.

    PAUSED: its last token is one of `Needs.pause_token_ids`; it keeps its KV blocks and samples nothing until `Resume`.
    FINISHED: it has ended by itself. PRUNED: a `Prune` action, the end of the group or its budget ended it.
    """

    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    PRUNED = "pruned"


@dataclass(frozen=True, kw_only=True)
class Score:
    """A verifier's score of a branch's first `num_tokens` output tokens.

    Attributes:
        value: None if the verifier failed or was late and its policy is to drop the branch.
        verifier_tokens: tokens that an engine computed for the score; 0 if the verifier is no model of an engine.
    """

    num_tokens: int
    value: float | None
    verifier_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One output of a group so far.

    Attributes:
        index: of the branch in its group, in the order of their starts; draws are a function of (seed, index, position).
        parent: index of the branch that it continues; None if it began at the prompt.
        num_shared: output tokens that it has from its parent, forced ones included.
        num_forced: the last of `num_shared` tokens, which were forced; its parent does not have them.
        label: of the `Start` or `Fork` that made it.
        token_ids: output tokens, with those of its parent.
        logprobs: of `token_ids`, if `Needs.logprobs`; else empty. Forced tokens have 0.0.
        text: of `token_ids`, if the group has text; else "".
        status: its state.
        finish_reason: "stop" or "length" where it is FINISHED.
        answer: what `Needs.answer` extracts from the text of a FINISHED branch; None if there is none, or it runs.
        scores: verifier's scores, in the order in which they came.
        scoring: whether a score that was asked for has not come.
        step_ends: numbers of output tokens after which it or, within the shared tokens, its parent paused; ascending.
        windows: what `lowest_window` has computed, for all views of the branch.
    """

    index: int
    parent: int | None = None
    num_shared: int = 0
    num_forced: int = 0
    label: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    text: str = ""
    status: Status = Status.RUNNING
    finish_reason: str | None = None
    answer: str | None = None
    scores: Sequence[Score] = ()
    scoring: bool = False
    step_ends: Sequence[int] = ()
    windows: Windows = field(default_factory=Windows, repr=False, compare=False)

    @property
    def num_own_tokens(self) -> int:
        """Tokens that were sampled for this branch alone."""
        return len(self.token_ids) - self.num_shared

    def lowest_window(self, window: int) -> float:
        """Return the lowest mean of `window` consecutive log-probabilities; see `confidence`."""
        return self.windows.lowest(self.logprobs, window)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A prompt's branches at one moment: all that a strategy knows.

    Attributes:
        num_prompt_tokens: length of the prompt.
        branches: in the order of their indices.
        elapsed_s: seconds since the group began.
        forced_texts: token ids of each of `Needs.forced_texts`.
    """

    num_prompt_tokens: int
    branches: Sequence[Branch] = ()
    elapsed_s: float = 0.0
    forced_texts: Sequence[tuple[int, ...]] = ()

    @property
    def num_tokens(self) -> int:
        """Output tokens sampled for all branches together."""
        return sum(branch.num_own_tokens for branch in self.branches)

    def with_status(self, *statuses: Status) -> list[Branch]:
        """Return the branches in one of these states."""
        return [branch for branch in self.branches if branch.status in statuses]


@dataclass(frozen=True)
class Start:
    """Start `count` branches from the prompt.

    Attributes:
        label: of the branches.
        greedy: whether they take the most likely token instead of the request's sampling parameters.
    """

    count: int
    label: str = ""
    greedy: bool = False


@dataclass(frozen=True)
class Fork:
    """Start `count` branches that continue `branch` after its first `num_tokens` output tokens, and then `forced`.

    The branch may run, be paused or have ended. The new ones run at once, also if it is paused.

    Attributes:
        num_tokens: None: all, without the end-of-sequence or stop token that ended it.
        forced: token ids that are given, not sampled.
        greedy: whether the new branches take the most likely token instead of the request's sampling parameters.
        label: of the new branches.
    """

    branch: int
    count: int
    num_tokens: int | None = None
    forced: tuple[int, ...] = ()
    greedy: bool = False
    label: str = ""


@dataclass(frozen=True)
class Prune:
    """End a running or paused branch; its blocks are free in the next plan. Of one that has ended, nothing happens."""

    branch: int


@dataclass(frozen=True)
class Resume:
    """Let a paused branch go on. Of one that has ended, nothing happens."""

    branch: int


@dataclass(frozen=True)
class Verify:
    """Ask the verifier for a score of a branch's tokens so far. `decide` is called again when it has come."""

    branch: int


@dataclass(frozen=True)
class Finish:
    """End the group: branches that have not ended are pruned, and `select` is called."""


Action = Start | Fork | Prune | Resume | Verify | Finish


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one group; None: no limit.

    Args:
        tokens: output tokens sampled for all branches together. When they are, the group ends as by `Finish`.
        branches: branches started; what a strategy starts beyond them is not started.
        seconds: since the group began; after them the group ends as by `Finish`.

    Raises:
        ValueError: names the field and the values it allows.
    """

    tokens: int | None = None
    branches: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None:
            require_integer("budget.tokens", self.tokens, minimum=1)
        if self.branches is not None:
            require_integer("budget.branches", self.branches, minimum=1)
        if self.seconds is not None:
            require_number("budget.seconds", self.seconds, above=0)


UNLIMITED = Budget()


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The news that a strategy needs; constant during a group.

    `decide` is called when a branch pauses, ends or gets a score.

    Attributes:
        logprobs: whether branches have log-probabilities.
        every_step: whether it is called after every step with new tokens, too.
        falling_window: it is called, too, when the lowest mean of so many consecutive log-probabilities of a branch falls, from
            its first window on (`Branch.lowest_window`); wants `logprobs`. None: it is not.
        falling_from: index of the first branch for which `falling_window` holds.
        step_text: a branch pauses after each token whose text contains this; None: never.
        answer: extracts the answer of a finished branch; None: answers are not needed.
        verifier: scores branches; None: there is none.
        verifier_policy: limits of its calls, and what a failed one means.
        forced_texts: texts whose token ids `Group.forced_texts` has, for `Fork.forced`.
        budget: limits.
    """

    logprobs: bool = False
    every_step: bool = False
    falling_window: int | None = None
    falling_from: int = 0
    step_text: str | None = None
    answer: AnswerExtractor | None = None
    verifier: Verifier | None = None
    verifier_policy: VerifierPolicy = DEFAULT_POLICY
    forced_texts: tuple[str, ...] = ()
    budget: Budget = UNLIMITED

    @property
    def watches_tokens(self) -> bool:
        """True if any token may be a reason to call `decide`."""
        return self.every_step or self.falling_window is not None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The result of a group.

    Attributes:
        branches: indices of the branches that the client gets, best first; empty if there is nothing to give, as when the
            verifier failed for all of them. The request then ends with an error that has the reason.
        answer: the answer chosen, if the strategy chooses among answers.
        weights: what each answer got (votes, sums of scores or of confidences), in the order of first appearance.
        reason: why, in a few words, for the log.
    """

    branches: tuple[int, ...]
    answer: str | None = None
    weights: dict[str, float] | None = None
    reason: str = ""


class Strategy(Protocol):
    """Decides how a group spends its tokens. Implementations are frozen dataclasses of options."""

    @property
    def needs(self) -> Needs:
        """The news that the strategy needs."""
        ...

    def decide(self, group: Group) -> Sequence[Action]:
        """Return what to do now; called first with a group without branches, which must start some.

        A group in which no branch runs, waits for a score or is about to start ends as by `Finish`.
        """
        ...

    def select(self, group: Group) -> Selection:
        """Return the result of the group, all of whose branches are FINISHED or PRUNED."""
        ...
