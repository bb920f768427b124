"""The branches of a group as requests to a frontend: they are started and forked, get their output, and end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from expertwire.engine.frontend.api import Position, RequestOptions, Update
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.group_views import BranchRun
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.strategy_parts import StrategyFailed, TooManyBranches
from expertwire.scheduler.sampling_params import MAX_BRANCHES, SamplingParams
from expertwire.strategies.base import Branch, Needs, Status

MAX_STARTED = 16 * MAX_BRANCHES  # branches of a group, ended ones included


class GroupBranches:
    """The branches of one group.

    Args:
        frontend: runs them.
        tokens: the prompt, i32 [length].
        params: sampling parameters, with the group's seed.
        options: options for the scheduler.
        needs: what the strategy needs.
        name: of the strategy, for messages.
        pause_token_ids: tokens after which a branch pauses.
        is_quiet: whether branches have news only when they pause, end or fall in confidence (`Frontend.submit`).
        on_submit: called with the frontend's id of each request.

    Attributes:
        all: all branches so far, by index.
        request_ids: of the frontend's requests, in the order of their starts.
        num_live: branches that have not ended.
        num_tokens: output tokens sampled for all branches together, as far as they were taken.
        num_known: the same with what branches have from their parents.
        prompt_logprobs: those of the prompt, if requested and come.
        num_cached_tokens: prompt tokens that branch 0 found in the prefix cache.
    """

    def __init__(
        self,
        frontend: Frontend,
        tokens: np.ndarray,
        params: SamplingParams,
        options: RequestOptions,
        needs: Needs,
        name: str,
        *,
        pause_token_ids: np.ndarray,
        is_quiet: bool,
        on_submit: Callable[[int], None],
    ) -> None:
        self.all: list[BranchRun] = []
        self.request_ids: list[int] = []
        self._first: OpenRequest | None = None
        self._requests: dict[int, OpenRequest] = {}  # ended ones, too, while they may have output that was not taken
        self.num_live = self.num_tokens = self.num_known = 0
        self.prompt_logprobs: list[Position | None] | None = None
        self.num_cached_tokens = 0
        self._frontend, self._tokens, self._params, self._options = frontend, tokens, params, options
        self._needs, self._name = needs, name
        self._pause_ids, self._is_quiet, self._on_submit = pause_token_ids, is_quiet, on_submit

    @property
    def first_token_s(self) -> float | None:
        """When the first branch's first token came, by `time.monotonic`; None before."""
        return None if self._first is None else self._first.began_s

    def close(self) -> None:
        """Forget the group, which refers to this; called when it has ended."""
        self._on_submit = lambda _: None

    def views(self) -> tuple[Branch, ...]:
        """Return the branches as they are now."""
        return tuple([branch.view() for branch in self.all])

    def allowed(self, count: int) -> int:
        """Return how many of `count` branches may be started."""
        if not isinstance(count, int) or count < 1:
            raise StrategyFailed(f"the strategy {self._name} wants to start {count!r:.100} branches")
        if (most := self._needs.budget.branches) is not None:
            count = min(count, most - len(self.all))
        if self.num_live + count > MAX_BRANCHES or len(self.all) + count > MAX_STARTED:
            raise TooManyBranches(
                f"the strategy {self._name} asks for {count} branches more, where {self.num_live} run and {len(self.all)} "
                f"were started; at most {MAX_BRANCHES} of a request may run at once, and {MAX_STARTED} be started in all"
            )
        return count

    def start(self, count: int, label: str, *, greedy: bool) -> None:
        """Start branches from the prompt."""
        self._submit(count, self._tokens, label, greedy=greedy)

    def fork(
        self, parent: BranchRun, count: int, num_tokens: int, forced: Sequence[int], label: str, *, greedy: bool
    ) -> list[BranchRun]:
        """Start branches that continue another one's first tokens and then forced ones; return those without room for more."""
        output, first = [*parent.token_ids[:num_tokens], *forced], len(self.all)
        has_room = len(output) < self._params.most_output_tokens(
            len(self._tokens), self._frontend.model_info.max_model_len
        )
        if has_room:
            tokens = np.concatenate((self._tokens, np.array(output, np.int32)))
            self._submit(count, tokens, label, greedy=greedy, parent=parent.sequence_id)
        else:
            self._add(count, -1, label)
        children = self.all[first:]
        for child in children:
            child.continue_from(parent, num_tokens, forced)
            self.num_known += child.num_shared
            if not has_room:
                tokenizer, skip = self._frontend.tokenizer, self._params.skip_special_tokens
                child.change(text="" if tokenizer is None else tokenizer.decode(output, skip))
        return [] if has_room else children

    def resume(self, branch: BranchRun) -> None:
        """Let a branch go on, if it is paused."""
        if branch.status is Status.PAUSED:
            branch.change(status=Status.RUNNING)
            self._frontend.resume(branch.request_id, (branch.index,))

    def take(self) -> list[Update]:
        """Give what has come to the branches, and return it."""
        return [update for request in list(self._requests.values()) for update in self._take(request)]

    def _take(self, request: OpenRequest) -> list[Update]:
        updates = self._frontend.take(request)
        if request.done and not request.untaken:
            del self._requests[request.id]
        for update in updates:
            if update.error is not None:
                continue
            self.all[update.branch].add(update, logprobs=self._needs.logprobs)
            self.num_tokens += len(update.token_ids)
            self.num_known += len(update.token_ids)
            if update.branch == 0:
                self.num_cached_tokens = update.num_cached_tokens
                self.prompt_logprobs = update.prompt_logprobs or self.prompt_logprobs
        return updates

    def end(self, branch: BranchRun, status: Status, finish_reason: str | None = None) -> None:
        """Take note that a branch has ended."""
        branch.change(status=status, finish_reason=finish_reason)
        self.num_live -= 1

    def prune(self, branches: Sequence[BranchRun]) -> None:
        """End branches that have not ended."""
        for branch in branches:
            self.end(branch, Status.PRUNED)
        for number in sorted({branch.request_id for branch in branches}):
            if request := self._requests.get(number):
                self._frontend.abort(number, [branch.index for branch in branches])
                self._take(request)

    def _submit(self, count: int, tokens: np.ndarray, label: str, *, greedy: bool, parent: int | None = None) -> None:
        """Start branches whose known tokens are these."""
        params, first = dataclasses.replace(self._params, n=count), len(self.all)
        only_sampled = self._needs.logprobs and params.logprobs is None
        if only_sampled:
            params = dataclasses.replace(params, logprobs=0)
        if greedy:
            params = dataclasses.replace(params, temperature=0.0)
        number = self._frontend.submit(
            tokens,
            params,
            self._options,
            is_quiet=self._is_quiet,
            only_sampled=only_sampled,
            first_branch=first,
            num_prompt_tokens=len(self._tokens),
            parent=parent,
            pause_token_ids=self._pause_ids,
        )
        self._on_submit(number)
        self._add(count, number, label)
        request = self._frontend.find(number)
        assert request is not None, "it has only now been submitted"
        self.request_ids.append(number)
        self._first = self._first or request
        self._requests[number] = request
        for sequence_id, branch in request.running.items():
            run = self.all[branch.index]
            run.sequence_id, run.text = sequence_id, "".join(branch.texts)
            branch.texts.clear()
            branch.watch = None if run.falling is None else run.falling.push

    def _add(self, count: int, number: int, label: str) -> None:
        first = len(self.all)
        for index in range(first, first + count):
            window = self._needs.falling_window if index >= self._needs.falling_from else None
            self.all.append(BranchRun(index, number, label, window))
        self.num_live += count
