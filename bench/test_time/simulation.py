"""Groups of branches in lock step without a server: every running branch of every group gets a token, then strategies decide.

It stands for the frontend's driver where a study needs millions of tokens: actions, views of groups and the order of events
are those of `strategies.base`; a verifier answers at once. A group's time is the number of its steps, in which all its branches
advance together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from expertwire.bench.test_time.sources import EOS_ID, Asked, Source
from expertwire.deploy.demo_task import WORDS, check
from expertwire.strategies.base import (
    Action,
    Branch,
    Finish,
    Fork,
    Group,
    Needs,
    Prune,
    Resume,
    Score,
    Start,
    Status,
    Strategy,
    Verify,
)
from expertwire.strategies.verifiers import Candidate

MAX_DECISIONS = 10_000
LIVE = (Status.RUNNING, Status.PAUSED)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A group's result.

    Attributes:
        right: whether the first selected branch solves the problem.
        tokens: output tokens sampled for all branches.
        kept: of these, tokens of the selected branch, shared ones included.
        steps: decode steps from the first token to the end of the group.
        branches: branches started.
    """

    right: bool
    tokens: int
    kept: int
    steps: int
    branches: int


def simulate(strategy: Strategy, asked: Sequence[Asked], source: Source, *, groups_at_once: int = 100) -> list[Outcome]:
    """Run one group for each problem; the problems have one kind and size."""
    outcomes: list[Outcome] = []
    for begin in range(0, len(asked), groups_at_once):
        some = asked[begin : begin + groups_at_once]
        source.open(some)
        outcomes += _Groups(strategy, some, source).run()
    return outcomes


@dataclass
class _State:
    """One group on the side of the driver."""

    asked: Asked
    rows: list[int] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    steps: int | None = None  # at its end


