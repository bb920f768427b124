"""Stand-ins for the controller, for tests of its clients: one driven by hand, one that answers from a thread."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, field

import numpy as np

from expertwire.comm.control.channel import ChannelClosed, SocketChannel
from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.api import RequestOptions
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

INFO = ModelInfo(
    name="fake",
    path="/fake",
    architecture="FakeForCausalLM",
    dtype="float32",
    kv_cache_dtype="float32",
    vocab_size=400,
    max_model_len=64,
    eos_token_ids=(4,),
    num_layers=1,
    num_experts=4,
    top_k=2,
    ep_size=2,
    device="cpu",
    all_to_all="",
    block_size=16,
    cache_tokens=1584,
    cache_blocks={"full": 100},
    cache_bytes={"full": 6400},
    max_num_seqs=8,
    max_queued_requests=4096,
    max_queued_requests_per_tenant=4096,
    seed=7,
)


@dataclass
class Row:
    """One output: the token of a request, or its end."""

    id: int
    token: int
    finish: int = 0
    logprob: float = float("nan")
    rank: int = 0
    top: dict[int, float] = field(default_factory=dict)
    num_cached: int = 0


@dataclass
class PromptRow:
    """One log-probability of a prompt's token."""

    id: int
    position: int
    logprob: float
    rank: int
    top: dict[int, float] = field(default_factory=dict)


def outputs(
    rows: list[Row],
    prompt_rows: list[PromptRow] = (),
    routed: list[tuple[int, int, int]] = (),
    failed: list[tuple[int, int, int]] = (),
    step: int = 0,
) -> StepOutputs:
    """`routed`: of a request, that so many tokens went to an expert; `failed`: its position and rank."""

    def offsets(items: list) -> np.ndarray:
        return np.cumsum([0, *(len(item.top) for item in items)], dtype=np.int32)

    def flat(items: list, values: bool) -> list:
        return [entry for item in items for entry in (item.top.values() if values else item.top)]

    return StepOutputs(
        step=step,
        key_O=np.array([row.id for row in rows], np.int64),
        token_O=np.array([row.token for row in rows], np.int32),
        finish_O=np.array([row.finish for row in rows], np.uint8),
        num_cached_O=np.array([row.num_cached for row in rows], np.int32),
        logprob_O=np.array([row.logprob for row in rows], np.float32),
        token_rank_O=np.array([row.rank for row in rows], np.int32),
        top_offsets_O1=offsets(rows),
        top_ids=np.array(flat(rows, False), np.int32),
        top_logprobs=np.array(flat(rows, True), np.float32),
        prompt_key_I=np.array([row.id for row in prompt_rows], np.int64),
        prompt_position_I=np.array([row.position for row in prompt_rows], np.int32),
        prompt_logprob_I=np.array([row.logprob for row in prompt_rows], np.float32),
        prompt_token_rank_I=np.array([row.rank for row in prompt_rows], np.int32),
        prompt_top_offsets_I1=offsets(prompt_rows),
        prompt_top_ids=np.array(flat(prompt_rows, False), np.int32),
        prompt_top_logprobs=np.array(flat(prompt_rows, True), np.float32),
        routed_keys=np.array([wire for wire, _, _ in routed], np.int64),
        routed_experts=np.array([expert for _, expert, _ in routed], np.int32),
        routed_tokens=np.array([tokens for _, _, tokens in routed], np.int32),
        failed_keys=np.array([wire for wire, _, _ in failed], np.int64),
        failed_positions=np.array([position for _, position, _ in failed], np.int32),
        failed_ranks=np.array([rank for _, _, rank in failed], np.int32),
    )


def channel_pair() -> tuple[SocketChannel, SocketChannel]:
    ours, theirs = socket.socketpair()
    return SocketChannel(ours), SocketChannel(theirs)


class HandController:
    """The controller's end of a channel, driven by the test in the test's own thread."""

    def __init__(self, info: ModelInfo = INFO, greet: bool = True) -> None:
        self.frontend_channel, self.channel = channel_pair()
        if greet:
            self.send(Welcome(model_info=info.to_dict()))

    def send(self, message: Message) -> None:
        self.channel.send(encode(message))

    def say(self, *rows: Row, prompt_rows: list[PromptRow] = (), **more: list[tuple[int, int, int]]) -> None:
        self.send(outputs(list(rows), list(prompt_rows), **more))

    def heard(self) -> list[Message]:
        """Everything the frontend has said since the last call, without its `Hello`."""
        messages = []
        while (arrays := self.channel.recv(0.0)) is not None:
            messages.append(decode(arrays))
        return [message for message in messages if not isinstance(message, Hello)]

    def close(self) -> None:
        self.channel.close()
        self.frontend_channel.close()


