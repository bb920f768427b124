"""The frontend: it sends requests to the controller and turns the controller's outputs into text.

The offline API has a frontend in the caller's process, the gRPC server one in each of its processes. A frontend belongs to one
thread.

A request with `n` outputs (branches) is `n` sequences to the controller, each with an id. Output that nobody has taken waits in
the frontend, joined by branch. The engine samples at most a window of tokens ahead of what has been taken (`messages.Credit`), so
that a slow reader holds up its own request and nothing else.
Shape letters as in `scheduler.outputs`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Sequence
from typing import Any

import numpy as np

from expertwire.comm.control.channel import ControlChannel
from expertwire.engine.frontend.api import EngineFailed, RequestError, RequestOptions, Update
from expertwire.engine.frontend.connection import Connection
from expertwire.engine.frontend.open_requests import Branch, OpenRequest
from expertwire.engine.frontend.prompts import Prompt, encode_prompt
from expertwire.engine.frontend.sequences import Sequences, batch_end
from expertwire.engine.frontend.token_columns import FIRST_ID, ColumnReader, Credited, Tokens
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.engine.messages import (
    AbortByName,
    Credit,
    Message,
    Resume,
    Submit,
)
from expertwire.scheduler.outputs import Rejection, StepOutputs
from expertwire.scheduler.sampling_params import SamplingParams

_DEFAULT_OPTIONS = RequestOptions()
_NO_IDS = np.zeros(0, np.int32)
# Most tokens and log-probabilities of a branch that wait to be taken, and the fewest tokens.
WINDOW, _MIN_WINDOW = 4096, 16
_COLUMN_ROWS_OF_ROW = 8  # tokens in columns that take as long to handle as one by itself


class Frontend:
    """Requests and their updates over one channel to the controller.

    Args:
        channel: a connected channel, which `close` closes.
        tokenizer: None serves token ids only, without text.
        deterministic_seeds: whether the seeds of requests without one follow from the engine's seed, so that a program gives
            the same outputs every time, instead of from the operating system.
        watches: whether the controller shall send beats, so that `problem` notices a frozen engine.
        welcome_timeout_s: seconds within which the controller must answer.

    Attributes:
        model_info: the model and its limits.
        on_abort_by_name: called with a tenant and request ids for `abort_by_name` of any frontend.
        has_more: whether the last `receive` stopped at `max_rows`; then `fileno()` does not show what is left.
        counts: what is to be added to the engine's statistics, such as `tokens_late`: tokens that came for what had been aborted.

    Raises:
        EngineFailed: the controller does not answer, or the engine has failed.
    """

    def __init__(
        self,
        channel: ControlChannel,
        tokenizer: Tokenizer | None,
        *,
        deterministic_seeds: bool = False,
        watches: bool = False,
        welcome_timeout_s: float = 30.0,
    ) -> None:
        self.tokenizer = tokenizer
        self._connection = Connection(channel, watches=watches, welcome_timeout_s=welcome_timeout_s)
        self._connection.on_failure = self._end_all
        self.model_info, self.counts = self._connection.model_info, self._connection.counts
        self._sequences = Sequences(self._connection, tokenizer)
        self.has_more = False
        self._partial: tuple[StepOutputs, int] | None = None  # outputs of which only these first rows have been handled
        self.on_abort_by_name: Callable[[str, Sequence[str]], None] = lambda _tenant, _request_ids: None
        self._credits: list[Branch] = []
        self._next_request_id = 0
        self._next_sequence_id = 0
        self._seeds = random.Random(self.model_info.seed) if deterministic_seeds else random.SystemRandom()

    @property
    def num_open(self) -> int:
        """Number of requests that run."""
        return len(self._sequences.requests)

    @property
    def failure(self) -> EngineFailed | None:
        """The error with which the engine failed, or None."""
        return self._connection.failure

    @property
    def problem(self) -> str:
        """Why the engine cannot serve at the moment, or "". Only for a frontend that `watches`."""
        return self._connection.problem

    def encode(self, prompt: Prompt, params: SamplingParams) -> np.ndarray:
        """Check a prompt and its parameters; return the prompt's tokens for `submit`, i32 [length].

        Raises:
            ValueError: the engine cannot serve them; names the field and what is allowed.
        """
        return encode_prompt(prompt, params, self.model_info, self.tokenizer)

    def submit(
        self,
        tokens: np.ndarray,
        params: SamplingParams,
        options: RequestOptions = _DEFAULT_OPTIONS,
        *,
        detokenize: bool = True,
        window: int = WINDOW,
        allowance: int | None = None,
        is_quiet: bool = False,
        only_sampled: bool = False,
        columns: tuple[ColumnReader, int] | None = None,
        opens_reasoning: bool = False,
        first_branch: int = 0,
        num_prompt_tokens: int | None = None,
        parent: int | None = None,
        pause_token_ids: np.ndarray = _NO_IDS,
    ) -> int:
        """Request outputs for the tokens that `encode` returned for these parameters.

        Args:
            tokens: the prompt.
            params: sampling parameters.
            options: options for the scheduler.
            detokenize: whether updates have text; without it there can be no stop strings.
            window: tokens of a branch that wait to be taken, at most; fewer with log-probabilities.
            allowance: tokens that each branch may sample before `grant` allows more; None: any number.
            is_quiet: whether there is news only when a branch pauses or ends or its window is half full, and not every step.
            only_sampled: whether log-probabilities come as `Update.sampled_logprobs`, which costs an object a token less.
            columns: gets the tokens, for `take_columns`, under this key of its own; updates then have ends and errors only. All
                requests of a reader have text, or none has. Not for requests with stop strings or log-probabilities.
            opens_reasoning: whether the prompt ends with the start of reasoning, for columns.
            first_branch: index of the first branch, for a request that has more branches than these.
            num_prompt_tokens: how many of `tokens` are the prompt; the output begins with the others. None: all.
            parent, pause_token_ids: as for `messages.Submit`.

        Returns:
            The id of the request; `poll` returns its updates, or `receive` and `take` do.

        Raises:
            EngineFailed: the engine has failed.
        """
        self._connection.check_alive()
        seed = self.new_seed() if params.seed is None else params.seed
        request = OpenRequest(self._next_request_id, tokens, params, seed)
        self._next_request_id += 1
        self._sequences.requests[request.id] = request
        window = max(_MIN_WINDOW, min(window, WINDOW // (1 + (params.logprobs or 0))))
        window = window if allowance is None else min(window, allowance)
        num_prompt = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        most = params.most_output_tokens(num_prompt, self.model_info.max_model_len)
        credit = window if most > window else None
        allowance = None if allowance is None else allowance - window
        if columns is None:
            ids = list(range(self._next_sequence_id, self._next_sequence_id + params.n))
            self._next_sequence_id += params.n
        else:
            assert params.logprobs is None, "log-probabilities do not come in columns"
            assert not params.stop, "stop strings are not searched in columns"
            ids = [
                self._sequences.columns.add(*columns, branch, credit, allowance, opens_reasoning=opens_reasoning)
                for branch in range(params.n)
            ]
        shape = self.model_info.num_layers, self.model_info.num_experts
        for index, sequence_id in enumerate(ids):
            stream = None
            if detokenize and self.tokenizer is not None:
                stream = self.tokenizer.stream(params.skip_special_tokens)
            load = np.zeros(shape, np.int64) if params.expert_load else None
            place = sequence_id, first_branch + index
            branch = Branch(request, *place, stream, load, credit, is_quiet=is_quiet, only_sampled=only_sampled)
            branch.allowance = allowance
            if text := branch.begin_with(tokens[num_prompt:].tolist()):
                branch.texts.append(text)
            self._sequences.add(branch)
            if columns is not None and stream is not None:
                columns[0].push_text[sequence_id] = branch.push
        self._connection.send(
            Submit(
                sequence_ids=np.array(ids, np.int64),
                params=params.to_dict() | {"seed": seed, "stop": ()},  # stop strings are found here
                options=options.to_dict(),
                tokens=tokens,
                credit=credit,
                num_prompt_tokens=num_prompt_tokens,
                first_branch=first_branch,
                parent=parent,
                pause_token_ids=pause_token_ids,
            )
        )
        self._connection.check_alive()
        return request.id

    def new_seed(self) -> int:
        """Return a seed for a request without one."""
        return self._seeds.getrandbits(63)

    def grant(self, request_id: int, tokens: int) -> None:
        """Let each branch of a request, submitted with an `allowance`, sample more tokens; finished ones are ignored."""
        request = self._sequences.requests.get(request_id)
        for branch in [] if request is None else request.running.values():
            if branch.sequence_id >= FIRST_ID:
                self._send_credited(self._sequences.columns.grant(branch.sequence_id, tokens))
                continue
            assert branch.allowance is not None, f"request {request_id} has no allowance"
            branch.allowance += tokens
            if branch.window is not None and branch.num_uncredited >= branch.window // 2:
                self._credits.append(branch)
        if self._credits:
            self._send_credits()

    def abort(self, request_id: int, branches: Container[int] | None = None) -> bool:
        """End a request, or these branches of it; return whether it ran: unknown and finished ones are ignored.

        The next `poll` returns at once, with an update of finish reason "abort" for each unfinished branch. `fileno()` does
        not become readable, so callers that wait for it must call `poll` or `receive` themselves.
        """
        request = self._sequences.requests.get(request_id)
        return request is not None and self._sequences.abort(request, branches)

    def resume(self, request_id: int, branches: Container[int]) -> None:
        """Let paused branches of a request go on; others are ignored."""
        request = self._sequences.requests.get(request_id)
        running = [] if request is None else list(request.running.values())
        paused = [branch for branch in running if branch.is_paused and branch.index in branches]
        for branch in paused:
            branch.is_paused = False
        if paused:
            self._connection.send(Resume(ids=np.array([branch.sequence_id for branch in paused], np.int64)))

    def find(self, request_id: int) -> OpenRequest | None:
        """Return a request that runs, or None."""
        return self._sequences.requests.get(request_id)

    def poll(self, timeout_s: float) -> list[Update]:
        """Return the updates that have arrived; wait up to `timeout_s` seconds for a first message if there are none.

        Raises:
            EngineFailed: the engine has failed, and every open request has had its last update.
        """
        return [update for request in self.receive(timeout_s) for update in self.take(request)]

    def receive(self, timeout_s: float, max_rows: int | None = None) -> list[OpenRequest]:
        """Return the requests with news since the last call; if there are none, wait up to `timeout_s` seconds for a message.

        Args:
            timeout_s: seconds.
            max_rows: tokens to handle at most, about, of which one with log-probabilities counts as several; `has_more` says
                whether there were more.

        Raises:
            EngineFailed: the engine has failed, and the end of every open request has been returned.
        """
        if not self._sequences.has_news:
            self._connection.check_alive()
        timeout_s = 0.0 if self._sequences.has_news or self._partial else timeout_s
        num_rows = 0
        while max_rows is None or num_rows < max_rows:
            if self._partial is None:
                message = self._connection.receive(timeout_s)
                if message is None:
                    break
                timeout_s = 0.0
                if not isinstance(message, StepOutputs):
                    self._handle(message)
                    continue
                rest = self._sequences.begin_outputs(message)
                num_rest = 0 if rest is None else len(rest.key_O)
                num_rows += (len(message.key_O) - num_rest) // _COLUMN_ROWS_OF_ROW
                if rest is None:
                    continue
                self._partial = rest, 0
            message, start = self._partial
            end = len(message.key_O)
            if max_rows is not None:
                end, weight = batch_end(message, start, max_rows - num_rows)
                num_rows += weight
            self._partial = (message, end) if end < len(message.key_O) else None
            self._sequences.handle_rows(message, start, end)
        self.has_more = max_rows is not None and num_rows >= max_rows
        return self._sequences.take_news()

    def take(self, request: OpenRequest, max_size: int | None = None) -> list[Update]:
        """Return the output of a request that has not been taken, at most one update a branch; the engine may then continue.

        Args:
            request: the request.
            max_size: tokens and log-probabilities at most, about; the rest stays.
        """
        updates: list[Update] = []
        size = 0
        while request.untaken and (max_size is None or size < max_size):
            branch = request.untaken.pop(next(iter(request.untaken)))
            size += branch.size
            if branch.window is not None and branch.finish_reason is None:
                branch.num_uncredited += len(branch.token_ids)
                if branch.num_uncredited >= branch.window // 2:
                    self._credits.append(branch)
            updates.append(branch.take())
        if request.done and not request.untaken:
            if request.error is not None:
                updates.append(request.error_update())
            elif updates:
                updates[-1] = Update(*updates[-1][:-1], True)  # `_replace` takes ten times as long
        if self._credits:
            self._send_credits()
        return updates

    def take_columns(self, reader: ColumnReader, max_tokens: int) -> Tokens:
        """Return tokens that a reader has not taken, about `max_tokens` at most; the engine may then continue."""
        sequence_ids, tokens = reader.take(max_tokens)
        self._send_credited(self._sequences.columns.taken(sequence_ids, tokens.num_tokens))
        return tokens

    def remove_reader(self, reader: ColumnReader) -> None:
        """Forget a reader, whose requests have all been aborted or have ended."""
        self._sequences.columns.remove_reader(reader)

    def fileno(self) -> int:
        """Return a file descriptor that is readable when `poll(0)` may return updates."""
        return self._connection.fileno()

    @property
    def pending(self) -> int:
        """Bytes that wait to be sent; callers that wait for `fileno()` wait until it is writable as well, and call `flush`."""
        return self._connection.pending

    def flush(self) -> None:
        """Send what the kernel takes without waiting."""
        self._connection.flush()

    def request_stats(self, callback: Callable[[dict[str, Any] | None], None]) -> None:
        """Ask for the engine's counters and gauges. `poll` or `receive` call `callback` with them, or with None if it fails."""
        self._connection.request_stats(callback)

    def request_cache_flush(self, callback: Callable[[dict[str, int] | None], None]) -> None:
        """Empty the prefix cache of blocks that no request uses; `callback` gets their number by cache, as in `request_stats`."""
        self._connection.request_cache_flush(callback)

    def abort_by_name(self, tenant: str, request_ids: Sequence[str]) -> None:
        """Let every frontend of the engine, this one too, abort the requests of a tenant to which its user gave these ids."""
        self._connection.send(AbortByName(tenant=tenant, request_ids=list(request_ids)))

    def stats(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """Return the engine's counters and gauges. Output that arrives meanwhile is kept for the next `poll`.

        Raises:
            TimeoutError: no answer within `timeout_s` seconds.
            EngineFailed: the engine has failed.
        """
        assert self._partial is None, (
            "rows of a step are left: `stats` cannot be called between `receive` with max_rows"
        )
        answers: list[dict[str, Any] | None] = []
        self.request_stats(answers.append)
        deadline = time.monotonic() + timeout_s
        while not answers and self.failure is None:
            message = self._connection.receive(max(0.0, deadline - time.monotonic()))
            if message is not None:
                self._handle(message)
            elif self.failure is None:
                raise TimeoutError(f"the engine returned no statistics within {timeout_s:g} s")
        self._connection.check_alive()
        assert answers[0] is not None, "the engine has not failed"
        return answers[0]

    def close(self) -> None:
        """Close the channel; the controller then frees the open requests. Idempotent."""
        self._connection.close()

    def _handle(self, message: Message) -> None:
        if isinstance(message, StepOutputs):
            if (rest := self._sequences.begin_outputs(message)) is not None:
                self._sequences.handle_rows(rest, 0, len(rest.key_O))
        elif isinstance(message, Rejection):
            self._sequences.reject(message)
        elif isinstance(message, AbortByName):
            self.on_abort_by_name(message.tenant, message.request_ids)
        elif not self._connection.handle(message):
            raise AssertionError(f"unexpected message from the controller: {type(message).__name__}")

    def _end_all(self) -> None:
        self._sequences.fail(RequestError("UNAVAILABLE", str(self.failure)))

    def _send_credited(self, credited: Credited) -> None:
        if len(credited.tokens):
            self._connection.send(Credit(ids=credited.sequence_ids, tokens=credited.tokens))

    def _send_credits(self) -> None:
        branches, self._credits = self._credits, []
        ids, tokens = [branch.sequence_id for branch in branches], [branch.credit() for branch in branches]
        if any(tokens):
            self._connection.send(Credit(ids=np.array(ids, np.int64), tokens=np.array(tokens, np.int64)))
