"""Output stream of one request with a strategy.

Unlike a plain request's, its output is in the `GroupRun` in any case, as the strategy looks at it. So a client that reads slowly
holds nothing up, and takes no more memory than one that reads fast.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from expertwire.deploy.grpc.group_results import finish_reason, write_branch, write_selection
from expertwire.deploy.grpc.messages import add_logprobs
from expertwire.deploy.grpc.started import OpenedGroup
from expertwire.deploy.grpc.stream import MESSAGE_SIZE
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import Position, RequestError, RequestFailed
from expertwire.engine.frontend.group_views import BranchRun

_MESSAGE_CHARS = 65_536  # of text in a message
_MESSAGE_BRANCHES = 512  # results of branches in a message, of up to about 2 kB each


class _Unread:
    """Place up to which a branch's output has been read."""

    def __init__(self, branch: BranchRun) -> None:
        self.branch = branch
        self.num_tokens = self.num_chars = 0
        self.is_closed = False

    @property
    def has_news(self) -> bool:
        if self.is_closed:
            return False
        branch = self.branch
        return branch.is_over or self.num_tokens < len(branch.token_ids) or self.num_chars < len(branch.text)


class GroupStream:
    """The outputs of one group for its client; a `Stream`.

    Args:
        opened: the request.
        turn: waits for the client's turn, before a message is made.
        all_branches: whether the output of every branch is sent as it comes, instead of that of the selected ones at the end.

    Attributes:
        error: the error that the stream ends with, or None.
        writing_since: when the write began that has not ended, by `time.monotonic`; None between writes.
    """

    def __init__(self, opened: OpenedGroup, turn: Callable[[], Awaitable[None]], *, all_branches: bool) -> None:
        self.error: RequestError | None = None
        self.writing_since: float | None = None
        self._opened, self._run, self._turn = opened, opened.run, turn
        self._all_branches = all_branches
        self._unread: list[_Unread] = []  # by branch
        self._prompt: deque[Position | None] | None = None  # unread log-probabilities; None before they have come
        self._num_results = 0  # branches whose results have been read
        self._begun = self._complete = False  # whether the first, and the last, message has been read
        self._waiter: asyncio.Future[None] | None = None  # of the reader that waits for news
        self._run.on_done = self._wake_reader
        self._run.on_news = self._wake_reader if all_branches else lambda: None

    def fail(self, code: str, message: str, *, drop: bool = False) -> None:
        """End with an error status, instead of what is unread."""
        if self.error is None:
            self.error = RequestError(code, message)
            self._wake_reader()

    def abort(self) -> bool:
        """End the group; return whether it ran."""
        if self._run.done:
            return False
        self._run.abort()
        self._wake_reader()
        return True

    async def read(self) -> pb.GenerateResponse | None:
        """Return a message of unread outputs, up to about `MESSAGE_SIZE`; None after the last one.

        Raises:
            RequestFailed: the stream ends with an error.
        """
        while not (self._has_output() or self._run.done or self.error is not None or self._complete):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._complete:
            return None
        await self._turn()
        if (error := self.error or self._run.error) is not None:
            raise RequestFailed(error)
        message = pb.GenerateResponse()
        if not self._begun:
            message.request_id, message.opens_reasoning = self._opened.key[1], self._opened.opens_reasoning
            self._begun = True
        if not self._take_prompt(message) or not self._take_outputs(message) or not self._run.done:
            return message
        self._take_result(message)
        return message

    def written(self) -> None:
        """Take note that a write has ended."""
        self.writing_since = None

    def writes(self) -> None:
        """Take note that a write begins."""
        self.writing_since = time.monotonic()

    def _wake_reader(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _has_output(self) -> bool:
        return any(unread.has_news for unread in self._shown())

    def _shown(self) -> Sequence[_Unread]:
        """Return the branches whose output the client gets as far as is known, in the order in which it gets it."""
        for branch in self._run.branches[len(self._unread) :]:
            self._unread.append(_Unread(branch))
        if self._all_branches:
            return self._unread
        selection = self._run.selection
        return [] if selection is None else [self._unread[index] for index in dict.fromkeys(selection.branches)]

    def _take_prompt(self, message: pb.GenerateResponse) -> bool:
        """Move unread log-probabilities of the prompt into `message`; return whether that is all of them."""
        if self._prompt is None:
            if self._run.prompt_logprobs is None:
                return True
            self._prompt = deque(self._run.prompt_logprobs)
        num_entries = 0
        while self._prompt and num_entries < MESSAGE_SIZE:
            entry = self._prompt.popleft()
            add_logprobs(message.prompt_logprobs, [entry])
            num_entries += 1 + len(entry or ())
        return not self._prompt

    def _take_outputs(self, message: pb.GenerateResponse) -> bool:
        """Move unread outputs into `message`; return whether that is all there are."""
        size = 0
        for unread in self._shown():
            while unread.has_news:
                if size >= MESSAGE_SIZE:
                    return False
                size += _write(message.chunks.add(), unread, MESSAGE_SIZE - size)
        return True

    def _take_result(self, message: pb.GenerateResponse) -> None:
        """Move results of branches into `message`, and with the last of them all else there is to say."""
        run, group = self._run, message.group
        rest = run.branches[self._num_results : self._num_results + _MESSAGE_BRANCHES]
        for branch in rest:
            write_branch(group.branches.add(), run, branch)
        self._num_results += len(rest)
        if self._num_results == len(run.branches):
            write_selection(group, run)
            message.usage.CopyFrom(self._opened.usage.message())
            self._complete = True


def _write(chunk: pb.Chunk, unread: _Unread, room: int) -> int:
    """Write output of a branch into an empty chunk, and return how much; its text comes no earlier than its tokens."""
    branch, begin = unread.branch, unread.num_tokens
    per_token = 1 + (len(branch.positions[-1]) if branch.positions else 0)
    tokens = branch.token_ids[begin : begin + max(1, room // per_token)]
    unread.num_tokens += len(tokens)
    has_all = unread.num_tokens == len(branch.token_ids)
    text = branch.text[unread.num_chars : unread.num_chars + (_MESSAGE_CHARS if has_all else len(tokens))]
    unread.num_chars += len(text)
    chunk.branch, chunk.text = branch.index, text
    chunk.token_ids.extend(tokens)
    if branch.positions:
        first = len(branch.token_ids) - len(branch.positions)  # tokens before it were forced
        known = branch.positions[max(0, begin - first) : max(0, unread.num_tokens - first)]
        add_logprobs(chunk.logprobs, [*[None] * (len(tokens) - len(known)), *known])
    if branch.is_over and has_all and unread.num_chars == len(branch.text):
        _close(chunk, branch)
        unread.is_closed = True
    return max(1, len(tokens) * per_token, len(text) * MESSAGE_SIZE // _MESSAGE_CHARS)


def _close(chunk: pb.Chunk, branch: BranchRun) -> None:
    """Write the end of a branch into its last chunk."""
    chunk.finish_reason = finish_reason(branch)
    load: Any = branch.expert_load or ()
    chunk.expert_load.extend(pb.ExpertLoad(tokens=tokens) for tokens in load)
    if isinstance(branch.stop_reason, str):
        chunk.stop_string = branch.stop_reason
    elif branch.stop_reason is not None:
        chunk.stop_token_id = branch.stop_reason
