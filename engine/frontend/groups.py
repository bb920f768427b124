"""Groups: requests with a strategy of test-time compute, run over a frontend.

A group's branches are branches of ordinary requests to the frontend, one for each time that some are started, all with the
group's seed and an index of their own. Everything happens in the frontend's thread but the calls of verifiers (`verifier_calls`)
and, where there is `aside`, large parts of strategies.

**Tokens.** What the engine samples for a group is counted once, as *kept* or as *pruned* (`strategies.accounting`). Until
the controller has heard that a branch is pruned, it may send a few more of its tokens; they are counted as *late*, for the
frontend as a whole. What a rank samples in the step in flight for a branch that has ended, the controller counts as *dropped*.
The four add up to the engine's `tokens_sampled`, if it serves nothing else. Tokens that an engine computes for a verifier count
for the group that gets the score in time, and in the statistics, as `tokens_verifier`, whenever they come.
"""

from __future__ import annotations

import dataclasses
import select
import time
from collections.abc import Callable, Iterable

import numpy as np

from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.group_run import GroupRun
from expertwire.engine.frontend.open_requests import OpenRequest
from expertwire.engine.frontend.strategy_parts import Aside, StrategyFailed
from expertwire.engine.frontend.strategy_texts import StrategyTexts
from expertwire.engine.frontend.verifier_calls import VerifierCalls
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.base import Strategy


class Groups:
    """The groups of a frontend.

    Args:
        frontend: runs their branches.
        calls: calls their verifiers; `close` closes it.
        aside: calls its first argument in another thread, and then, in this one, the second with the outcome; None: everything is
            computed in this thread.

    Attributes:
        texts: the tokens of strategies' texts.
    """

    def __init__(self, frontend: Frontend, calls: VerifierCalls | None = None, *, aside: Aside | None = None) -> None:
        self.frontend, self.aside = frontend, aside
        self.calls = VerifierCalls() if calls is None else calls
        self._runs: dict[int, GroupRun] = {}  # by the frontend's request ids
        self._open: dict[int, GroupRun] = {}  # by their own numbers
        self._timed: dict[int, GroupRun] = {}  # those of them with a budget in seconds
        self.texts = StrategyTexts(frontend)
        self._next = 0

    @property
    def deadline_s(self) -> float | None:
        """When `deliver` must be called though nothing is readable, by `time.monotonic`; None: never."""
        limits = [self.calls.deadline_s, *(run.deadline_s for run in self._timed.values())]
        return min((limit for limit in limits if limit is not None), default=None)

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `deliver` has something to do."""
        return self.calls.fileno()

    def start(
        self,
        tokens: np.ndarray,
        params: SamplingParams,
        options: RequestOptions,
        strategy: Strategy,
        *,
        prompt: str | None = None,
        streams: bool = False,
        on_done: Callable[[], None] = lambda: None,
    ) -> GroupRun:
        """Start a group.

        Args:
            tokens: the prompt, which `Frontend.encode` returned for these parameters.
            params: sampling parameters of every branch; `n` must be 1.
            options: options for the scheduler.
            strategy: decides about the group.
            prompt: text of the prompt for the verifier; None: it is decoded from `tokens`.
            streams: whether somebody reads branches' output while the group runs, as `GroupRun.on_news` tells of it.
            on_done: called when the group has ended, which may be within this call.

        Raises:
            ValueError: names the field and what is allowed.
            EngineFailed: the engine has failed.
        """
        check_params(params)
        if params.seed is None:
            params = dataclasses.replace(params, seed=self.frontend.new_seed())
        try:
            run = GroupRun(self, self._next, tokens, params, options, strategy, prompt, streams=streams)
        except StrategyFailed as failed:
            raise ValueError(str(failed)) from failed
        self._next += 1
        self._open[run.id] = run
        if run.deadline_s is not None:
            self._timed[run.id] = run
        run.on_done = on_done
        run.begin()
        return run

    def handle(self, request: OpenRequest) -> bool:
        """Take in a request's news, from `Frontend.receive`; return whether it belongs to a group."""
        if (run := self._runs.get(request.id)) is None:
            return False
        run.handle(request)
        return True

    def poll(self, timeout_s: float) -> None:
        """Take in what has come from the engine and from verifiers; wait up to `timeout_s` seconds for it if nothing has.

        For a frontend that runs groups only: other requests' outputs are dropped.

        Raises:
            EngineFailed: the engine has failed.
        """
        if self._receive():
            return
        deadline_s, descriptor = self.deadline_s, self.frontend.fileno()
        wait_s = timeout_s if deadline_s is None else min(timeout_s, max(0.0, deadline_s - time.monotonic()))
        writing = [descriptor] if self.frontend.pending else []
        select.select([descriptor, self.fileno()], writing, [], wait_s)
        self._receive()

    def _receive(self) -> bool:
        """Take in what has come, and return whether the engine has sent anything."""
        news = self.frontend.receive(0)
        for request in news:
            if not self.handle(request):
                self.frontend.take(request)  # of an earlier call that was interrupted
        self.deliver()
        return bool(news)

    def deliver(self) -> None:
        """Take in what verifiers have answered, and end the groups whose time is up."""
        before = self.calls.num_tokens
        self.calls.deliver()
        if num_tokens := self.calls.num_tokens - before:
            self.frontend.counts["tokens_verifier"] += num_tokens
        now = time.monotonic()
        for run in list(self._timed.values()):
            if run.deadline_s is not None and run.deadline_s <= now:
                run.advance()

    def close(self) -> None:
        """Abort all groups. Idempotent."""
        for run in list(self._open.values()):
            run.abort()
        self.calls.close()

    def add(self, request_id: int, run: GroupRun) -> None:
        """Note that one of the frontend's requests belongs to a group."""
        self._runs[request_id] = run

    def remove(self, run: GroupRun, request_ids: Iterable[int]) -> None:
        """Forget a group that has ended, and count what it took."""
        for number in request_ids:
            self._runs.pop(number, None)
        del self._open[run.id]
        self._timed.pop(run.id, None)
        self.calls.forget(run.id)
        counts, tokens = self.frontend.counts, run.token_counts()
        for branch in run.branches:
            counts[f"branches_{run.fate(branch)}"] += 1
        counts.update(tokens_kept=tokens.kept, tokens_pruned=tokens.pruned)


def check_params(params: SamplingParams) -> None:
    """Raise ValueError if a request with a strategy cannot have these sampling parameters."""
    if params.n != 1:
        raise ValueError(f"n must be 1 with a strategy, which starts the branches, got {params.n}")
