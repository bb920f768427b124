"""Compute-optimal test-time compute: a probe tells how difficult a prompt is, a table which strategy pays (arXiv 2408.03314)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    Start,
    Status,
    Strategy,
    Verify,
)
from expertwire.strategies.checks import (
    require_callable,
    require_integer,
    require_number,
    require_one_of,
    require_string,
)
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy
from expertwire.strategies.votes import (
    last_score,
    mean_logprob,
    start_missing,
    tally,
    unfinished,
    verify_finished,
    without_score,
)

PROBE_SIGNALS = ("agreement", "mean_logprob", "verifier")


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A row of the table: prompts whose signal is at least `least` and below that of the row before.

    Args:
        least: least value of the signal; the last row's is minus infinity (None).
        strategy: what is done with them. Its budget holds for the whole group, the probe included.
        name: of the bin, for logs.
        accuracy, tokens: estimates of the calibration, for logs; None: there are none.

    Raises:
        ValueError: names the field and what it allows.
    """

    strategy: Strategy
    least: float | None = None
    name: str = "all"
    accuracy: float | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        if not all(hasattr(self.strategy, name) for name in ("needs", "decide", "select")):
            raise ValueError(f"table.strategy must be a strategy, got {self.strategy!r:.200}")
        if isinstance(self.strategy, ComputeOptimal):
            raise ValueError("table.strategy must be another strategy than compute_optimal, got compute_optimal")
        require_string("table.name", self.name)
        if self.accuracy is not None:
            require_number("table.accuracy", self.accuracy, minimum=0, maximum=1)
        if self.tokens is not None:
            require_number("table.tokens", self.tokens, minimum=0)
        if self.least is not None:
            require_number("table.least", self.least)


