"""State of a request between `Frontend.submit` and the end of its output, with the output that nobody has taken yet."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from expertwire.engine.frontend.api import Position, RequestError, Update
from expertwire.engine.frontend.stop_strings import StopAutomaton, StopStrings
from expertwire.engine.frontend.tokenizer import TextStream
from expertwire.scheduler.outputs import FinishReason
from expertwire.scheduler.sampling_params import SamplingParams

_COUNTS = 16  # entries of an expert load that take as many bytes as a token


class OpenRequest:
    """A request.

    Attributes:
        id: the frontend's id of the request.
        running: unfinished branches by sequence id.
        error: the error that ended the request, or None.
        untaken: branches with output that nobody has taken, by index, in the order in which it came.
        has_news: whether the request is in the frontend's list of requests with news.
        began_s: when the first token of the first branch came, by `time.monotonic`; None before.
        num_column_tokens, num_column_reasoning: tokens that its finished branches have had in columns, and those of reasoning.
    """

    def __init__(self, request_id: int, prompt: np.ndarray, params: SamplingParams, seed: int) -> None:
        self.id = request_id
        self.prompt = prompt
        self.params = params
        self.stop_automaton = StopAutomaton(params.stop) if params.stop else None
        self.seed = seed
        self.num_cached_tokens = 0
        self.running: dict[int, Branch] = {}
        self.prompt_logprobs: list[Position | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(prompt)
        self.error: RequestError | None = None
        self.untaken: dict[int, Branch] = {}
        self.has_news = False
        self.began_s: float | None = None
        self.num_column_tokens = self.num_column_reasoning = 0

    @property
    def done(self) -> bool:
        """Return whether no more output will come."""
        return not self.running

    def error_update(self) -> Update:
        """Return the last update of a request that has ended with an error."""
        return Update(self.id, seed=self.seed, num_cached_tokens=self.num_cached_tokens, error=self.error, done=True)


class Branch:
    """One output of a request; `sequence_id` is its id in messages to the controller.

    Attributes:
        window: tokens that may be sampled and not taken; None if all that it can sample fit.
        news_size: tokens that nobody has taken, from which on they are news.
        watch: returns whether a token with this log-probability is news; None: that does not matter.
        allowance: tokens that the reader allows beyond those credited; None: any number.
        num_uncredited: tokens taken that no `Credit` has replaced.
        is_paused: whether its last token is one after which it is paused.
        token_ids, texts, logprobs, sampled_logprobs, prompt_logprobs: output that nobody has taken; None: not requested.
        finish_reason, stop_reason: set when the branch has ended.
        expert_load: i64 [layers, experts]; None if not requested.
    """

    __slots__ = (
        "allowance", "expert_load", "finish_reason", "has_begun", "index", "is_paused", "logprobs", "news_size",
        "num_tokens", "num_uncredited", "prompt_logprobs", "request", "sampled_logprobs", "sequence_id", "stop",
        "stop_reason", "stream", "texts", "token_ids", "watch", "window",
    )  # fmt: skip

    def __init__(
        self,
        request: OpenRequest,
        sequence_id: int,
        index: int,
        stream: TextStream | None,
        expert_load: np.ndarray | None,
        window: int | None,
        *,
        is_quiet: bool = False,
        only_sampled: bool = False,
    ) -> None:
        self.request = request
        self.sequence_id = sequence_id
        self.index = index
        self.stream = stream
        self.stop = None if request.stop_automaton is None else StopStrings(request.stop_automaton)
        self.has_begun = False  # whether the first token has come
        self.num_tokens = 0  # with stop strings
        self.window = window
        self.news_size = 1 if not is_quiet else sys.maxsize if window is None else window // 2
        self.watch: Callable[[float], bool] | None = None
        self.allowance: int | None = None
        self.num_uncredited = 0
        self.is_paused = False
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        has_logprobs = request.params.logprobs is not None
        self.logprobs: list[Position] | None = [] if has_logprobs and not only_sampled else None
        self.sampled_logprobs: list[float] | None = [] if has_logprobs and only_sampled else None
        self.prompt_logprobs: list[Position | None] | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.expert_load = expert_load

    @property
    def size(self) -> int:
        """Tokens and log-probabilities that `take` would return, and what an expert load counts as."""
        size = len(self.token_ids) * (1 + (self.request.params.logprobs or 0))
        if self.finish_reason is not None and self.expert_load is not None:
            size += self.expert_load.size // _COUNTS
        return size

    def begin_with(self, token_ids: Sequence[int]) -> str:
        """Take in the tokens that the output begins with, and return their text. Stop strings in it do not count."""
        if self.stream is None:
            return ""
        text = "".join(map(self.stream.push, token_ids))
        self.num_tokens = len(token_ids)
        return text

    def push(self, token: int, finish: int) -> str:
        """Add a token; return the new text that is final. The last token (`finish` is set) releases the text held back."""
        if self.stream is None:
            return ""
        if not finish and self.stop is None:  # as for nearly every token
            return self.stream.push(token)
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

    def credit(self) -> int:
        """Return how many more tokens may be sampled; they are credited now."""
        tokens = self.num_uncredited
        if self.allowance is not None:
            tokens = min(tokens, self.allowance)
            self.allowance -= tokens
        self.num_uncredited -= tokens
        return tokens

    def take(self) -> Update:
        """Return the output that nobody has taken."""
        # By position: there is an update for each token, and keywords would cost a third of the time that it takes here.
        update = Update(
            self.request.id,
            self.index,
            tuple(self.token_ids),
            "".join(self.texts),
            None if self.logprobs is None else tuple(self.logprobs),
            tuple(self.sampled_logprobs or ()),
            self.prompt_logprobs,
            None if self.expert_load is None or self.finish_reason is None else self.expert_load.tolist(),
            self.finish_reason,
            self.stop_reason,
            self.request.seed,
            self.request.num_cached_tokens,
            self.is_paused,
        )
        self.token_ids.clear()
        self.texts.clear()
        if self.logprobs:
            self.logprobs.clear()
        if self.sampled_logprobs:
            self.sampled_logprobs.clear()
        self.prompt_logprobs = None
        return update

    def _before_stop(self, text: str) -> str:
        # Stop strings count only in the text of tokens beyond min_tokens.
        if self.stop is None or self.num_tokens <= self.request.params.min_tokens:
            return text
        return self.stop.push(text)
