"""A call of the offline API with a strategy: its groups and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.group_views import BranchRun
from expertwire.engine.frontend.groups import Groups
from expertwire.engine.frontend.logprobs import to_dict
from expertwire.generation import raise_error
from expertwire.outputs import CompletionOutput, GroupBranch, GroupOutput, RequestOutput
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.base import Strategy

_POLL_S = 0.2  # longest wait for an interrupt to take effect


@dataclass
class GroupJob:
    """A prompt, its strategy and its group, when it has begun."""

    index: int
    text: str | None
    tokens: np.ndarray
    params: SamplingParams
    options: RequestOptions
    strategy: Strategy
    run: GroupRun | None = field(default=None, init=False)

    def start(self, groups: Groups) -> GroupRun:
        """Start the group."""
        try:
            self.run = groups.start(self.tokens, self.params, self.options, self.strategy, prompt=self.text)
        except ValueError as error:
            raise ValueError(f"prompt {self.index}: {error}") from error
        return self.run

    def output(self) -> RequestOutput:
        """Return the outputs of the group, which has ended without an error."""
        run = self.run
        assert run is not None, f"prompt {self.index} has not begun"
        assert run.selection is not None, f"prompt {self.index} has no result"
        positions = run.prompt_logprobs
        return RequestOutput(
            request_id=f"group-{run.id}",
            prompt=self.text,
            prompt_token_ids=self.tokens.tolist(),
            prompt_logprobs=None
            if positions is None
            else [None if each is None else to_dict(each) for each in positions],
            outputs=[_completion(run, run.branches[index]) for index in run.selection.branches],
            finished=True,
            num_cached_tokens=run.num_cached_tokens,
            group=GroupOutput(
                branches=[_branch(run, branch) for branch in run.branches],
                selected=list(run.selection.branches),
                answer=run.selection.answer,
                weights=run.selection.weights,
                reason=run.selection.reason,
                tokens=run.token_counts(),
            ),
        )


class GroupsRun:
    """Runs all prompts, as many groups at a time as the engine's queue takes; as `generation.Run`."""

    def __init__(self, groups: Groups, jobs: Sequence[GroupJob], max_queued_requests: int) -> None:
        self.unfinished = len(jobs)
        self._groups, self._frontend = groups, groups.frontend
        self._todo = list(reversed(jobs))
        self._open: list[tuple[GroupJob, GroupRun]] = []
        self._capacity = max_queued_requests
        self._largest = 1  # branches that any group has had at a time
        self._num_tokens = 0

    def submit(self) -> None:
        """Start as many groups as fit, if they are as large as the largest until now."""
        while self._todo and (not self._open or self._num_live() + self._largest <= self._capacity):
            job = self._todo.pop()
            run = job.start(self._groups)
            self._open.append((job, run))
            self._largest = max(self._largest, run.num_live)

    def poll(self) -> tuple[int, int]:
        """Wait for news; return the numbers of prompts finished and of new tokens."""
        self._groups.poll(0.0 if any(run.done for _, run in self._open) else _POLL_S)
        if self._todo:
            self._largest = max([self._largest, *(run.num_live for _, run in self._open)])
        before, self._num_tokens = self._num_tokens, sum(run.num_tokens for _, run in self._open)
        tokens = self._num_tokens - before
        done = [(job, run) for job, run in self._open if run.done]
        for job, run in done:
            self._num_tokens -= run.num_tokens
            if run.error is not None:
                raise_error(self._frontend, job.index, run.error)
        self._open = [(job, run) for job, run in self._open if not run.done]
        self.unfinished -= len(done)
        return len(done), tokens

    def abort(self) -> None:
        """Abort the running groups."""
        for _, run in self._open:
            run.abort()
        self._open.clear()

    def _num_live(self) -> int:
        return sum(run.num_live for _, run in self._open)


def _completion(run: GroupRun, branch: BranchRun) -> CompletionOutput:
    has_logprobs = run.params.logprobs is not None
    logprobs = [to_dict(position) for position in branch.positions] if has_logprobs else None
    sampled = [] if logprobs is None else zip(branch.token_ids[-len(logprobs) :], logprobs, strict=True)
    return CompletionOutput(
        index=branch.index,
        text=branch.text,
        token_ids=list(branch.token_ids),
        logprobs=logprobs,
        cumulative_logprob=sum(entry[token].logprob for token, entry in sampled) if has_logprobs else None,
        expert_load=branch.expert_load,
        finish_reason=branch.finish_reason,
        stop_reason=branch.stop_reason,
        seed=run.params.seed,
    )


def _branch(run: GroupRun, branch: BranchRun) -> GroupBranch:
    return GroupBranch(
        index=branch.index,
        parent=branch.parent,
        num_shared=branch.num_shared,
        fate=run.fate(branch),
        text=branch.text,
        token_ids=list(branch.token_ids),
        finish_reason=branch.finish_reason,
        answer=branch.answer,
        score=branch.scores[-1].value if branch.scores else None,
        problems=list(branch.problems),
    )