class _Groups:
    """Groups that advance together."""

    def __init__(self, strategy: Strategy, asked: Sequence[Asked], source: Source) -> None:
        self._strategy, self._source = strategy, source
        self._needs: Needs = strategy.needs
        self._groups = [_State(one) for one in asked]
        self._where: list[tuple[int, int]] = []  # group and branch of a row
        self._running: dict[int, None] = {}  # rows, in the order of their starts
        self._max_tokens = max(one.max_tokens for one in asked)
        self._tokens = np.zeros((0, self._max_tokens), np.int16)  # of rows
        self._logprobs = np.zeros((0, self._max_tokens), np.float32)
        self._lengths = np.zeros(0, np.int64)
        self._group_of = np.zeros(0, np.int64)
        self._sampled = np.zeros(len(asked), np.int64)  # of groups
        self._pause_ids = [i for i, word in enumerate(WORDS) if self._needs.step_text and self._needs.step_text in word]
        self._clock = 0

    def run(self) -> list[Outcome]:
        for g in range(len(self._groups)):
            self._decide(g)
        while self._running:
            self._clock += 1
            for g in self._step():
                self._decide(g)
        return [self._outcome(g) for g in range(len(self._groups))]

    def _step(self) -> list[int]:
        """Advance all running rows by a token; return the groups with news for their strategy."""
        rows = np.fromiter(self._running, np.int64, len(self._running))
        rows.sort()
        tokens, logprobs = self._source.advance(rows)
        at, groups = self._lengths[rows], self._group_of[rows]
        self._tokens[rows, at], self._logprobs[rows, at] = tokens, logprobs
        self._lengths[rows] += 1
        np.add.at(self._sampled, groups, 1)
        ended = (tokens == EOS_ID) | (at + 1 >= self._max_tokens)
        changed = ended | np.isin(tokens, self._pause_ids)
        for row, end in zip(rows[changed].tolist(), ended[changed].tolist(), strict=True):
            del self._running[row]
            g, index = self._where[row]
            self._change(self._groups[g], index, ended=end)
        budget = self._needs.budget.tokens
        if budget is not None:
            for g in np.unique(groups[self._sampled[groups] >= budget]).tolist():
                self._end(self._groups[g])
        news = groups if self._needs.watches_tokens else groups[changed]
        return [g for g in np.unique(news).tolist() if self._groups[g].steps is None]

    def _change(self, group: _State, index: int, *, ended: bool) -> None:
        """Say in a branch's view that it has ended or paused."""
        branch = self._seen(group, index)
        if not ended:
            ends = (*branch.step_ends, len(branch.token_ids))
            group.branches[index] = replace(branch, status=Status.PAUSED, step_ends=ends)
            return
        answer = self._needs.answer(branch.text) if self._needs.answer is not None else None
        reason = "stop" if branch.token_ids[-1] == EOS_ID else "length"
        group.branches[index] = replace(branch, status=Status.FINISHED, finish_reason=reason, answer=answer)

    def _seen(self, group: _State, index: int) -> Branch:
        """Return a branch's view with the tokens that it has now."""
        branch, row = group.branches[index], group.rows[index]
        length = int(self._lengths[row])
        if len(branch.token_ids) == length:
            return branch
        tokens = self._tokens[row, :length].tolist()
        branch = replace(
            branch,
            token_ids=tuple(tokens),
            logprobs=tuple(self._logprobs[row, :length].tolist()) if self._needs.logprobs else (),
            text=" ".join(WORDS[token] for token in tokens if token != EOS_ID),
        )
        group.branches[index] = branch
        return branch

    def _decide(self, g: int) -> None:
        """Ask the strategy until it has no more to verify, and carry out what it says."""
        group = self._groups[g]
        for _ in range(MAX_DECISIONS):
            actions = self._strategy.decide(self._view(group))
            for action in actions:
                self._act(g, action)
                if group.steps is not None:
                    return
            if not any(isinstance(action, Verify) for action in actions):
                break
        if not any(branch.status is Status.RUNNING for branch in group.branches):
            self._end(group)

    def _view(self, group: _State) -> Group:
        branches = tuple(self._seen(group, index) for index in range(len(group.branches)))
        prompt_length = len(group.asked.problem.prompt.split())
        return Group(num_prompt_tokens=prompt_length, branches=branches, elapsed_s=float(self._clock))

    def _act(self, g: int, action: Action) -> None:
        group = self._groups[g]
        match action:
            case Start():
                for _ in range(self._allowed(group, action.count)):
                    self._add(g, Branch(index=len(group.branches), label=action.label), greedy=action.greedy)
            case Fork():
                self._fork(g, action)
            case Verify():
                self._verify(group, action.branch)
            case Prune():
                branch = self._seen(group, action.branch)
                if branch.status in LIVE:
                    self._running.pop(group.rows[action.branch], None)
                    self._source.release(group.rows[action.branch])
                    group.branches[action.branch] = replace(branch, status=Status.PRUNED)
            case Resume():
                branch = group.branches[action.branch]
                assert branch.status is Status.PAUSED, f"{action} of a branch that is {branch.status}"
                group.branches[action.branch] = replace(branch, status=Status.RUNNING)
                self._running[group.rows[action.branch]] = None
            case Finish():
                self._end(group)

    def _allowed(self, group: _State, count: int) -> int:
        limit = self._needs.budget.branches
        return count if limit is None else min(count, limit - len(group.branches))

    def _fork(self, g: int, action: Fork) -> None:
        group = self._groups[g]
        parent = self._seen(group, action.branch)
        own = [token for token in parent.token_ids if token != EOS_ID]
        tokens = (*own[: action.num_tokens], *action.forced)
        count = len(tokens) - len(action.forced)
        for _ in range(self._allowed(group, action.count)):
            child = Branch(
                index=len(group.branches),
                parent=parent.index,
                num_shared=len(tokens),
                num_forced=len(action.forced),
                label=action.label,
                token_ids=tokens,
                logprobs=(*parent.logprobs[:count], *(0.0 for _ in action.forced)) if self._needs.logprobs else (),
                text=" ".join(WORDS[token] for token in tokens),
                step_ends=tuple(end for end in parent.step_ends if end <= count),
            )
            self._add(g, child, greedy=action.greedy)

    def _add(self, g: int, branch: Branch, *, greedy: bool) -> None:
        row, group, shared = len(self._where), self._groups[g], len(branch.token_ids)
        if row == len(self._tokens):
            more = max(64, row)
            self._tokens = np.pad(self._tokens, ((0, more), (0, 0)))
            self._logprobs = np.pad(self._logprobs, ((0, more), (0, 0)))
            self._lengths, self._group_of = (np.pad(each, (0, more)) for each in (self._lengths, self._group_of))
        self._where.append((g, branch.index))
        self._tokens[row, :shared] = branch.token_ids
        self._lengths[row], self._group_of[row] = shared, g
        self._running[row] = None
        group.rows.append(row)
        group.branches.append(branch)
        if branch.parent is None:
            self._source.start(row, g, branch.index, greedy)
        else:
            parent, inherited = group.rows[branch.parent], shared - branch.num_forced
            self._logprobs[row, :inherited] = self._logprobs[parent, :inherited]
            self._source.fork(parent, row, branch.index, branch.token_ids, greedy)

    def _verify(self, group: _State, index: int) -> None:
        assert self._needs.verifier is not None, "Verify without a verifier"
        branch = self._seen(group, index)
        candidate = Candidate(
            prompt=group.asked.problem.prompt,
            text=branch.text,
            prompt_token_ids=(),
            token_ids=branch.token_ids,
            complete=branch.status is Status.FINISHED,
        )
        score = Score(num_tokens=len(branch.token_ids), value=float(self._needs.verifier([candidate])[0]))
        group.branches[index] = replace(branch, scores=(*branch.scores, score))

    def _end(self, group: _State) -> None:
        """End a group: what has not ended is pruned."""
        group.steps = self._clock
        for index, row in enumerate(group.rows):
            branch = self._seen(group, index)
            if branch.status in LIVE:
                self._running.pop(row, None)
                group.branches[index] = replace(branch, status=Status.PRUNED)
            self._source.release(row)

    def _outcome(self, g: int) -> Outcome:
        group, sampled = self._groups[g], int(self._sampled[g])
        assert group.steps is not None, "a group without an end"
        final = self._view(group)
        assert final.num_tokens == sampled, f"{final.num_tokens} tokens of branches, {sampled} sampled"
        selection = self._strategy.select(final)
        best = final.branches[selection.branches[0]] if selection.branches else None
        return Outcome(
            right=best is not None and check(group.asked.problem, best.text),
            tokens=sampled,
            kept=len(best.token_ids) if best is not None else 0,
            steps=group.steps,
            branches=len(final.branches),
        )
