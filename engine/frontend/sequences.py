"""The open requests of a frontend, by request and by sequence, and what the controller's outputs mean for them.

Shape letters as in `scheduler.outputs`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container

import numpy as np

from expertwire.engine.frontend import logprobs
from expertwire.engine.frontend.api import RequestError
from expertwire.engine.frontend.connection import Connection
from expertwire.engine.frontend.open_requests import Branch, OpenRequest
from expertwire.engine.frontend.token_columns import FIRST_ID, TokenColumns
from expertwire.engine.frontend.tokenizer import Tokenizer
from expertwire.engine.messages import Abort
from expertwire.scheduler.outputs import FinishReason, Rejection, StepOutputs

_ENTRIES_OF_ROW = 16  # log-probabilities that take as long to handle and to send as a token
_FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Sequences:
    """The requests that run, their branches, and those of them that have news for the reader.

    Args:
        connection: sends what ends here, and has the counts.
        tokenizer: None: there is no text.

    Attributes:
        requests: by their ids.
        columns: the tokens of the requests that want them so.
    """

    def __init__(self, connection: Connection, tokenizer: Tokenizer | None) -> None:
        self.requests: dict[int, OpenRequest] = {}
        self.columns = TokenColumns(None if tokenizer is None else tokenizer.reasoning_ids)
        self._connection, self._tokenizer = connection, tokenizer
        self._sequences: dict[int, Branch] = {}
        self._news: list[OpenRequest] = []

    @property
    def has_news(self) -> bool:
        """Return whether `take_news` returns something."""
        return bool(self._news)

    def add(self, branch: Branch) -> None:
        """Add a branch to its request, one of `requests`."""
        branch.request.running[branch.sequence_id] = self._sequences[branch.sequence_id] = branch

    def take_news(self) -> list[OpenRequest]:
        """Return the requests with news since the last call."""
        news, self._news = self._news, []
        for request in news:
            request.has_news = False
        return news

    def abort(self, request: OpenRequest, branches: Container[int] | None) -> bool:
        """End these branches of a request, or all; return whether there were any."""
        running = [branch for branch in request.running.values() if branches is None or branch.index in branches]
        for branch in running:
            branch.texts.append(branch.flush())
            self._end(branch, "abort")
        if running:
            self._abort([branch.sequence_id for branch in running])
        return bool(running)

    def reject(self, rejection: Rejection) -> None:
        """End a request that the scheduler rejects."""
        if branch := self._sequences.get(rejection.key):
            error = RequestError(rejection.code, rejection.message, rejection.retry_after_s)
            self._end_with_error(branch.request, error)

    def fail(self, error: RequestError) -> None:
        """End all requests."""
        for request in list(self.requests.values()):
            self._end_with_error(request, error)

    def begin_outputs(self, message: StepOutputs) -> StepOutputs | None:
        """Handle all but the rows for `handle_rows`, which it returns; None: there are none."""
        if len(message.prompt_key_I):
            logprobs.add_prompt_logprobs(message, self._sequences, self._tokenizer)
        if len(message.routed_keys):
            self._add_expert_load(message)
        if len(message.failed_keys):
            self._handle_failed(message)
        in_columns = message.key_O >= FIRST_ID
        if in_columns.all():
            self._add_columns(message, slice(None))
            return None
        if not in_columns.any():
            return message
        self._add_columns(message, np.flatnonzero(in_columns))
        return _with_rows(message, np.flatnonzero(~in_columns))

    def handle_rows(self, message: StepOutputs, start: int, end: int) -> None:
        """Add the tokens of some rows to their branches."""
        stopped: list[int] = []
        sampled: logprobs.SampledLogprobs | None = None
        columns = message.key_O, message.token_O, message.finish_O, message.logprob_O
        rows = zip(range(start, end), *(column[start:end].tolist() for column in columns), strict=True)
        for row, sequence_id, token, finish, logprob in rows:
            branch = self._sequences.get(sequence_id)
            if branch is None:
                self._connection.counts["tokens_late"] += 1
                continue
            branch.token_ids.append(token)
            branch.is_paused = finish == FinishReason.PAUSED
            finish = 0 if branch.is_paused else finish
            if text := branch.push(token, finish):
                branch.texts.append(text)
            if branch.logprobs is not None:
                sampled = sampled or logprobs.SampledLogprobs(message, start, end, self._tokenizer)
                branch.logprobs.append(sampled.of_row(row))
            elif branch.sampled_logprobs is not None:
                branch.sampled_logprobs.append(logprob)
            is_news = branch.watch is not None and branch.watch(logprob)
            if branch.index == 0 and not branch.has_begun:
                self._begin(branch, int(message.num_cached_O[row]))
            if branch.stop is not None and branch.stop.found is not None:
                self._end(branch, "stop", branch.stop.found)
                if not finish:
                    stopped.append(sequence_id)
            elif finish:
                self._finish(branch, finish, token)
            elif is_news or branch.is_paused or (size := len(branch.token_ids)) == 1 or size == branch.news_size:
                self._announce(branch, is_news=is_news or branch.is_paused)
        if stopped:
            self._abort(stopped)

    def _add_columns(self, message: StepOutputs, rows: np.ndarray | slice) -> None:
        """Give the tokens of these rows to their readers; only first and last ones are looked at one by one."""
        names = ("key_O", "token_O", "finish_O", "num_cached_O")
        sequence_ids, token_ids, finish_reasons, num_cached = (getattr(message, name)[rows] for name in names)
        is_first = self.columns.push(sequence_ids, token_ids, finish_reasons)
        for row in np.flatnonzero(is_first | (finish_reasons != FinishReason.NONE)).tolist():
            if (branch := self._sequences.get(int(sequence_ids[row]))) is not None:
                if branch.index == 0 and not branch.has_begun:
                    self._begin(branch, int(num_cached[row]))
                if finish := int(finish_reasons[row]):
                    self._finish(branch, finish, int(token_ids[row]))

    def _finish(self, branch: Branch, finish: int, token: int) -> None:
        """End a branch with its last token."""
        stop_ids = branch.request.params.stop_token_ids or ()
        is_stop_token = finish == FinishReason.STOP and token in stop_ids
        self._end(branch, _FINISH_REASONS[FinishReason(finish)], token if is_stop_token else None)

    def _begin(self, branch: Branch, num_cached: int) -> None:
        """Note what comes with the first token of a request's first branch."""
        request, branch.has_begun = branch.request, True
        request.began_s = time.monotonic()
        request.num_cached_tokens = num_cached
        branch.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None

    def _handle_failed(self, message: StepOutputs) -> None:
        failed = (message.failed_keys, message.failed_positions, message.failed_ranks)
        for sequence_id, position, rank in zip(*(column.tolist() for column in failed), strict=True):
            if branch := self._sequences.get(sequence_id):
                text = (
                    f"the logits for the token at position {position} are not finite (NaN or infinite), on rank {rank}"
                )
                self._end_with_error(branch.request, RequestError("INTERNAL", text))

    def _announce(self, branch: Branch, *, is_news: bool) -> None:
        """Note that a branch has output that nobody has taken, and that the request has news, if this or its amount is."""
        request = branch.request
        request.untaken.setdefault(branch.index, branch)
        if not request.has_news and (is_news or len(branch.token_ids) >= branch.news_size):
            request.has_news = True
            self._news.append(request)

    def _end(self, branch: Branch, reason: str, stop_reason: str | int | None = None) -> None:
        """Forget a branch, whose last output is announced."""
        branch.finish_reason, branch.stop_reason = reason, stop_reason
        request = branch.request
        self._forget(branch)
        if request.done:
            del self.requests[request.id]
        self._announce(branch, is_news=True)

    def _add_expert_load(self, message: StepOutputs) -> None:
        order = np.argsort(message.routed_keys, kind="stable")
        sequence_ids, starts = np.unique(message.routed_keys[order], return_index=True)
        for sequence_id, rows in zip(sequence_ids.tolist(), np.split(order, starts[1:]), strict=True):
            branch = self._sequences.get(sequence_id)
            if branch is not None and branch.expert_load is not None:
                load = branch.expert_load.reshape(-1)
                np.add.at(load, message.routed_experts[rows], message.routed_tokens[rows])

    def _end_with_error(self, request: OpenRequest, error: RequestError) -> None:
        sequence_ids = list(request.running)
        for branch in list(request.running.values()):
            self._forget(branch)
        del self.requests[request.id]
        request.error = error
        if not request.has_news:
            request.has_news = True
            self._news.append(request)
        if len(sequence_ids) > 1:
            self._abort(sequence_ids)

    def _forget(self, branch: Branch) -> None:
        del self._sequences[branch.sequence_id], branch.request.running[branch.sequence_id]
        if branch.sequence_id >= FIRST_ID:
            num_tokens, num_reasoning = self.columns.remove(branch.sequence_id)
            branch.request.num_column_tokens += num_tokens
            branch.request.num_column_reasoning += num_reasoning

    def _abort(self, sequence_ids: list[int]) -> None:
        self._connection.send(Abort(ids=np.array(sequence_ids, np.int64)))


def batch_end(message: StepOutputs, start: int, max_rows: int) -> tuple[int, int]:
    """Return the end of a batch of at most `max_rows` rows from `start`, and how many rows it counts as; at least one row."""
    weights = np.arange(len(message.key_O) + 1) + message.top_offsets_O1 // _ENTRIES_OF_ROW
    end = int(np.searchsorted(weights, weights[start] + max_rows, side="right")) - 1
    end = min(max(end, start + 1), len(message.key_O))
    return end, int(weights[end] - weights[start])


def _with_rows(message: StepOutputs, rows: np.ndarray) -> StepOutputs:
    """Return the outputs with these rows, ascending; no other row has log-probabilities."""
    names = ("key_O", "token_O", "finish_O", "num_cached_O", "logprob_O", "token_rank_O")
    columns = {name: getattr(message, name)[rows] for name in names}
    offsets = np.append(message.top_offsets_O1[:-1][rows], message.top_offsets_O1[-1])
    return dataclasses.replace(message, **columns, top_offsets_O1=offsets)
