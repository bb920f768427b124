"""The frontend: it sends requests to the controller and turns the controller's outputs into text.

The offline API has a frontend in the caller's process, the gRPC server one in its own. A frontend belongs to one thread.

A request with `n` outputs (branches) is `n` sequences to the controller, each with an id.
Shape letters as in `scheduler.outputs`.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from expertwire.comm.control.channel import ChannelClosed, ControlChannel
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.api import (
    EngineFailed,
    Logprob,
    LogprobDict,
    RequestError,
    RequestOptions,
    Update,
)
from expertwire.engine.frontend.open_requests import Branch, OpenRequest
from expertwire.engine.frontend.prompts import Prompt, encode_prompt
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.engine.messages import (
    Abort,
    Failure,
    Hello,
    Message,
    Stats,
    StatsRequest,
    Submit,
    Welcome,
    decode,
    encode,
)
from expertwire.scheduler.outputs import FinishReason, Rejection, StepOutputs
from expertwire.scheduler.sampling_params import SamplingParams

_DEFAULT_OPTIONS = RequestOptions()
_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Frontend:
    """Requests and their updates over one channel to the controller.

    Args:
        channel: a connected channel, which `close` closes.
        tokenizer: None serves token ids only, without text.
        deterministic_seeds: whether the seeds of requests without one follow from the engine's seed, so that a program gives
            the same outputs every time, instead of from the operating system.
        welcome_timeout_s: seconds within which the controller must answer.

    Attributes:
        model_info: the model and its limits.

    Raises:
        EngineFailed: the controller does not answer, or the engine has failed.
    """

    def __init__(
        self,
        channel: ControlChannel,
        tokenizer: Tokenizer | None,
        *,
        deterministic_seeds: bool = False,
        welcome_timeout_s: float = 30.0,
    ) -> None:
        self.tokenizer = tokenizer
        self._channel = channel
        self._requests: dict[int, OpenRequest] = {}
        self._sequences: dict[int, Branch] = {}
        self._updates: list[Update] = []
        self._stats: list[dict[str, Any]] = []
        self._num_stats_requests = 0
        self._next_request_id = 0
        self._next_sequence_id = 0
        self._failure: EngineFailed | None = None
        self.model_info = self._say_hello(welcome_timeout_s)
        self._seeds = random.Random(self.model_info.seed) if deterministic_seeds else random.SystemRandom()

    @property
    def num_open(self) -> int:
        """Number of requests that have not had their last update."""
        return len(self._requests)

    @property
    def failure(self) -> EngineFailed | None:
        """The error with which the engine failed, or None."""
        return self._failure

    def encode(self, prompt: Prompt, params: SamplingParams) -> np.ndarray:
        """Check a prompt and its parameters; return the prompt's tokens for `submit`, i32 [length].

        Raises:
            ValueError: the engine cannot serve them; names the field and what is allowed.
        """
        return encode_prompt(prompt, params, self.model_info, self.tokenizer)

    def submit(self, tokens: np.ndarray, params: SamplingParams, options: RequestOptions = _DEFAULT_OPTIONS) -> int:
        """Request outputs for the tokens that `encode` returned for these parameters.

        Returns:
            The id of the request; its updates come from `poll`.

        Raises:
            EngineFailed: the engine has failed.
        """
        self._check_alive()
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        request = OpenRequest(self._next_request_id, tokens.tolist(), params, seed)
        self._next_request_id += 1
        self._requests[request.id] = request
        ids = range(self._next_sequence_id, self._next_sequence_id + params.n)
        self._next_sequence_id = ids.stop
        for index, sequence_id in enumerate(ids):
            stream = None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens)
            shape = self.model_info.num_layers, self.model_info.num_experts
            load = np.zeros(shape, np.int64) if params.expert_load else None
            branch = Branch(request, sequence_id, index, stream, load)
            request.branches[sequence_id] = self._sequences[sequence_id] = branch
        values = dataclasses.replace(params, seed=seed).to_dict()
        self._send(
            Submit(sequence_ids=np.array(ids, np.int64), params=values, options=options.to_dict(), tokens=tokens)
        )
        self._check_alive()
        return request.id

    def abort(self, request_id: int) -> None:
        """End a request; unknown and finished ones are ignored.

        The next `poll` returns at once, with an update of finish reason "abort" for each unfinished branch. `fileno()` does
        not become readable, so callers that wait for it must call `poll` themselves.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        branches = list(request.branches.values())
        for branch in branches:
            self._updates.append(self._end(branch, request.update(branch=branch.index, text=branch.flush()), "abort"))
        self._abort_sequences([branch.sequence_id for branch in branches])

    def poll(self, timeout_s: float) -> list[Update]:
        """Return the updates that have arrived; wait up to `timeout_s` seconds for a first message if there are none.

        Raises:
            EngineFailed: the engine has failed, and every open request has had its last update.
        """
        if not self._updates:
            self._check_alive()
        timeout_s = 0.0 if self._updates else timeout_s
        while (message := self._receive(timeout_s)) is not None:
            self._handle(message)
            timeout_s = 0.0
        updates, self._updates = self._updates, []
        return updates

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `poll(0)` may return updates."""
        return self._channel.fileno()

    def stats(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Return the engine's counters and gauges. Updates that arrive meanwhile are kept for the next `poll`.

        Raises:
            TimeoutError: no answer within `timeout_s` seconds.
            EngineFailed: the engine has failed.
        """
        self._send(StatsRequest())
        self._num_stats_requests += 1
        deadline = time.monotonic() + timeout_s
        while self._failure is None and len(self._stats) < self._num_stats_requests:
            message = self._receive(max(0.0, deadline - time.monotonic()))
            if message is not None:
                self._handle(message)
            elif self._failure is None:
                raise TimeoutError(f"the engine returned no statistics within {timeout_s:g} s")
        self._check_alive()
        # Answers to earlier calls that timed out come first.
        values = self._stats[-1]
        self._num_stats_requests = 0
        self._stats.clear()
        return values

    def close(self) -> None:
        """Close the channel; the controller then frees the open requests. Idempotent."""
        self._channel.close()

    def _say_hello(self, timeout_s: float) -> ModelInfo:
        self._send(Hello())
        message = self._receive(timeout_s)
        if isinstance(message, Welcome):
            return ModelInfo.from_dict(message.model_info)
        if isinstance(message, Failure):
            self._handle(message)
        self._check_alive()
        raise EngineFailed(f"the controller did not answer within {timeout_s:g} s")

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineFailed(str(self._failure), self._failure.rank)

    def _send(self, message: Message) -> None:
        if self._failure is None:
            try:
                self._channel.send(encode(message))
            except ChannelClosed as error:
                self._fail(-1, f"the connection to the controller is lost: {error}")

    def _receive(self, timeout_s: float) -> Message | None:
        if self._failure is not None:
            return None
        try:
            arrays = self._channel.recv(timeout_s)
        except ChannelClosed as error:
            self._fail(-1, f"the connection to the controller is lost: {error}")
            return None
        return None if arrays is None else decode(arrays)

    def _handle(self, message: Message) -> None:
        if isinstance(message, StepOutputs):
            self._handle_outputs(message)
        elif isinstance(message, Rejection):
            if branch := self._sequences.get(message.key):
                error = RequestError(message.code, message.message, message.retry_after_s)
                self._end_with_error(branch.request, error)
        elif isinstance(message, Stats):
            self._stats.append(message.values)
        elif isinstance(message, Failure):
            self._fail(message.rank, message.message)
        else:
            raise AssertionError(f"unexpected message from the controller: {type(message).__name__}")

    def _handle_outputs(self, message: StepOutputs) -> None:
        if len(message.prompt_key_I):
            self._add_prompt_logprobs(message)
        if len(message.routed_keys):
            self._add_expert_load(message)
        stopped = []
        rows = zip(message.key_O.tolist(), message.token_O.tolist(), message.finish_O.tolist(), strict=True)
        for row, (sequence_id, token, finish) in enumerate(rows):
            branch = self._sequences.get(sequence_id)
            if branch is None:
                continue
            update = self._advance(branch, token, finish, message, row)
            self._updates.append(update)
            if update.finish_reason is not None and not finish:
                stopped.append(sequence_id)
        if stopped:
            self._abort_sequences(stopped)

    def _advance(self, branch: Branch, token: int, finish: int, message: StepOutputs, row: int) -> Update:
        """Return the update of one row; the branch ends if `finish` is set or a stop string is found."""
        request = branch.request
        text = branch.push(token, finish)
        logprobs = prompt_logprobs = None
        if request.params.logprobs is not None:
            logprobs = (self._logprobs_of(message, row, token),)
        if branch.index == 0:
            prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
            request.num_cached_tokens = int(message.num_cached_O[row])
        update = request.update(
            branch=branch.index, token_ids=(token,), text=text, logprobs=logprobs, prompt_logprobs=prompt_logprobs
        )
        if branch.stop is not None and branch.stop.found is not None:
            return self._end(branch, update, "stop", branch.stop.found)
        if finish:
            is_stop_token = finish == FinishReason.STOP and token in (request.params.stop_token_ids or ())
            return self._end(branch, update, _FINISH_REASONS[FinishReason(finish)], token if is_stop_token else None)
        return update

    def _end(self, branch: Branch, update: Update, reason: str, stop_reason: str | int | None = None) -> Update:
        """Forget a branch; return its last update."""
        request = branch.request
        del self._sequences[branch.sequence_id], request.branches[branch.sequence_id]
        done = not request.branches
        if done:
            del self._requests[request.id]
        expert_load = None if branch.expert_load is None else branch.expert_load.tolist()
        return update._replace(finish_reason=reason, stop_reason=stop_reason, expert_load=expert_load, done=done)

    def _logprobs_of(self, message: StepOutputs, row: int, token: int) -> LogprobDict:
        top = slice(message.top_offsets_O1[row], message.top_offsets_O1[row + 1])
        own = (token, float(message.logprob_O[row]), int(message.token_rank_O[row]))
        return self._logprobs(*own, message.top_ids[top], message.top_logprobs[top])

    def _add_prompt_logprobs(self, message: StepOutputs) -> None:
        offsets = message.prompt_top_offsets_I1.tolist()
        values = zip(message.prompt_logprob_I.tolist(), message.prompt_token_rank_I.tolist(), strict=True)
        rows = zip(message.prompt_key_I.tolist(), message.prompt_position_I.tolist(), values, strict=True)
        for row, (sequence_id, position, (logprob, rank)) in enumerate(rows):
            branch = self._sequences.get(sequence_id)
            # The prompt of a preempted request is computed again; its log-probabilities have been reported.
            if branch is None or branch.request.prompt_logprobs is None:
                continue
            top = slice(offsets[row], offsets[row + 1])
            token = branch.request.prompt[position]
            entry = self._logprobs(token, logprob, rank, message.prompt_top_ids[top], message.prompt_top_logprobs[top])
            branch.request.prompt_logprobs[position] = entry

    def _add_expert_load(self, message: StepOutputs) -> None:
        order = np.argsort(message.routed_keys, kind="stable")
        sequence_ids, starts = np.unique(message.routed_keys[order], return_index=True)
        for sequence_id, rows in zip(sequence_ids.tolist(), np.split(order, starts[1:]), strict=True):
            branch = self._sequences.get(sequence_id)
            if branch is not None and branch.expert_load is not None:
                load = branch.expert_load.reshape(-1)
                np.add.at(load, message.routed_experts[rows], message.routed_tokens[rows])

    def _logprobs(self, token: int, logprob: float, rank: int, ids: np.ndarray, values: np.ndarray) -> LogprobDict:
        text_of = self.tokenizer.token_text if self.tokenizer else _no_text
        entries = {token: Logprob(logprob, rank, text_of(token))}
        for place, (top, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1):
            if top != token:
                entries[top] = Logprob(value, place, text_of(top))
        return entries

    def _end_with_error(self, request: OpenRequest, error: RequestError) -> None:
        sequence_ids = list(request.branches)
        for sequence_id in sequence_ids:
            del self._sequences[sequence_id]
        del self._requests[request.id]
        self._updates.append(request.update(error=error, done=True))
        if len(sequence_ids) > 1:
            self._abort_sequences(sequence_ids)

    def _abort_sequences(self, sequence_ids: Sequence[int]) -> None:
        self._send(Abort(ids=np.array(sequence_ids, np.int64)))

    def _fail(self, rank: int, message: str) -> None:
        named = rank < 0 or f"rank {rank}" in message
        self._failure = EngineFailed(message if named else f"rank {rank}: {message}", rank)
        for request in list(self._requests.values()):
            self._end_with_error(request, RequestError("UNAVAILABLE", str(self._failure)))


def _no_text(token: int) -> None:
    return None
