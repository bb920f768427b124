"""The offline API of cascades: a small and a large model, and the policy that chooses between them."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertwire.engine.frontend.api import RequestOptions
from expertwire.engine.frontend.cascade_legs import CascadeLeg, CascadePolicy, check_cascade_params
from expertwire.engine.frontend.cascades import CascadeRun, LegName
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.verifier_calls import VerifierCalls
from expertwire.generation import Job, ProgressBar, delayed_interrupt, raise_error
from expertwire.llm import LLM, as_list, one_each, plain_prompt
from expertwire.outputs import RequestOutput
from expertwire.scheduler.sampling_params import SamplingParams
from expertwire.strategies.cascade import Cascade
from expertwire.strategies.cascade_log import DecisionRecord
from expertwire.strategies.cascade_policy import read_cascade
from expertwire.strategies.decision_log import DecisionLog
from expertwire.strategies.verifiers import DEFAULT_POLICY, Verifier, VerifierPolicy

_POLL_S = 0.2  # longest wait for an interrupt to take effect


@dataclass
class CascadeOutput(RequestOutput):
    """The output for one prompt, by one of the two models.

    Attributes:
        model: the model whose output it is.
        reason: "kept", or the mechanism that escalated: "router", "confidence", "verifier".
        record: the decision, as in the log.
    """

    model: str = ""
    reason: str = ""
    record: DecisionRecord | None = None


class CascadeLLM:
    """Two models and a policy. It does not close the models.

    Args:
        policy: the policy, or the path of a file that `expertwire calibrate cascade` has written.
        models: the `LLM`s by the policy's names of them.
        verifier: scores the small model's outputs; needed with `verifier_threshold`.
        verifier_policy: limits of the verifier; a failure sends the request to the large model.
        decision_log: file to which a record of each request is appended; None: none.

    Attributes:
        policy: the policy.

    Raises:
        ValueError: names the argument and what is allowed.
    """

    def __init__(
        self,
        policy: Cascade | str | Path,
        models: Mapping[str, LLM],
        *,
        verifier: Verifier | None = None,
        verifier_policy: VerifierPolicy = DEFAULT_POLICY,
        decision_log: str | Path | None = None,
    ) -> None:
        cascade = policy if isinstance(policy, Cascade) else read_cascade(policy)
        for name in (cascade.small, cascade.large):
            if name not in models:
                raise ValueError(
                    f"models must have the policy's {cascade.small} and {cascade.large}, got {', '.join(models)}"
                )
        self.policy = cascade
        self._llms: dict[LegName, LLM] = {"small": models[cascade.small], "large": models[cascade.large]}
        self._bound = CascadePolicy(cascade=cascade, verifier=verifier, verifier_policy=verifier_policy)
        self._shares_tokens = _share_tokens(self._llms["small"], self._llms["large"])
        if cascade.draft_tolerance is not None and not self._shares_tokens:
            raise ValueError(
                f"draft_tolerance must be None where tokenizers differ, as those of {cascade.small} and {cascade.large} do; got "
                f"{cascade.draft_tolerance}"
            )
        self._log = None if decision_log is None else DecisionLog(decision_log)
        # Request ids differ from run to run, so that each has a random slice of its own.
        self._prefix, self._num_requests = f"{time.time_ns():x}", 0

    def __enter__(self) -> CascadeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits for the decision log. Idempotent."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def generate(
        self,
        prompts: str | Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        use_tqdm: bool = True,
    ) -> list[CascadeOutput]:
        """Generate an output for each prompt; return them in the order of the prompts.

        An interrupt (Ctrl-C) aborts the running requests.

        Args:
            prompts: as for `LLM.generate`; token ids only where both models have one tokenizer.
            sampling_params: for all prompts, or one for each; `n` must be 1. None: each model's defaults.
            request_ids: for the log and the random slice, which is a function of them; None: unique ones.
            use_tqdm: show a progress bar.

        Raises:
            ValueError: a prompt or its parameters are invalid; all are checked before any is generated.
            RuntimeError: a request has failed.
            EngineFailed: an engine has failed; the message names the rank.
        """
        items = as_list(prompts)
        params = one_each("sampling_params", sampling_params, len(items))
        ids = self._new_ids(len(items)) if request_ids is None else one_each("request_ids", request_ids, len(items))
        jobs = []
        for index, (item, one, request_id) in enumerate(zip(items, params, ids, strict=True)):
            try:
                jobs.append(self._job(index, item, one, request_id))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
        with contextlib.closing(VerifierCalls()) as calls:
            capacity = min(llm.queue_capacity for llm in self._llms.values())
            run = _Run(self._bound, jobs, self._shares_tokens, calls, capacity)
            with ProgressBar(len(jobs), use_tqdm) as progress, delayed_interrupt() as check_interrupt:
                try:
                    while run.unfinished:
                        run.submit()
                        progress.show(*run.poll())
                        check_interrupt()
                finally:
                    run.abort()
        outputs = [job.output() for job in jobs]
        for output in outputs:
            if self._log is not None and output.record is not None:
                self._log.record(output.record)
        return outputs

    def _new_ids(self, count: int) -> list[str]:
        first, self._num_requests = self._num_requests, self._num_requests + count
        return [f"{self._prefix}-{number}" for number in range(first, first + count)]

    def _job(self, index: int, item: Any, params: SamplingParams | None, request_id: str) -> _Job:
        text, prompt = plain_prompt(item)
        if text is None and not self._shares_tokens:
            raise ValueError("prompt must be a text, as the models have different tokenizers; got token ids")
        legs: dict[LegName, CascadeLeg] = {}
        for name, llm in self._llms.items():
            own = llm.get_default_sampling_params() if params is None else params
            if not isinstance(own, SamplingParams):
                raise ValueError(f"sampling_params must be SamplingParams or a list of them, got {own!r}")
            check_cascade_params(own)
            known = legs["small"].tokens if name == "large" and self._shares_tokens else prompt
            tokens = llm.frontend.encode(known, own)
            legs[name] = CascadeLeg(frontend=llm.frontend, tokens=tokens, params=own, options=RequestOptions())
        return _Job(index, text, request_id, legs)


class _Job:
    """A prompt, its request and its output so far."""

    def __init__(self, index: int, text: str | None, request_id: str, legs: dict[LegName, CascadeLeg]) -> None:
        self.index, self.text, self.request_id, self.legs = index, text, request_id, legs
        self.run: CascadeRun | None = None
        small = legs["small"]
        self.parts = Job(index, text, small.tokens, small.params, small.options)

    def output(self) -> CascadeOutput:
        run = self.run
        assert run is not None, f"prompt {self.index} has not begun"
        assert run.record is not None, f"prompt {self.index} has no result"
        chosen: LegName = "small" if run.record.chosen == run.policy.cascade.small else "large"
        self.parts.tokens = self.legs[chosen].tokens
        plain = self.parts.output()
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        fields["request_id"] = self.request_id
        return CascadeOutput(**fields, model=run.record.chosen, reason=run.record.reason, record=run.record)


class _Run:
    """Runs all prompts, as many at a time as the engines' queues take."""

    def __init__(
        self, policy: CascadePolicy, jobs: Sequence[_Job], shares_tokens: bool, calls: VerifierCalls, capacity: int
    ) -> None:
        self.unfinished = len(jobs)
        self._shares_tokens = shares_tokens
        self._policy, self._calls, self._capacity = policy, calls, capacity
        self._todo = list(reversed(jobs))
        self._open: dict[int, _Job] = {}
        self._legs: dict[tuple[Frontend, int], tuple[_Job, LegName]] = {}
        self._frontends: list[Frontend] = [leg.frontend for leg in jobs[0].legs.values()] if jobs else []
        self._num_tokens = 0

    def submit(self) -> None:
        """Begin as many requests as fit."""
        while self._todo and len(self._open) < self._capacity:
            self._begin(self._todo.pop())

    def poll(self) -> tuple[int, int]:
        """Wait for news; return the numbers of prompts finished and of new tokens."""
        if not self._receive():
            reading = [self._calls.fileno(), *(frontend.fileno() for frontend in self._frontends)]
            writing = [frontend for frontend in self._frontends if frontend.pending]
            limit = self._calls.deadline_s
            wait_s = _POLL_S if limit is None else min(_POLL_S, max(0.0, limit - time.monotonic()))
            select.select(reading, [frontend.fileno() for frontend in writing], [], wait_s)
            for frontend in writing:
                frontend.flush()
            self._receive()
        finished, tokens = 0, 0
        for job in list(self._open.values()):
            run = job.run
            assert run is not None, "it is open"
            for update in run.take():
                job.parts.add(update)
            if run.error is not None:
                failed = next((each for each in self._frontends if each.failure is not None), self._frontends[0])
                raise_error(failed, job.index, run.error)
            tokens += run.num_tokens
            if run.done:
                del self._open[job.index]
                self._legs = {key: of for key, of in self._legs.items() if of[0] is not job}
                finished += 1
        self.unfinished -= finished
        before, self._num_tokens = self._num_tokens, tokens
        return finished, max(0, tokens - before)

    def abort(self) -> None:
        """Abort the running requests."""
        for job in self._open.values():
            assert job.run is not None, "it is open"
            job.run.abort()
        self._open.clear()

    def _begin(self, job: _Job) -> None:
        def note(name: LegName) -> None:
            leg = job.legs[name]
            assert leg.number is not None, "it has been submitted"
            self._legs[leg.frontend, leg.number] = job, name

        job.run = CascadeRun(
            self._policy,
            job.legs["small"],
            job.legs["large"],
            request_id=job.request_id,
            prompt=job.text,
            shares_tokens=self._shares_tokens,
            calls=self._calls,
            on_submit=note,
        )
        self._open[job.index] = job
        job.run.begin()

    def _receive(self) -> bool:
        """Take in what has come, and return whether anything has."""
        has_news = False
        for frontend in self._frontends:
            for request in frontend.receive(0):
                has_news = True
                if (found := self._legs.get((frontend, request.id))) is None:
                    frontend.take(request)  # of an earlier call that was interrupted
                    continue
                job, name = found
                assert job.run is not None, "it is open"
                job.run.handle(name, request)
        self._calls.deliver()
        return has_news


def _share_tokens(small: LLM, large: LLM) -> bool:
    if small.tokenizer is None or large.tokenizer is None:
        return small.tokenizer is large.tokenizer
    return small.tokenizer.makes_same_tokens(large.tokenizer)