@dataclass(frozen=True)
class ComputeOptimal:
    """Probe a prompt with a few outputs, and treat it as the table says for what they show.

    The outputs of the probe are whole outputs. A strategy that samples whole outputs goes on with them as its own first branches;
    one that searches over steps or forces text begins anew. Either way they count in its budget; if the budget leaves it nothing,
    the probe's first output is the result.

    Args:
        table: rows from the largest `least` (easy prompts) to the smallest, which has to be None.
        probe: outputs of the probe.
        greedy_probe: whether the first of them is greedy. Where greedy decoding beats single samples and there is a verifier, its
            score of this one output tells much for few tokens.
        signal: "agreement": the share of the most frequent answer among the probe's outputs; "mean_logprob": their mean
            log-probability; "verifier": the mean of their scores.
        answer: extracts answers, for "agreement" and for strategies of the table; equal to theirs.
        verifier: scores outputs, for "verifier" and for strategies of the table; the same as theirs.
        verifier_policy: limits of the verifier.
        budget: limits of the group, besides those of the strategy chosen.

    Raises:
        ValueError: names the field and what it allows.
    """

    table: tuple[Bin, ...]
    probe: int = 4
    greedy_probe: bool = False
    signal: str = "agreement"
    answer: AnswerExtractor | None = None
    verifier: Verifier | None = None
    verifier_policy: VerifierPolicy = DEFAULT_POLICY
    budget: Budget = UNLIMITED

    def __post_init__(self) -> None:
        require_integer("probe", self.probe, minimum=1, maximum=16)
        if not isinstance(self.greedy_probe, bool):
            raise ValueError(f"greedy_probe must be True or False, got {self.greedy_probe!r}")
        require_one_of("signal", self.signal, PROBE_SIGNALS)
        if self.signal == "agreement":
            require_callable("answer", self.answer, why='signal="agreement" compares answers')
        if self.signal == "verifier":
            require_callable("verifier", self.verifier, why='signal="verifier" needs it')
        object.__setattr__(self, "table", tuple(self.table))
        if not self.table or not all(isinstance(row, Bin) for row in self.table):
            raise ValueError(f"table must have at least one Bin, got {self.table!r:.200}")
        bounds = [row.least for row in self.table]
        known = [bound for bound in bounds[:-1] if bound is not None]
        if bounds[-1] is not None or len(known) < len(bounds) - 1 or known != sorted(set(known), reverse=True):
            raise ValueError(f"table.least must fall from row to row and be None in the last one only, got {bounds}")
        for row in self.table:
            self._require_fit(row.strategy.needs)

    def _require_fit(self, needs: Needs) -> None:
        if needs.answer is not None and needs.answer != self.answer:
            raise ValueError(f"answer must be that of the table's strategies, {needs.answer!r}, got {self.answer!r}")
        if needs.verifier is not None and needs.verifier is not self.verifier:
            raise ValueError(
                f"verifier must be that of the table's strategies, {needs.verifier!r}, got {self.verifier!r}"
            )
        texts = {row.strategy.needs.step_text for row in self.table} - {None}
        if len(texts) > 1:
            raise ValueError(f"table must have strategies with one step_text, got {sorted(map(str, texts))}")

    @property
    def needs(self) -> Needs:
        """All that the probe and any strategy of the table need."""
        all_needs = [row.strategy.needs for row in self.table]
        limited = any(needs.budget.tokens is not None for needs in all_needs)
        return Needs(
            logprobs=self.signal == "mean_logprob" or any(needs.logprobs for needs in all_needs),
            every_step=limited or any(needs.watches_tokens for needs in all_needs),
            step_text=next((needs.step_text for needs in all_needs if needs.step_text is not None), None),
            answer=self.answer,
            verifier=self.verifier,
            verifier_policy=self.verifier_policy,
            forced_texts=tuple(dict.fromkeys(text for needs in all_needs for text in needs.forced_texts)),
            budget=self.budget,
        )

    def decide(self, group: Group) -> Sequence[Action]:
        """Run the probe; then decide as the strategy that the table has for its signal."""
        if len(group.branches) < self.probe:
            if not self.greedy_probe or group.branches:
                return start_missing(group, self.probe)
            return [Start(1, greedy=True), *([Start(self.probe - 1)] if self.probe > 1 else [])]
        probe = group.branches[: self.probe]
        waits: list[Action] = [Resume(branch.index) for branch in probe if branch.status is Status.PAUSED]
        if self.signal == "verifier":
            waits += [action for action in verify_finished(group) if action.branch < self.probe]  # type: ignore[union-attr]
        if waits or any(branch.scoring or branch.status is Status.RUNNING for branch in probe):
            return waits
        chosen = self._chosen(group).strategy
        if _is_spent(group, chosen.needs.budget):
            return [Finish()]
        seen, first = self._seen_by(chosen, group)
        if chosen.needs.step_text is None:
            waits = [Resume(branch.index) for branch in group.with_status(Status.PAUSED)]
        decided = list(chosen.decide(seen))
        if not decided and not waits and not _goes_on(seen):
            return [Finish()]
        return [*waits, *(_moved(action, first) for action in _within(decided, group, chosen.needs.budget))]

    def select(self, group: Group) -> Selection:
        """Return what the chosen strategy selects, with the bin and the estimate in the reason."""
        probe = group.branches[: self.probe]
        if len(probe) < self.probe or not any(branch.status is Status.FINISHED for branch in probe):
            return unfinished(group)
        row = self._chosen(group)
        seen, first = self._seen_by(row.strategy, group)
        if any(branch.token_ids for branch in seen.branches):
            selection = row.strategy.select(seen)
        else:  # the budget left nothing to a strategy that began anew
            selection, first = without_score(group), 0
        choice = f"bin {row.name!r} ({self.signal} {self.signal_of(group):.4g}) of {type(row.strategy).__name__}"
        if row.accuracy is not None and row.tokens is not None:
            choice += f", estimate: accuracy {row.accuracy:.3f} for {row.tokens:.0f} tokens"
        branches = tuple(index + first for index in selection.branches)
        return replace(selection, branches=branches, reason=f"{choice}: {selection.reason}")

    def signal_of(self, group: Group) -> float:
        """Return the signal that the probe has given; it must have ended."""
        probe = group.branches[: self.probe]
        finished = [branch for branch in probe if branch.status is Status.FINISHED]
        if self.signal == "agreement":
            return max(tally(finished, lambda branch: 1.0).values(), default=0.0) / self.probe
        if self.signal == "mean_logprob":
            values = [mean_logprob(branch) for branch in finished]
        else:
            values = [score for branch in finished if (score := last_score(branch)) is not None]
        return sum(values) / len(values) if values else -math.inf

    def _chosen(self, group: Group) -> Bin:
        signal = self.signal_of(group)
        return next(row for row in self.table if row.least is None or signal >= row.least)

    def _seen_by(self, strategy: Strategy, group: Group) -> tuple[Group, int]:
        """Return the group that a strategy is shown, and the index of the branch that is its first."""
        needs = strategy.needs
        texts = dict(zip(self.needs.forced_texts, group.forced_texts, strict=False))
        forced = tuple(texts[text] for text in needs.forced_texts)
        begins_anew = needs.step_text is not None or bool(needs.forced_texts)
        first = self.probe if begins_anew else 0
        branches = tuple(_shown(branch, first, needs) for branch in group.branches[first:])
        return replace(group, branches=branches, forced_texts=forced), first


def _shown(branch: Branch, first: int, needs: Needs) -> Branch:
    """Return a branch as a strategy is shown it: with its own indices, and not paused if it knows no pauses."""
    parent = None if branch.parent is None else branch.parent - first
    knows = branch.status is not Status.PAUSED or needs.step_text is not None
    return replace(branch, index=branch.index - first, parent=parent, status=branch.status if knows else Status.RUNNING)


def _moved(action: Action, first: int) -> Action:
    if isinstance(action, Fork | Prune | Resume | Verify):
        return replace(action, branch=action.branch + first)
    assert isinstance(action, Start | Finish), action
    return action


def _within(actions: Sequence[Action], group: Group, budget: Budget) -> list[Action]:
    """Return the actions with no more new branches than a strategy's own budget has left."""
    if budget.branches is None:
        return list(actions)
    room, allowed = budget.branches - len(group.branches), []
    for action in actions:
        if isinstance(action, Start | Fork):
            count = min(action.count, room)
            room -= max(count, 0)
            if count < 1:
                continue
            action = replace(action, count=count)
        allowed.append(action)
    return allowed


def _goes_on(group: Group) -> bool:
    return any(branch.scoring or branch.status is Status.RUNNING for branch in group.branches)


def _is_spent(group: Group, budget: Budget) -> bool:
    """Return whether a strategy's own budget is used up."""
    return (budget.tokens is not None and group.num_tokens >= budget.tokens) or (
        budget.seconds is not None and group.elapsed_s >= budget.seconds
    )
