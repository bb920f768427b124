"""One call of the offline API: its requests, their outputs and the progress bar."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from expertwire.engine.frontend.api import EngineFailed, LogprobDict, RequestError, RequestOptions, Update
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.logprobs import to_dict
from expertwire.outputs import CompletionOutput, RequestOutput
from expertwire.scheduler.sampling_params import SamplingParams

_POLL_S = 0.2  # longest wait for an interrupt to take effect


class Job:
    """A prompt and its outputs so far."""

    def __init__(
        self, index: int, text: str | None, tokens: np.ndarray, params: SamplingParams, options: RequestOptions
    ) -> None:
        self.index = index
        self.text = text
        self.tokens = tokens
        self.params = params
        self.options = options
        self.request_id = -1
        self.num_waiting = params.n  # outputs without an update
        self.finished = False
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[LogprobDict | None] | None = None
        self.outputs = [
            CompletionOutput(index=i, logprobs=None if params.logprobs is None else []) for i in range(params.n)
        ]
        self.texts: list[list[str]] = [[] for _ in self.outputs]

    def add(self, update: Update) -> None:
        output = self.outputs[update.branch]
        self.num_waiting -= output.seed is None
        output.seed = update.seed
        output.token_ids.extend(update.token_ids)
        self.texts[update.branch].append(update.text)
        if output.logprobs is not None and update.logprobs is not None:
            output.logprobs.extend(map(to_dict, update.logprobs))
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = [None if each is None else to_dict(each) for each in update.prompt_logprobs]
        output.finish_reason, output.stop_reason = update.finish_reason, update.stop_reason
        output.expert_load = update.expert_load
        self.num_cached_tokens = update.num_cached_tokens
        self.finished = update.done

    def output(self) -> RequestOutput:
        for output, texts in zip(self.outputs, self.texts, strict=True):
            output.text = "".join(texts)
            if output.logprobs is not None:
                sampled = zip(output.token_ids, output.logprobs, strict=True)
                output.cumulative_logprob = sum(entry[token].logprob for token, entry in sampled)
        return RequestOutput(
            request_id=str(self.request_id),
            prompt=self.text,
            prompt_token_ids=self.tokens.tolist(),
            prompt_logprobs=self.prompt_logprobs,
            outputs=self.outputs,
            finished=self.finished,
            num_cached_tokens=self.num_cached_tokens,
        )


class Run:
    """Runs all prompts, with as many submitted at a time as the engine's queue takes."""

    def __init__(self, frontend: Frontend, jobs: Sequence[Job], max_queued_requests: int) -> None:
        self.unfinished = len(jobs)
        self._frontend = frontend
        self._todo = iter(jobs)
        self._next = next(self._todo, None)
        self._open: dict[int, Job] = {}
        self._capacity = max_queued_requests

    def submit(self) -> None:
        """Submit as many prompts as the queue takes."""
        while self._next is not None and self._next.params.n <= self._capacity:
            job = self._next
            job.request_id = self._frontend.submit(job.tokens, job.params, job.options)
            self._open[job.request_id] = job
            self._capacity -= job.num_waiting
            self._next = next(self._todo, None)

    def poll(self) -> tuple[int, int]:
        """Wait for updates; return the numbers of prompts finished and of new tokens."""
        finished, tokens = 0, 0
        for update in self._frontend.poll(_POLL_S):
            job = self._open.get(update.request_id)
            if job is None:  # of an earlier call that was interrupted
                continue
            if update.error is not None:
                del self._open[update.request_id]
                raise_error(self._frontend, job.index, update.error)
            self._capacity += job.num_waiting
            job.add(update)
            self._capacity -= job.num_waiting
            tokens += len(update.token_ids)
            if job.finished:
                del self._open[update.request_id]
                finished += 1
        self.unfinished -= finished
        return finished, tokens

    def abort(self) -> None:
        """Abort the running prompts."""
        for request_id in self._open:
            self._frontend.abort(request_id)
        self._open.clear()


def raise_error(frontend: Frontend, prompt: int, error: RequestError) -> NoReturn:
    """Raise the exception of a prompt that has ended with an error."""
    if frontend.failure is not None:
        raise EngineFailed(str(frontend.failure), frontend.failure.rank)
    kind = ValueError if error.code == "INVALID_ARGUMENT" else RuntimeError
    raise kind(f"prompt {prompt}: {error.message} ({error.code})")


class ProgressBar:
    """A progress bar over prompts that shows tokens per second."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar = tqdm(total=total, desc="prompts", unit="prompt", miniters=0, dynamic_ncols=True, disable=not shown)
        self._begin = time.monotonic()
        self._tokens = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, prompts: int, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / max(time.monotonic() - self._begin, 1e-9)
        self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
        self._bar.update(prompts)


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[Callable[[], None]]:
    """Delay Ctrl-C until the yielded function is called, so that no message is cut in two; a second one acts at once."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield lambda: None
        return
    interrupts: list[tuple[int, Any]] = []

    def remember(number: int, frame: Any) -> None:
        interrupts.append((number, frame))
        if len(interrupts) > 1:
            previous(number, frame)

    def check() -> None:
        if interrupts:
            previous(*interrupts.pop())

    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
