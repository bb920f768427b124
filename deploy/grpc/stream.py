"""Output stream of one request, to a client that may read more slowly than the engine writes."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from expertwire.deploy.grpc.messages import from_logprobs, from_update
from expertwire.deploy.proto import expertwire_v1_pb2 as pb
from expertwire.engine.frontend.api import RequestError, Update

# Sizes count tokens and entries of log-probabilities, about 25 bytes each. By default gRPC clients refuse messages of more than
# 4 MiB.
MESSAGE_SIZE = 16_384
UNREAD_SIZE = 262_144  # of one stream
_COUNTS = 16  # entries of an expert load per unit of size


class StreamFailed(Exception):
    """The stream ends with an error status, `error`."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message)
        self.error = error


@dataclass(slots=True)
class _Unread:
    chunk: pb.Chunk
    size: int


class OutputStream:
    """The outputs of one request that the client has not read.

    `add` never waits; `read` does. Outputs that the client has not read are joined into larger messages; the stream fails when
    more than `UNREAD_SIZE` are unread.

    Args:
        request_id: the client's id of the request.
        prompt_tokens: length of the prompt.
        opens_reasoning: whether the prompt ends with the start of reasoning.

    Attributes:
        done: whether the engine has sent its last update.
    """

    def __init__(self, request_id: str, prompt_tokens: int, *, opens_reasoning: bool = False) -> None:
        self.request_id = request_id
        self.done = False
        self._opens_reasoning = opens_reasoning
        self._usage = pb.Usage(prompt_tokens=prompt_tokens)
        self._error: RequestError | None = None
        self._unread_prompt: deque[pb.PositionLogprobs] = deque()
        self._unread: deque[_Unread] = deque()
        self._tails: dict[int, _Unread] = {}  # last unread chunk of each branch
        self._unread_size = 0
        self._begun = self._complete = False  # whether the first and the last message have been read
        self._news = asyncio.Event()

    def add(self, update: Update) -> None:
        """Add an update of the request."""
        if self.done:
            return
        self.done = update.done
        if update.error is not None:
            self._fail(update.error)
            return
        self._usage.seed = update.seed
        self._usage.cached_prompt_tokens = update.num_cached_tokens
        self._usage.completion_tokens += len(update.token_ids)
        self._unread_prompt.extend(from_logprobs(update.prompt_logprobs or ()))
        self._append(from_update(update))
        if self._unread_size > UNREAD_SIZE:
            self._unread.clear()
            self._tails.clear()
            self.fail("RESOURCE_EXHAUSTED", f"the client reads too slowly: more than {UNREAD_SIZE} outputs wait for it")
        self._news.set()

    def fail(self, code: str, message: str) -> None:
        """End with an error status after what is unread."""
        self._fail(RequestError(code, message))

    async def read(self) -> pb.GenerateResponse | None:
        """Return a message of unread outputs, up to about `MESSAGE_SIZE`; None after the last one.

        Raises:
            StreamFailed: the stream ends with an error.
        """
        while not (self._has_unread() or self.done):
            self._news.clear()
            await self._news.wait()
        if self._error is not None and not self._has_unread():
            raise StreamFailed(self._error)
        if self._complete:
            return None
        message = pb.GenerateResponse()
        if not self._begun:
            message.request_id, message.opens_reasoning = self.request_id, self._opens_reasoning
        self._begun = True
        self._take(message)
        if self.done and self._error is None and not self._has_unread():
            message.usage.CopyFrom(self._usage)
            self._complete = True
        return message

    def _fail(self, error: RequestError) -> None:
        self.done = True
        self._error = error
        self._news.set()

    def _has_unread(self) -> bool:
        return bool(self._unread or self._unread_prompt)

    def _take(self, message: pb.GenerateResponse) -> None:
        """Move unread outputs into `message`."""
        size = 0
        while self._unread_prompt and size < MESSAGE_SIZE:
            entry = self._unread_prompt.popleft()
            message.prompt_logprobs.append(entry)
            size += 1 + len(entry.tokens)
        while self._unread and size < MESSAGE_SIZE:
            unread = self._unread.popleft()
            if self._tails[unread.chunk.branch] is unread:
                del self._tails[unread.chunk.branch]
            message.chunks.append(unread.chunk)
            self._unread_size -= unread.size
            size += unread.size

    def _append(self, chunk: pb.Chunk) -> None:
        """Append `chunk`, merged into the last one of its branch if that is unread and small."""
        size = 1 + len(chunk.token_ids) + sum(len(entry.tokens) for entry in chunk.logprobs)
        size += sum(len(layer.tokens) for layer in chunk.expert_load) // _COUNTS
        self._unread_size += size
        last = self._tails.get(chunk.branch)
        if last is not None and last.size + size <= MESSAGE_SIZE:
            text = last.chunk.text + chunk.text
            last.chunk.MergeFrom(chunk)
            last.chunk.text = text
            last.size += size
        else:
            self._tails[chunk.branch] = _Unread(chunk, size)
            self._unread.append(self._tails[chunk.branch])