@dataclass
class _Running:
    prompt: list[int]
    branch: int
    params: SamplingParams
    num_outputs: int = 0


class ThreadController:
    """Serves a model whose i-th token is a function of prompt, branch and i, one token a request and step.

    Branch 0 claims to have found half of its prompt in the prefix cache, every further one a token more.

    Args:
        info: what is served.
        max_queued_requests: requests that may wait; of `info.max_num_seqs` running ones.
        fail_after: a `Failure` of rank 1 comes after so many steps.
        reject: prompts that begin with this token are answered INVALID_ARGUMENT.
        all_top: as many log-probabilities come as were asked for, instead of one.
    """

    def __init__(
        self,
        info: ModelInfo = INFO,
        *,
        max_queued_requests: int = 10**6,
        fail_after: int = -1,
        reject: int = -1,
        all_top: bool = False,
    ) -> None:
        self.frontend_channel, self._channel = channel_pair()
        self.most_waiting = 0
        self.aborted: list[int] = []
        self.options: list[RequestOptions] = []  # of every request, in the order of submission
        self.paused = threading.Event()
        self._info = info
        self._max_queued_requests = max_queued_requests
        self._fail_after = fail_after
        self._reject = reject
        self._all_top = all_top
        self._waiting: dict[int, _Running] = {}
        self._running: dict[int, _Running] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._running)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(10)
        self._channel.close()

    def _serve(self) -> None:
        step = 0
        try:
            while not self._stopping.is_set():
                idle = not self.num_requests or self.paused.is_set()
                while (arrays := self._channel.recv(0.01 if idle else 0.0)) is not None:
                    self._hear(decode(arrays))
                    idle = False
                if self.num_requests and not self.paused.is_set():
                    step += 1
                    if step == self._fail_after:
                        self._send(Failure(rank=1, message="killed by signal 9"))
                    self._step(step)
        except ChannelClosed:
            return

    def _send(self, message: Message) -> None:
        self._channel.send(encode(message))

    def _hear(self, message: Message) -> None:
        if isinstance(message, Hello):
            self._send(Welcome(model_info=self._info.to_dict()))
        elif isinstance(message, StatsRequest):
            self._send(Stats(values={"num_requests": self.num_requests}))
        elif isinstance(message, Abort):
            for wire in message.ids.tolist():
                self.aborted.append(wire)
                self._waiting.pop(wire, None)
                self._running.pop(wire, None)
        elif isinstance(message, Submit):
            params = SamplingParams.from_dict(message.params)
            for branch, wire in enumerate(message.sequence_ids.tolist()):
                self.options.append(RequestOptions(**message.options))
                self._admit(wire, _Running(message.tokens.tolist(), branch, params))

    def _admit(self, wire: int, request: _Running) -> None:
        if request.prompt[0] == self._reject:
            self._send(Rejection(wire, "INVALID_ARGUMENT", "too many blocks"))
        elif len(self._waiting) >= self._max_queued_requests:
            self._send(Rejection(wire, "RESOURCE_EXHAUSTED", "queue full"))
        else:
            self._waiting[wire] = request
            self.most_waiting = max(self.most_waiting, len(self._waiting))

    def _more_top(self, count: int) -> dict[int, float]:
        return {token: -1.0 - token for token in range(300, 299 + count)} if self._all_top else {}

    def _step(self, step: int) -> None:
        while self._waiting and len(self._running) < self._info.max_num_seqs:
            wire = next(iter(self._waiting))
            self._running[wire] = self._waiting.pop(wire)
        rows, prompt_rows = [], []
        for wire, request in list(self._running.items()):
            params, first = request.params, request.num_outputs == 0
            if first and not request.branch and params.prompt_logprobs is not None:
                top = self._more_top(params.prompt_logprobs)
                prompt_rows += [PromptRow(wire, i, -float(i), 1, top) for i in range(1, len(request.prompt))]
            token = next_token(request.prompt, request.branch, request.num_outputs)
            request.num_outputs += 1
            most = params.most_output_tokens(len(request.prompt), self._info.max_model_len)
            finish = FinishReason.LENGTH if request.num_outputs == most else FinishReason.NONE
            top = {token: -0.5, **self._more_top(params.logprobs)} if params.logprobs else {}
            cached = len(request.prompt) // 2 + request.branch
            rows.append(Row(wire, token, finish, logprob=-0.5, rank=1, top=top, num_cached=cached))
            if finish:
                del self._running[wire]
        self._send(outputs(rows, prompt_rows, step=step))


def next_token(prompt: list[int], branch: int, position: int) -> int:
    """The token that `ThreadController` answers with."""
    return 5 + (sum(prompt) + 31 * branch + 7 * position) % 250
