"""What a front keeps of a request until its last update."""

from __future__ import annotations

from typing import Any

import numpy as np

from expertwire.engine.frontend.outputs import LogprobDict, Update
from expertwire.engine.frontend.stop_strings import StopStrings
from expertwire.engine.frontend.tokenizer import TextStream
from expertwire.scheduler.outputs import FinishReason
from expertwire.scheduler.sampling_params import SamplingParams


class OpenRequest:
    """A request whose last update has not been made."""

    def __init__(self, request_id: int, prompt: list[int], params: SamplingParams, seed: int) -> None:
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.num_cached_tokens = 0
        self.branches: dict[int, Branch] = {}  # open ones by wire
        self.prompt_logprobs: list[LogprobDict | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(prompt)

    def update(self, **news: Any) -> Update:
        """An `Update` of these fields, with what is known of the request."""
        return Update(self.id, seed=self.seed, num_cached_tokens=self.num_cached_tokens, **news)


class Branch:
    """One output of a request: its text so far."""

    __slots__ = ("expert_load", "index", "num_tokens", "request", "stop", "stream", "wire")

    def __init__(
        self, request: OpenRequest, wire: int, index: int, stream: TextStream | None, expert_load: np.ndarray | None
    ) -> None:
        self.request = request
        self.wire = wire
        self.index = index
        self.stream = stream
        self.stop = StopStrings(request.params.stop) if request.params.stop else None
        self.num_tokens = 0
        self.expert_load = expert_load  # i64 [layers, experts]; None: not asked for

    def push(self, token: int, finish: int) -> str:
        """The text that a token makes certain; the last one (`finish`) releases what was held back."""
        if self.stream is None:
            return ""
        text = ""
        if finish != FinishReason.STOP:
            self.num_tokens += 1
            text = self._look(self.stream.push(token))
        if finish and (self.stop is None or self.stop.found is None):
            text += self.flush()
        return text

    def flush(self) -> str:
        if self.stream is None:
            return ""
        text = self._look(self.stream.flush())
        return text + self.stop.flush() if self.stop is not None and self.stop.found is None else text

    def _look(self, text: str) -> str:
        # Stop strings count only in the text of tokens beyond min_tokens.
        if self.stop is None or self.num_tokens <= self.request.params.min_tokens:
            return text
        return self.stop.push(text)
