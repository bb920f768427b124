"""A frontend without an engine, for tests of the server: says what a test tells it to say."""

from __future__ import annotations

import contextlib
import os

import numpy as np

from expertwire.engine.config.engine_config import ModelInfo
from expertwire.engine.frontend.api import EngineFailed, RequestError, RequestOptions, Update
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

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % MODEL_INFO.vocab_size for letter in text]


class FakeFrontend:
    """Answers nothing by itself, except aborts; `push` and `fail` make updates arrive, with the descriptor ready."""

    def __init__(self) -> None:
        self.model_info = MODEL_INFO
        self.tokenizer: Tokenizer | None = None  # then text is one token a character, and there is no chat
        self.failure: EngineFailed | None = None
        self.submitted: list[tuple[list[int], SamplingParams]] = []  # a request's id is its place
        self.options: list[RequestOptions] = []  # likewise
        self.aborted: list[int] = []
        self._open: dict[int, int] = {}  # running branches by id
        self._updates: list[Update] = []
        self._ready, self._wake = os.pipe()
        os.set_blocking(self._ready, False)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def encode(self, prompt: str | list[int], params: SamplingParams) -> np.ndarray:
        return encode_prompt(prompt, params, self.model_info, self.tokenizer or LetterTokenizer())

    def submit(self, prompt: np.ndarray, params: SamplingParams, options: RequestOptions | None = None) -> int:
        if self.failure:
            raise self.failure
        self.submitted.append((list(prompt), params))
        self.options.append(options or RequestOptions())
        number = len(self.submitted) - 1
        self._open[number] = params.n
        return number

    def push(self, number: int, branch: int = 0, text: str = "", **fields) -> None:
        """An update; the token ids are those of `text` unless given, `done` follows from the finish reasons."""
        if number not in self._open:
            return
        fields.setdefault("token_ids", tuple(LetterTokenizer().encode(text)))
        if fields.get("finish_reason"):
            self._open[number] -= 1
        done = self._open[number] == 0 or "error" in fields
        if done:
            del self._open[number]
        self._updates.append(Update(number, branch, text=text, seed=77, done=done, **fields))
        os.write(self._wake, b"x")

    def fail(self, message: str, rank: int) -> None:
        for number in list(self._open):
            self.push(number, error=RequestError("UNAVAILABLE", message))
        self.failure = EngineFailed(message, rank)
        os.write(self._wake, b"x")

    def abort(self, number: int) -> None:
        if number in self._open:
            self.aborted.append(number)
            for branch in range(self._open[number]):
                self.push(number, branch, finish_reason="abort")

    def poll(self, timeout_s: float) -> list[Update]:
        if self.failure and not self._updates:
            raise self.failure
        with contextlib.suppress(BlockingIOError):
            os.read(self._ready, 1 << 16)
        updates, self._updates = self._updates, []
        return updates

    def fileno(self) -> int:
        return self._ready
