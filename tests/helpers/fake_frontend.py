"""A frontend without an engine, for tests of the server and of benchmarks: it says what a test tells it to say."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

import numpy as np

from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.frontend.api import EngineFailed, RequestError, RequestOptions, Update
from expertwire.engine.frontend.output_formats import PLAIN
from expertwire.engine.frontend.prompts import encode_prompt
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.scheduler.sampling_params import SamplingParams

MODEL_INFO = ModelInfo(
    name="fake", path="/models/fake", architecture="Qwen3MoeForCausalLM", dtype="float32", kv_cache_dtype="float32",
    vocab_size=100, max_model_len=1000, eos_token_ids=(2, 3), num_layers=2, num_experts=8, top_k=2, ep_size=3, device="cpu",
    all_to_all="", block_size=16, cache_tokens=1008, cache_blocks={"full": 64}, cache_bytes={"full": 4096},
    max_num_seqs=8, max_queued_requests=64, max_queued_requests_per_tenant=64, seed=5,
)  # fmt: skip


class LetterTokenizer:
    """One token a character."""

    output_format = PLAIN
    thinking_ids = ThinkingIds(start=(1,), end=2, wait=3, spaces=(), sentence_ends=())

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % MODEL_INFO.vocab_size for letter in text]


@dataclass
class FakeRequest:
    """A request as the server sees it: updates that nobody has taken."""

    id: int
    running: int  # branches
    untaken: list[Update] = field(default_factory=list)
    is_new: bool = False  # whether `receive` has to return it

    @property
    def done(self) -> bool:
        return self.running == 0


class FakeFrontend:
    """Answers nothing by itself, except aborts; `push` and `fail` make updates arrive, with the descriptor ready."""

    def __init__(self) -> None:
        self.model_info = MODEL_INFO
        self.tokenizer: Tokenizer | None = None  # then text is one token a character, and there is no chat
        self.failure: EngineFailed | None = None
        self.problem = ""
        self.stats_values: dict | None = {}
        self.has_more = False
        self.pending = 0
        self.submitted: list[tuple[list[int], SamplingParams]] = []  # a request's id is its place
        self.options: list[RequestOptions] = []  # likewise
        self.aborted: list[int] = []
        self.aborted_by_name: list[tuple[str, list[str]]] = []
        self.on_abort_by_name = lambda tenant, request_ids: None
        self._requests: list[FakeRequest] = []  # by id
        self._ready, self._wake = os.pipe()
        os.set_blocking(self._ready, False)

    @property
    def num_open(self) -> int:
        return sum(not request.done for request in self._requests)

    def encode(self, prompt: str | list[int], params: SamplingParams) -> np.ndarray:
        return encode_prompt(prompt, params, self.model_info, self.tokenizer or LetterTokenizer())

    def submit(self, prompt: np.ndarray, params: SamplingParams, options: RequestOptions | None = None, **flow) -> int:
        if self.failure:
            raise self.failure
        self.submitted.append((list(prompt), params))
        self.options.append(options or RequestOptions())
        self._requests.append(FakeRequest(len(self._requests), params.n))
        return self._requests[-1].id

    def push(self, number: int, branch: int = 0, text: str = "", **fields) -> None:
        """An update; the token ids are those of `text` unless given, `done` follows from the finish reasons."""
        request = self._requests[number]
        if request.done:
            return
        fields.setdefault("token_ids", tuple(LetterTokenizer().encode(text)))
        if "error" in fields:
            request.running = 0
        elif fields.get("finish_reason"):
            request.running -= 1
        update = Update(number, branch, text=text, seed=77, done=request.done, **fields)
        same = [i for i, each in enumerate(request.untaken) if (each.branch, update.error) == (branch, None)]
        if same:
            request.untaken[same[0]] = _joined(request.untaken[same[0]], update)
        else:
            request.untaken.append(update)
        request.is_new = True
        os.write(self._wake, b"x")

    def fail(self, message: str, rank: int) -> None:
        for request in self._requests:
            self.push(request.id, error=RequestError("UNAVAILABLE", message))
        self.failure = EngineFailed(message, rank)
        os.write(self._wake, b"x")

    def abort(self, number: int) -> bool:
        request = self._requests[number]
        if request.done:
            return False
        self.aborted.append(number)
        for branch in range(request.running):
            self.push(number, branch, finish_reason="abort")
        return True

    def poll(self, timeout_s: float) -> list[Update]:
        return [update for request in self.receive(timeout_s) for update in self.take(request)]

    def receive(self, timeout_s: float, max_rows: int | None = None) -> list[FakeRequest]:
        news = [request for request in self._requests if request.is_new]
        if self.failure and not news:
            raise self.failure
        with contextlib.suppress(BlockingIOError):
            os.read(self._ready, 1 << 16)
        for request in news:
            request.is_new = False
        return news

    def take(self, request: FakeRequest, max_size: int | None = None) -> list[Update]:
        updates, request.untaken = request.untaken, []
        return updates

    def request_stats(self, callback) -> None:
        callback(self.stats_values)

    def request_cache_flush(self, callback) -> None:
        callback({"full": 7})

    def abort_by_name(self, tenant: str, request_ids) -> None:
        self.aborted_by_name.append((tenant, list(request_ids)))

    def fileno(self) -> int:
        return self._ready

    def flush(self) -> None:
        self.pending = 0


def _joined(earlier: Update, later: Update) -> Update:
    """The two updates of one branch as one."""
    return later._replace(
        token_ids=earlier.token_ids + later.token_ids,
        text=earlier.text + later.text,
        logprobs=later.logprobs if earlier.logprobs is None else earlier.logprobs + (later.logprobs or ()),
        prompt_logprobs=earlier.prompt_logprobs or later.prompt_logprobs,
    )
