"""One group: a request with a strategy of test-time compute, from its start to its result; see `groups`."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from expertwire.engine.frontend.api import EngineFailed, Position, RequestError, RequestOptions, Update
from expertwire.engine.frontend.group_branches import GroupBranches
from expertwire.engine.frontend.group_views import BranchRun
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.strategy_parts import StrategyFailed, StrategyParts, size_of_branches, size_of_texts
from expertwire.engine.frontend.verifier_calls import Outcome
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.accounting import TokenCounts, count_tokens
from expertwire.strategies.base import (
    Action,
    Finish,
    Fork,
    Group,
    Prune,
    Resume,
    Score,
    Selection,
    Start,
    Status,
    Strategy,
    Verify,
)
from expertwire.strategies.verifiers import VerifierError

if TYPE_CHECKING:
    from expertwire.engine.frontend.groups import Groups

T = TypeVar("T")
Fate = Literal["kept", "pruned"]
_log = logging.getLogger(__name__)


class GroupRun:
    """One group, from its request to its result. `Groups.start` makes it.

    Attributes:
        id: the number of the group in its `Groups`.
        tokens: the prompt, i32 [length].
        params: sampling parameters, with the group's seed.
        selection: what the strategy has selected; None while the group runs, and if it failed or was aborted.
        error: the error that ended the group, or None.
        done: whether it has ended.
        on_done: called when it has ended, but not by `abort`.
        on_news: called when branches may have new output, if the group was started with `streams`.
    """

    def __init__(
        self,
        groups: Groups,
        number: int,
        tokens: np.ndarray,
        params: SamplingParams,
        options: RequestOptions,
        strategy: Strategy,
        prompt: str | None,
        *,
        streams: bool,
    ) -> None:
        self.id = number
        self.tokens = tokens
        self.params = params
        self.selection: Selection | None = None
        self.error: RequestError | None = None
        self.done = False
        self.on_done: Callable[[], None] = lambda: None
        self.on_news: Callable[[], None] = lambda: None
        self._groups, self._frontend = groups, groups.frontend
        self._prompt = prompt
        self._strategy, self._parts = strategy, StrategyParts(strategy, groups.aside)
        self._has_news = self._is_ending = False
        self._unanswered: list[BranchRun] = []  # branches that have finished, whose answers are not known
        self._begin_s = time.monotonic()
        self._needs = self._parts.call("needs", lambda: strategy.needs)
        pause_ids, self._forced_texts = groups.texts.tokenized(self._needs)
        self._branches = GroupBranches(
            self._frontend,
            tokens,
            params,
            options,
            self._needs,
            self._parts.name,
            pause_token_ids=pause_ids,
            is_quiet=not (streams or self._needs.every_step or self._needs.budget.tokens is not None),
            on_submit=lambda request_id: groups.add(request_id, self),
        )

    @property
    def branches(self) -> Sequence[BranchRun]:
        """All branches so far, by index."""
        return self._branches.all

    @property
    def num_tokens(self) -> int:
        """Output tokens sampled for all branches together; those of running branches may be missing."""
        return self._branches.num_tokens

    @property
    def num_live(self) -> int:
        """Branches that have not ended."""
        return self._branches.num_live

    @property
    def prompt_logprobs(self) -> list[Position | None] | None:
        """Log-probabilities of the prompt, if requested and come."""
        return self._branches.prompt_logprobs

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that branch 0 found in the prefix cache."""
        return self._branches.num_cached_tokens

    @property
    def first_token_s(self) -> float | None:
        """When the first branch's first token came, by `time.monotonic`; None before."""
        return self._branches.first_token_s

    @property
    def deadline_s(self) -> float | None:
        """When the group's time is up, by `time.monotonic`; None: never, or it ends already."""
        seconds = self._needs.budget.seconds
        return None if seconds is None or self._is_ending else self._begin_s + seconds

    def fate(self, branch: BranchRun) -> Fate:
        """Return what became of a branch: it ended by itself, or it was pruned."""
        return "kept" if branch.status is Status.FINISHED else "pruned"

    def token_counts(self) -> TokenCounts:
        """Return the tokens so far by what became of them."""
        return count_tokens(self.view(), self.selection or Selection(branches=()))

    def view(self) -> Group:
        """Return the group as it is now."""
        return Group(
            num_prompt_tokens=len(self.tokens),
            branches=self._branches.views(),
            elapsed_s=time.monotonic() - self._begin_s,
            forced_texts=self._forced_texts,
        )

    def abort(self) -> None:
        """End the group without a result."""
        if not self.done:
            self._end()

    def begin(self) -> None:
        """Start the first branches."""
        self._has_news = True
        self.advance()

    def handle(self, request: OpenRequest) -> None:
        """Take in the news of the group's requests, of which one has some, and let the strategy decide."""
        self.advance()
        self.on_news()

    def advance(self) -> None:
        """Let the strategy decide if there is news for it, and end the group if it is time."""
        with self._failing():
            self._take()
            if not self.done and not self._is_ending and self._is_used_up():
                self._finish()
            while not self.done and not self._parts.is_busy and self._go_on():
                pass

    def _go_on(self) -> bool:
        """Do the next thing that the group needs; return whether there was any."""
        if self._unanswered:
            self._answer()
        elif self._is_ending:
            group = self.view()
            self._compute("select", self._size, lambda: self._strategy.select(group), self._selected)
        elif self._has_news:
            self._has_news, group = False, self.view()
            self._compute("decide", self._size, lambda: list(self._strategy.decide(group)), self._carry_out)
        elif not any(branch.status is Status.RUNNING or branch.num_asked for branch in self.branches):
            self._finish()
        else:
            return False
        return True

    @property
    def _size(self) -> int:
        return size_of_branches(len(self.branches), self._branches.num_known)

    def _compute(self, part: str, size: int, call: Callable[[], T], use: Callable[[T], None]) -> None:
        """Compute a part of the strategy, use the result, and go on if that was aside."""
        is_aside = False

        def computed(result: Callable[[], T]) -> None:
            if not self.done:
                with self._failing():
                    use(result())
            if is_aside:
                self.advance()
                self.on_news()

        self._parts.compute(part, size, call, computed)
        is_aside = self._parts.is_busy

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """End the group with an error where the strategy or the engine fails."""
        try:
            yield
        except StrategyFailed as failed:
            _log.warning("warning: a request ends with an error: %s", failed, exc_info=failed.__cause__)
            self._fail(RequestError(failed.code, str(failed)))
        except EngineFailed as failed:
            self._fail(RequestError("UNAVAILABLE", str(failed)))

    # ---- what arrives

    def _take(self) -> None:
        for update in self._branches.take():
            if update.error is None:
                self._note(update)
            else:
                self._fail(update.error)

    def _note(self, update: Update) -> None:
        branch = self.branches[update.branch]
        if update.token_ids and self._needs.every_step:
            self._has_news = True
        if branch.falling is not None and branch.falling.has_fallen:
            self._has_news, branch.falling.has_fallen = True, False
        if branch.is_over or self.done:
            return
        if update.paused:
            branch.change(status=Status.PAUSED, step_ends=[*branch.step_ends, len(branch.token_ids)])
            self._has_news = True
        if update.finish_reason is None:
            return
        if update.finish_reason == "abort":  # by the client, under the request's name
            self._end()
            self.on_done()
            return
        branch.change(stop_reason=update.stop_reason, expert_load=update.expert_load)
        self._ended(branch, update.finish_reason)

    def _ended(self, branch: BranchRun, reason: str) -> None:
        """Take note that a branch has ended by itself."""
        self._branches.end(branch, Status.FINISHED, reason)
        self._has_news = True
        if self._needs.answer is not None:
            self._unanswered.append(branch)

    def _answer(self) -> None:
        """Extract the answers of branches that have finished."""
        branches, self._unanswered, extract = self._unanswered, [], self._needs.answer
        assert extract is not None, "no answers are needed"
        texts = [branch.text for branch in branches]

        def note(answers: list[str | None]) -> None:
            for branch, answer in zip(branches, answers, strict=True):
                branch.change(answer=answer or None)

        self._compute("answer", size_of_texts(texts), lambda: [extract(text) for text in texts], note)

    def _scored(self, branch: BranchRun, num_tokens: int, outcome: Outcome) -> None:
        """Take in the score of a branch's first tokens."""
        if self.done or self._is_ending:
            return
        value: float | None
        if isinstance(outcome.score, VerifierError):
            branch.problems.append(str(outcome.score))
            try:
                value = self._needs.verifier_policy.failed_score(outcome.score)
            except VerifierError as error:
                self._fail(RequestError("INTERNAL", str(error)))
                return
        else:
            value = float(outcome.score)
        score = Score(num_tokens=num_tokens, value=value, verifier_tokens=outcome.num_tokens)
        branch.change(num_asked=branch.num_asked - 1, scores=[*branch.scores, score])
        self._has_news = True
        self.advance()

    # ---- what the strategy wants

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Start():
                    self._start(action)
                case Fork():
                    self._fork(action)
                case Resume(index):
                    self._branches.resume(self._branch(action, index))
                case Prune(index):
                    self._prune([self._branch(action, index)])
                case Verify(index):
                    self._verify(self._branch(action, index))
                case Finish():
                    self._finish()
                    return
                case _:
                    raise StrategyFailed(f"the strategy {self._parts.name} wants {action!r:.200}, which is no action")
        self._groups.calls.dispatch()

    def _branch(self, action: Action, index: int) -> BranchRun:
        if not isinstance(index, int) or not 0 <= index < len(self.branches):
            text = f"the strategy {self._parts.name} wants {action!r:.200}, but the group has {len(self.branches)} branches"
            raise StrategyFailed(text)
        return self.branches[index]

    def _start(self, action: Start) -> None:
        if count := self._branches.allowed(action.count):
            self._branches.start(count, action.label, greedy=action.greedy)

    def _fork(self, action: Fork) -> None:
        parent, count = self._branch(action, action.branch), self._branches.allowed(action.count)
        num_known = len(parent.token_ids)
        num_kept = num_known - parent.ends_with_stop_token if action.num_tokens is None else action.num_tokens
        vocab_size = self._frontend.model_info.vocab_size
        if not 0 <= num_kept <= num_known or any(not 0 <= token < vocab_size for token in action.forced):
            raise StrategyFailed(
                f"the strategy {self._parts.name} wants {action!r:.200} of a branch of {num_known} tokens"
            )
        if count:
            for child in self._branches.fork(
                parent, count, num_kept, action.forced, action.label, greedy=action.greedy
            ):
                self._ended(child, "length")

    def _verify(self, branch: BranchRun) -> None:
        if self._needs.verifier is None:
            raise StrategyFailed(f"the strategy {self._parts.name} wants a score, but has no verifier")
        num_tokens = len(branch.token_ids)
        candidate = branch.candidate(self.prompt_text(), self.tokens)
        branch.change(num_asked=branch.num_asked + 1)
        self._groups.calls.ask(
            self._needs.verifier,
            self._needs.verifier_policy,
            self.id,
            candidate,
            lambda outcome: self._scored(branch, num_tokens, outcome),
        )

    def prompt_text(self) -> str:
        """Return the text of the prompt; "" if it was given as token ids and there is no tokenizer."""
        if self._prompt is None:
            tokenizer = self._frontend.tokenizer
            self._prompt = "" if tokenizer is None else tokenizer.decode(self.tokens.tolist(), False)
        return self._prompt

    def _prune(self, branches: Sequence[BranchRun]) -> None:
        """End branches that have not ended. What the frontend has of their output is theirs."""
        self._take()  # some may have ended by themselves
        self._branches.prune([branch for branch in branches if not branch.is_over])

    # ---- the end

    def _is_used_up(self) -> bool:
        budget = self._needs.budget
        tokens_end = budget.tokens is not None and self.num_tokens >= budget.tokens
        return tokens_end or (self.deadline_s is not None and time.monotonic() >= self.deadline_s)

    def _finish(self) -> None:
        """Prune what runs, and let the strategy select next."""
        self._prune(self.branches)
        self._is_ending = True

    def _selected(self, selection: Selection) -> None:
        if not selection.branches:
            self._fail(RequestError("INTERNAL", f"the strategy {self._parts.name} has no result: {selection.reason}"))
            return
        for index in selection.branches:
            if not isinstance(index, int) or not 0 <= index < len(self.branches):
                text = f"the strategy {self._parts.name} selects branch {index!r:.100} of {len(self.branches)}"
                raise StrategyFailed(text)
        self.selection = selection
        self._end()
        self.on_done()

    def _fail(self, error: RequestError) -> None:
        if not self.done:
            self.error = error
            self._end()
            self.on_done()

    def _end(self) -> None:
        self.done = True
        self._prune(self.branches)
        self._groups.remove(self, self._branches.request_ids)
        self._branches.close()
