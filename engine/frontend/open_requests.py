"""State of a request between `Frontend.submit` and its last update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from expertwire.engine.frontend.api import LogprobDict, Update
from expertwire.engine.frontend.tokenizer import TextStream
from expertwire.scheduler.outputs import FinishReason
from expertwire.scheduler.sampling_params import SamplingParams


class StopStrings:
    """Search for stop strings in text that arrives in pieces.

    The first stop string to be completed is found, however the text is cut; of several completed by the same character it is
    the longest.

    Args:
        strings: the stop strings; at least one, none empty.

    Attributes:
        found: the stop string that was found, or None.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found: str | None = None
        self._strings = tuple(strings)
        self._initials = frozenset(string[0] for string in strings)
        self._longest = max(map(len, strings))
        self._held = ""

    def push(self, text: str) -> str:
        """Add text; return what certainly comes before any stop string. Not to be called once `found` is set."""
        held = self._held + text
        matches = [(at + len(string), at, string) for string in self._strings if (at := held.find(string)) >= 0]
        if matches:
            _, cut, self.found = min(matches)
            self._held = ""
            return held[:cut]
        cut = self._begin_of_match(held)
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """Return the text held back, as no more follows."""
        held, self._held = self._held, ""
        return held

    def _begin_of_match(self, text: str) -> int:
        """Return where the longest suffix of `text` begins that is a prefix of a stop string."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._initials and any(string.startswith(text[at:]) for string in self._strings):
                return at
        return len(text)


class OpenRequest:
    """A request whose last update has not been made; `branches` holds its unfinished outputs by sequence id."""

    def __init__(self, request_id: int, prompt: list[int], params: SamplingParams, seed: int) -> None:
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.seed = seed
        self.num_cached_tokens = 0
        self.branches: dict[int, Branch] = {}
        self.prompt_logprobs: list[LogprobDict | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(prompt)

    def update(self, **fields: Any) -> Update:
        """Return an `Update` of these fields and those of the request."""
        return Update(self.id, seed=self.seed, num_cached_tokens=self.num_cached_tokens, **fields)


class Branch:
    """One output of a request; `sequence_id` is its id in messages to the controller."""

    __slots__ = ("expert_load", "index", "num_tokens", "request", "sequence_id", "stop", "stream")

    def __init__(
        self,
        request: OpenRequest,
        sequence_id: int,
        index: int,
        stream: TextStream | None,
        expert_load: np.ndarray | None,
    ) -> None:
        self.request = request
        self.sequence_id = sequence_id
        self.index = index
        self.stream = stream
        self.stop = StopStrings(request.params.stop) if request.params.stop else None
        self.num_tokens = 0
        self.expert_load = expert_load  # i64 [layers, experts]; None if not requested

    def push(self, token: int, finish: int) -> str:
        """Add a token; return the new text that is final. The last token (`finish` is set) releases the text held back."""
        if self.stream is None:
            return ""
        text = ""
        if finish != FinishReason.STOP:
            self.num_tokens += 1
            text = self._before_stop(self.stream.push(token))
        if finish and (self.stop is None or self.stop.found is None):
            text += self.flush()
        return text

    def flush(self) -> str:
        """Return the text held back."""
        if self.stream is None:
            return ""
        text = self._before_stop(self.stream.flush())
        return text + self.stop.flush() if self.stop is not None and self.stop.found is None else text

    def _before_stop(self, text: str) -> str:
        # Stop strings count only in the text of tokens beyond min_tokens.
        if self.stop is None or self.num_tokens <= self.request.params.min_tokens:
            return text
        return self.stop.push(text)
