"""A front: turns prompts into requests to the controller, and the controller's outputs into text.

The offline API is a front in the caller's process; the server runs others. A front belongs to one thread.

Shape letters as in `engine.messages` and `scheduler.plan`. A request with `n` branches is `n` requests to the controller, here
called wires.
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
from expertwire.engine.frontend.open_requests import Branch, OpenRequest
from expertwire.engine.frontend.outputs import EngineFailed, Logprob, LogprobDict, RequestError, Update
from expertwire.engine.frontend.prompts import Prompt, encode_prompt
from expertwire.engine.frontend.request_options import RequestOptions
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.engine.messages import (
    Abort,
    AskStats,
    Failure,
    Hello,
    Message,
    Stats,
    Submit,
    Welcome,
    decode,
    encode,
)
from expertwire.scheduler.outputs import FinishReason, StepOutputs
from expertwire.scheduler.request import Rejection
from expertwire.scheduler.sampling_params import SamplingParams

_PLAIN = RequestOptions()
_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Front:
    """Requests and their updates over one control channel.

    Args:
        channel: connected to the controller; `close` closes it.
        tokenizer: None serves token ids only, without text.
        deterministic_seeds: draw the seeds of requests without one from the engine's seed, so that a program gives the same
            outputs every time, instead of from the operating system.
        welcome_timeout_s: the controller must answer within this time.

    Attributes:
        model_info: what is served.

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
        self._wires: dict[int, Branch] = {}
        self._updates: list[Update] = []
        self._stats: list[dict[str, Any]] = []
        self._num_asked = 0
        self._next_request = 0
        self._next_wire = 0
        self._failure: EngineFailed | None = None
        self.model_info = self._meet(welcome_timeout_s)
        self._seeds = random.Random(self.model_info.seed) if deterministic_seeds else random.SystemRandom()

    @property
    def num_open(self) -> int:
        """Requests that have not had their last update."""
        return len(self._requests)

    @property
    def failure(self) -> EngineFailed | None:
        """Why the engine is of no more use, if it is."""
        return self._failure

    def encode(self, prompt: Prompt, params: SamplingParams) -> np.ndarray:
        """The tokens of a prompt, i32 [length], which `submit` takes too; nothing is sent.

        Raises:
            ValueError: the model cannot serve this; names the field and what is allowed.
        """
        return encode_prompt(prompt, params, self.model_info, self.tokenizer)

    def submit(self, prompt: Prompt, params: SamplingParams, options: RequestOptions = _PLAIN) -> int:
        """Ask for the outputs of a prompt: text, or its token ids.

        Returns:
            The id of the request; its updates come from `poll`.

        Raises:
            ValueError: as `encode`.
            EngineFailed: the engine has failed.
        """
        tokens = self.encode(prompt, params)
        self._check_alive()
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        request = OpenRequest(self._next_request, tokens.tolist(), params, seed)
        self._next_request += 1
        self._requests[request.id] = request
        wires = range(self._next_wire, self._next_wire + params.n)
        self._next_wire = wires.stop
        for index, wire in enumerate(wires):
            stream = None if self.tokenizer is None else self.tokenizer.stream(params.skip_special_tokens)
            shape = self.model_info.num_layers, self.model_info.num_experts
            load = np.zeros(shape, np.int64) if params.expert_load else None
            request.branches[wire] = self._wires[wire] = Branch(request, wire, index, stream, load)
        asked = dataclasses.replace(params, seed=seed).to_dict()
        self._send(Submit(ids_B=np.array(wires, np.int64), params=asked, options=options.to_dict(), tokens=tokens))
        self._check_alive()
        return request.id

    def abort(self, request_id: int) -> None:
        """End a request now; unknown and finished ones are ignored.

        The next `poll` returns an update with finish reason "abort" for each branch that was open, without waiting: call it at
        once if you wait on `fileno()` otherwise.
        """
        request = self._requests.get(request_id)
        if request is None:
            return
        branches = list(request.branches.values())
        for branch in branches:
            self._updates.append(self._end(branch, request.update(branch=branch.index, text=branch.flush()), "abort"))
        self._abort_wires([branch.wire for branch in branches])

    def poll(self, timeout_s: float) -> list[Update]:
        """Everything that has arrived; waits up to `timeout_s` seconds for a first message if there is nothing.

        Raises:
            EngineFailed: the engine has failed, and every open request has had its last update.
        """
        if not self._updates:
            self._check_alive()
        timeout_s = 0.0 if self._updates else timeout_s
        while (message := self._receive(timeout_s)) is not None:
            self._take(message)
            timeout_s = 0.0
        updates, self._updates = self._updates, []
        return updates

    def fileno(self) -> int:
        """Readable when `poll(0)` may have something."""
        return self._channel.fileno()

    def stats(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """The engine's counters and gauges. Updates that arrive meanwhile are kept: the next `poll` returns them at once.

        Raises:
            TimeoutError: no answer within `timeout_s` seconds.
            EngineFailed: the engine has failed.
        """
        self._send(AskStats())
        self._num_asked += 1
        deadline = time.monotonic() + timeout_s
        while self._failure is None and len(self._stats) < self._num_asked:
            message = self._receive(max(0.0, deadline - time.monotonic()))
            if message is not None:
                self._take(message)
            elif self._failure is None:
                raise TimeoutError(f"the engine gave no statistics within {timeout_s:g} s")
        self._check_alive()
        # An answer that came too late for an earlier call is older than this call's.
        values = self._stats[-1]
        self._num_asked = 0
        self._stats.clear()
        return values

    def close(self) -> None:
        """Leave; the controller frees the open requests. Idempotent."""
        self._channel.close()

    def _meet(self, timeout_s: float) -> ModelInfo:
        self._send(Hello())
        message = self._receive(timeout_s)
        if isinstance(message, Welcome):
            return ModelInfo.from_dict(message.model_info)
        if isinstance(message, Failure):
            self._take(message)
        self._check_alive()
        raise EngineFailed(f"the controller did not greet within {timeout_s:g} s")

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

    def _take(self, message: Message) -> None:
        if isinstance(message, StepOutputs):
            self._take_outputs(message)
        elif isinstance(message, Rejection):
            if branch := self._wires.get(message.key):
                error = RequestError(message.code, message.message, message.retry_after_s)
                self._end_with_error(branch.request, error)
        elif isinstance(message, Stats):
            self._stats.append(message.values)
        elif isinstance(message, Failure):
            self._fail(message.rank, message.message)
        else:
            raise AssertionError(f"a controller never says {type(message).__name__}")

    def _take_outputs(self, message: StepOutputs) -> None:
        if len(message.prompt_key_I):
            self._take_prompt_logprobs(message)
        if len(message.routed_key_J):
            self._take_expert_load(message)
        stopped = []
        rows = zip(message.key_O.tolist(), message.token_O.tolist(), message.finish_O.tolist(), strict=True)
        for row, (wire, token, finish) in enumerate(rows):
            branch = self._wires.get(wire)
            if branch is None:
                continue
            update = self._advance(branch, token, finish, message, row)
            self._updates.append(update)
            if update.finish_reason is not None and not finish:
                stopped.append(wire)
        if stopped:
            self._abort_wires(stopped)

    def _advance(self, branch: Branch, token: int, finish: int, message: StepOutputs, row: int) -> Update:
        """One row of outputs; the branch ends if `finish` is set or a stop string is complete."""
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
            asked = finish == FinishReason.STOP and token in (request.params.stop_token_ids or ())
            return self._end(branch, update, _REASONS[FinishReason(finish)], token if asked else None)
        return update

    def _end(self, branch: Branch, update: Update, reason: str, stop_reason: str | int | None = None) -> Update:
        """Forget a branch; its last update."""
        request = branch.request
        del self._wires[branch.wire], request.branches[branch.wire]
        done = not request.branches
        if done:
            del self._requests[request.id]
        expert_load = None if branch.expert_load is None else branch.expert_load.tolist()
        return update._replace(finish_reason=reason, stop_reason=stop_reason, expert_load=expert_load, done=done)

    def _logprobs_of(self, message: StepOutputs, row: int, token: int) -> LogprobDict:
        top = slice(message.top_offsets_O1[row], message.top_offsets_O1[row + 1])
        own = (token, float(message.logprob_O[row]), int(message.token_rank_O[row]))
        return self._logprobs(*own, message.top_ids[top], message.top_logprobs[top])

    def _take_prompt_logprobs(self, message: StepOutputs) -> None:
        offsets = message.prompt_top_offsets_I1.tolist()
        values = zip(message.prompt_logprob_I.tolist(), message.prompt_token_rank_I.tolist(), strict=True)
        rows = zip(message.prompt_key_I.tolist(), message.prompt_position_I.tolist(), values, strict=True)
        for row, (wire, position, (logprob, rank)) in enumerate(rows):
            branch = self._wires.get(wire)
            # A preempted request computes its prompt again.
            if branch is None or branch.request.prompt_logprobs is None:
                continue
            top = slice(offsets[row], offsets[row + 1])
            token = branch.request.prompt[position]
            entry = self._logprobs(token, logprob, rank, message.prompt_top_ids[top], message.prompt_top_logprobs[top])
            branch.request.prompt_logprobs[position] = entry

    def _take_expert_load(self, message: StepOutputs) -> None:
        order_J = np.argsort(message.routed_key_J, kind="stable")
        wires, starts = np.unique(message.routed_key_J[order_J], return_index=True)
        for wire, rows in zip(wires.tolist(), np.split(order_J, starts[1:]), strict=True):
            branch = self._wires.get(wire)
            if branch is not None and branch.expert_load is not None:
                load = branch.expert_load.reshape(-1)
                np.add.at(load, message.routed_expert_J[rows], message.routed_tokens_J[rows])

    def _logprobs(self, token: int, logprob: float, rank: int, ids: np.ndarray, values: np.ndarray) -> LogprobDict:
        text_of = self.tokenizer.token_text if self.tokenizer else _no_text
        entries = {token: Logprob(logprob, rank, text_of(token))}
        for place, (top, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1):
            if top != token:
                entries[top] = Logprob(value, place, text_of(top))
        return entries

    def _end_with_error(self, request: OpenRequest, error: RequestError) -> None:
        wires = list(request.branches)
        for wire in wires:
            del self._wires[wire]
        del self._requests[request.id]
        self._updates.append(request.update(error=error, done=True))
        if len(wires) > 1:
            self._abort_wires(wires)

    def _abort_wires(self, wires: Sequence[int]) -> None:
        self._send(Abort(ids=np.array(wires, np.int64)))

    def _fail(self, rank: int, message: str) -> None:
        named = rank < 0 or f"rank {rank}" in message
        self._failure = EngineFailed(message if named else f"rank {rank}: {message}", rank)
        for request in list(self._requests.values()):
            self._end_with_error(request, RequestError("UNAVAILABLE", str(self._failure)))


def _no_text(token: int) -> None:
    return None
