"""Groups without an engine: branches whose tokens come from a function, in a random order of arrival.

A token is a character: its id is the code point, and the text is the characters. `END` ends a branch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

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
    Selection,
    Start,
    Status,
    Strategy,
    Verify,
)
from expertwire.strategies.verifiers import Candidate, VerifierError, checked_scores

END = "\0"
MAX_STEPS = 100_000

# The next character and its log-probability, of the branch with this index after this text (greedy or not).
Model = Callable[[int, str, bool], tuple[str, float]]


def scripted(*outputs: str, logprobs: Sequence[Sequence[float]] = ()) -> Model:
    """Return a model whose branch i says outputs[i], and repeats them beyond the last."""

    def model(index: int, text: str, greedy: bool) -> tuple[str, float]:
        output = outputs[index % len(outputs)] + END
        row = logprobs[index % len(outputs)] if logprobs else ()
        return output[len(text)], row[len(text)] if len(text) < len(row) else -0.1

    return model


@dataclass
class Simulated:
    """One branch on the side of the driver."""

    view: Branch
    greedy: bool = False
    logprobs: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """All that happened to a group."""

    group: Group
    selection: Selection
    decisions: list[tuple[Group, Sequence[Action]]]
    num_sampled: int

    @property
    def text(self) -> str:
        return self.group.branches[self.selection.branches[0]].text

    def statuses(self) -> list[str]:
        return [branch.status.value for branch in self.group.branches]


class SimulatedGroup:
    """A driver as `engine.frontend.groups` is one, with a clock of its own and random arrivals."""

    def __init__(self, strategy: Strategy, model: Model, *, seed: int | None = None, max_tokens: int = 1000) -> None:
        self.strategy, self.model, self.max_tokens = strategy, model, max_tokens
        self.needs: Needs = strategy.needs
        self.random = random.Random(seed) if seed is not None else None  # None: lock step, scores at once
        self.branches: list[Simulated] = []
        self.num_sampled = self.clock = 0
        self.finished = False
        self.pending: list[tuple[int, int, int]] = []  # when due, branch, tokens
        self.decisions: list[tuple[Group, Sequence[Action]]] = []

    def run(self) -> Outcome:
        self.decide()
        while not self.finished and (self.pending or self.running()):
            self.clock += 1
            assert self.clock < MAX_STEPS, f"no end after {MAX_STEPS} steps"
            news = self.step() | self.deliver_scores()
            budget = self.needs.budget
            if budget.tokens is not None and self.num_sampled >= budget.tokens:
                break
            if budget.seconds is not None and self.clock >= budget.seconds:
                break
            if news or self.needs.watches_tokens:
                self.decide()
        for branch in self.branches:
            if branch.view.status in (Status.RUNNING, Status.PAUSED):
                branch.view = replace(branch.view, status=Status.PRUNED)
        group = self.group()
        return Outcome(group, self.strategy.select(group), self.decisions, self.num_sampled)

    def running(self) -> list[Simulated]:
        return [branch for branch in self.branches if branch.view.status is Status.RUNNING]

    def group(self) -> Group:
        return Group(
            num_prompt_tokens=7,
            branches=tuple(branch.view for branch in self.branches),
            elapsed_s=float(self.clock),
            forced_texts=tuple(tuple(map(ord, text)) for text in self.needs.forced_texts),
        )

    def decide(self) -> None:
        group = self.group()
        actions = self.strategy.decide(group)
        assert list(actions) == list(self.strategy.decide(group)), "a strategy keeps no state"
        self.decisions.append((group, actions))
        for action in actions:
            if self.finished:
                break
            self.act(action)

    def act(self, action: Action) -> None:
        match action:
            case Start():
                assert action.count >= 1, action
                for _ in range(self.allowed(action.count)):
                    self.add(Branch(index=len(self.branches), label=action.label), greedy=action.greedy)
            case Fork():
                self.fork(action)
            case Verify():
                view = self.branches[action.branch].view
                assert not view.scoring, f"{action} while a score is under way"
                delay = self.random.randrange(4) if self.random else 0
                self.pending.append((self.clock + delay, view.index, len(view.token_ids)))
                self.branches[action.branch].view = replace(view, scoring=True)
            case Prune() | Resume():
                view = self.branches[action.branch].view
                status = Status.PRUNED if isinstance(action, Prune) else Status.RUNNING
                assert view.status not in (Status.FINISHED, Status.PRUNED), (
                    f"{action} of a branch that is {view.status}"
                )
                assert view.status is Status.PAUSED or isinstance(action, Prune), f"{action} of a branch that runs"
                self.branches[action.branch].view = replace(view, status=status)
            case Finish():
                self.finished = True

    def allowed(self, count: int) -> int:
        limit = self.needs.budget.branches
        return count if limit is None else min(count, limit - len(self.branches))

    def fork(self, action: Fork) -> None:
        parent = self.branches[action.branch].view
        total = len(parent.token_ids) - (tuple(parent.token_ids[-1:]) == (ord(END),))
        count = total if action.num_tokens is None else action.num_tokens
        assert 0 <= count <= total and action.count >= 1, (action, total)
        token_ids = (*parent.token_ids[:count], *action.forced)
        for _ in range(self.allowed(action.count)):
            self.add(
                Branch(
                    index=len(self.branches),
                    parent=parent.index,
                    num_shared=len(token_ids),
                    num_forced=len(action.forced),
                    label=action.label,
                    token_ids=token_ids,
                    logprobs=(*parent.logprobs[:count], *(0.0 for _ in action.forced)) if self.needs.logprobs else (),
                    text="".join(map(chr, token_ids)),
                    step_ends=tuple(end for end in parent.step_ends if end <= count),
                ),
                greedy=action.greedy,
            )

    def add(self, view: Branch, *, greedy: bool) -> None:
        self.branches.append(Simulated(view, greedy))

    def step(self) -> bool:
        """Advance all running branches by a token, or some of them by some tokens; return whether one paused or ended."""
        news = False
        for branch in self.running():
            for _ in range(self.random.choice((0, 1, 1, 3)) if self.random else 1):
                if branch.view.status is Status.RUNNING and not self.is_spent():
                    self.sample(branch)
                    news |= branch.view.status is not Status.RUNNING
        return news

    def is_spent(self) -> bool:
        return self.needs.budget.tokens is not None and self.num_sampled >= self.needs.budget.tokens

    def sample(self, branch: Simulated) -> None:
        view = branch.view
        char, logprob = self.model(view.index, view.text, branch.greedy)
        self.num_sampled += 1
        text = view.text + (char if char != END else "")
        view = replace(
            view,
            token_ids=(*view.token_ids, ord(char)),
            logprobs=(*view.logprobs, logprob) if self.needs.logprobs else (),
            text=text,
        )
        if char == END or len(view.token_ids) >= self.max_tokens:
            reason = "stop" if char == END else "length"
            answer = self.needs.answer(text) if self.needs.answer else None
            view = replace(view, status=Status.FINISHED, finish_reason=reason, answer=answer)
        elif self.needs.step_text is not None and self.needs.step_text in char:
            view = replace(view, status=Status.PAUSED, step_ends=(*view.step_ends, len(view.token_ids)))
        branch.view = view

    def deliver_scores(self) -> bool:
        due = [call for call in self.pending if call[0] <= self.clock]
        if not due:
            return False
        self.pending = [call for call in self.pending if call[0] > self.clock]
        views = [self.branches[index].view for _, index, _ in due]
        for (_, index, num_tokens), value in zip(due, self.scores(views, due), strict=True):
            view = self.branches[index].view
            score = Score(num_tokens=num_tokens, value=value)
            self.branches[index].view = replace(view, scores=(*view.scores, score), scoring=False)
        return True

    def scores(self, views: list[Branch], due: list[tuple[int, int, int]]) -> list[float | None]:
        """Return the verifier's scores; each is a call of its own, so that one failure is one branch's."""
        values: list[float | None] = []
        for view, (_, _, num_tokens) in zip(views, due, strict=True):
            text = "".join(map(chr, view.token_ids[:num_tokens])).removesuffix(END)
            ended = view.status is Status.FINISHED
            candidate = Candidate(
                prompt="", text=text, prompt_token_ids=(), token_ids=view.token_ids[:num_tokens], complete=ended
            )
            assert self.needs.verifier is not None
            try:
                values.append(checked_scores(self.needs.verifier([candidate]), 1)[0])
            except (ArithmeticError, VerifierError) as error:
                values.append(self.needs.verifier_policy.failed_score(VerifierError(str(error))))
        return values


def run_group(strategy: Strategy, model: Model, *, seed: int | None = None, max_tokens: int = 1000) -> Outcome:
    """Run a strategy's group to its end; without a seed in lock step."""
    return SimulatedGroup(strategy, model, seed=seed, max_tokens=max_tokens).run()
