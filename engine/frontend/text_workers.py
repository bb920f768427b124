"""Tokenising beside the event loop: worker processes for the texts and chats of a front's clients.

Every task has a time and a memory limit, which end the worker and not the front. A client occupies all workers but one at most,
and where tasks wait, clients take turns.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from expertwire.engine import process
from expertwire.engine.frontend import text_worker
from expertwire.engine.frontend.api import RequestError, RequestFailed
from expertwire.engine.frontend.chat import ChatText
from expertwire.engine.frontend.frontend import Frontend
from expertwire.engine.frontend.prompts import Prompt, check_params, check_tokens
from expertwire.engine.frontend.text_worker import Arrays, WorkerArgs
from expertwire.engine.frontend.text_worker_handle import TextTask, WorkerHandle
from expertwire.scheduler.sampling_params import SamplingParams

_RESTART_S = 1.0  # after a worker that could not start
_INLINE_CHARS = 4096  # texts up to this size are tokenised on the loop: about 1 ms
_INLINE_TOKENS = 1024  # the same for detokenising
_JSON_BYTES = 6  # most bytes of JSON for one of text


@dataclass(frozen=True, kw_only=True)
class TextLimits:
    """Limits of tokenising.

    Args:
        num_workers: worker processes of a front.
        timeout_s: seconds for one task.
        memory_bytes: memory of one task.
        waiting_bytes: bytes of all tasks that wait; of one client a quarter.
    """

    num_workers: int = 2
    timeout_s: float = 10.0
    memory_bytes: int = 2 << 30
    waiting_bytes: int = 64 << 20


class TextWorkers:
    """The worker processes of a front; made within its event loop.

    Args:
        frontend: knows the model; short texts are encoded by it, on the loop.
        folder: of the model's tokenizer; None makes no processes, for a model without one.
        limits: limits of tasks.

    Attributes:
        max_text_bytes: most bytes of a text: one with more cannot fit into the model's context. 0 without processes.
    """

    def __init__(self, frontend: Frontend, folder: str | None, limits: TextLimits | None = None) -> None:
        self._frontend = frontend
        self._limits = limits or TextLimits()
        self._waiting: dict[str, deque[TextTask]] = {}  # by client; who has waited longest for a turn comes first
        self._waiting_bytes: Counter[str] = Counter()
        self._running: Counter[str] = Counter()  # tasks in workers, by client
        self._workers: set[WorkerHandle] = set()
        self._burials: set[asyncio.Future[None]] = set()
        self._is_closed = False
        self._has_workers, self.max_text_bytes = False, 0
        if folder is not None and frontend.tokenizer is not None:
            self._has_workers = True
            self.max_text_bytes = frontend.model_info.max_model_len * frontend.tokenizer.max_token_bytes
            memory = self._limits.memory_bytes
            info, max_chars = frontend.model_info, self.max_text_bytes
            self._args = WorkerArgs(folder=folder, info=info, link=-1, memory_bytes=memory, max_chars=max_chars)
            for _ in range(self._limits.num_workers):
                self._start_worker()

    async def encode(self, prompt: Prompt, params: SamplingParams, *, client: str) -> np.ndarray:
        """Check a prompt and its parameters; return the prompt's tokens, i32, as `Frontend.encode` does.

        Args:
            prompt: text, token ids or a chat.
            params: the parameters, which are checked first.
            client: whom the task counts for.

        Raises:
            ValueError: the engine cannot serve them; names the field and what is allowed.
            RequestFailed: the prompt takes too long, too many wait, or the tokenizer failed.
        """
        info = self._frontend.model_info
        if not self._has_workers or not isinstance(prompt, (str, ChatText)):
            return self._frontend.encode(prompt, params)
        check_params(params, info, self._frontend.tokenizer)
        if isinstance(prompt, str):
            if len(prompt) <= _INLINE_CHARS:
                return self._frontend.encode(prompt, params)
            self._check_size("text", prompt, self.max_text_bytes)
        else:
            for name, value in prompt.fields.items():
                if isinstance(value, str):
                    self._check_size(name, value, self.max_text_bytes * _JSON_BYTES)
        tokens = (await self._run(text_worker.prompt_task(prompt), client))["tokens"]
        check_tokens(tokens, params, info)
        return tokens

    async def tokenize(self, text: str, *, client: str, add_special_tokens: bool = True) -> np.ndarray:
        """Return the tokens of a text, i32. Raise as `encode`."""
        tokenizer = self._frontend.tokenizer
        if tokenizer is None:
            raise ValueError("text needs a tokenizer, and the model has none")
        if not self._has_workers or len(text) <= _INLINE_CHARS:
            return np.array(tokenizer.encode(text, add_special_tokens), np.int32)
        self._check_size("text", text, self.max_text_bytes)
        return (await self._run(text_worker.tokenize_task(text, add_special_tokens), client))["tokens"]

    async def detokenize(self, tokens: np.ndarray, *, client: str, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens, i32. Raise as `encode`."""
        tokenizer, allowed = self._frontend.tokenizer, self._frontend.model_info.max_model_len
        if tokenizer is None:
            raise ValueError("token_ids cannot be decoded: the model has no tokenizer")
        if len(tokens) > allowed:
            raise ValueError(f"token_ids must have at most max_model_len = {allowed} entries, got {len(tokens)}")
        if not self._has_workers or len(tokens) <= _INLINE_TOKENS:
            return tokenizer.decode(tokens.tolist(), skip_special_tokens)
        answer = await self._run(text_worker.detokenize_task(tokens, skip_special_tokens), client)
        return text_worker.to_text(answer["text"])

    def close(self) -> None:
        """End the processes; what still waits is cancelled. Idempotent."""
        self._is_closed = True
        for worker in self._workers:
            worker.close()
            if worker.task is not None:
                worker.task.answer.cancel()
        process.stop_all([worker.process for worker in self._workers], 0.0, grace_s=0.0)
        self._workers.clear()
        for task in [task for tasks in self._waiting.values() for task in tasks]:
            task.answer.cancel()

    def _check_size(self, field: str, text: str, allowed: int) -> None:
        # A character has at most 4 bytes, so most texts need not be encoded to be measured.
        if len(text) * 4 > allowed and (size := len(text) if len(text) > allowed else len(text.encode())) > allowed:
            raise ValueError(
                f"{field} has {size} bytes or more; max_model_len {self._frontend.model_info.max_model_len} allows at most "
                f"{allowed} bytes"
            )

    async def _run(self, arrays: dict[str, np.ndarray], client: str) -> Arrays:
        task = TextTask(client, arrays)
        mine, waiting, most = self._waiting_bytes[client], self._waiting_bytes.total(), self._limits.waiting_bytes
        # One task is taken, however large.
        if (mine and mine + task.num_bytes > most // 4) or (waiting and waiting + task.num_bytes > most):
            message = f"{mine} bytes of this client wait to be tokenised, of {waiting} in all; at most {most // 4} of {most} may"
            raise RequestFailed(RequestError("RESOURCE_EXHAUSTED", message))
        self._waiting.setdefault(client, deque()).append(task)
        self._waiting_bytes[client] += task.num_bytes
        self._dispatch()
        return await task.answer

    def _dispatch(self) -> None:
        """Give tasks to idle workers."""
        for worker in list(self._workers):
            if worker.is_ready and worker.task is None and (task := self._next_task()) is not None:
                self._running[task.client] += 1
                worker.start(task, self._limits.timeout_s)

    def _next_task(self) -> TextTask | None:
        """Return the first task of the client whose turn it is, among those that may have another worker."""
        allowed = max(1, self._limits.num_workers - 1)
        for client in [client for client in self._waiting if self._running[client] < allowed]:
            tasks = self._waiting.pop(client)
            while tasks:
                task = tasks.popleft()
                self._waiting_bytes[client] -= task.num_bytes
                if task.answer.done():  # the client has gone
                    continue
                if tasks:
                    self._waiting[client] = tasks
                else:
                    del self._waiting_bytes[client]
                return task
            del self._waiting_bytes[client]
        return None

    def _start_worker(self) -> None:
        if not self._is_closed:
            self._workers.add(WorkerHandle(self._args, self._go_on, self._replace))

    def _go_on(self, done: TextTask | None) -> None:
        """Assign the next task: a worker has become ready, or has completed `done`."""
        if done is not None:
            self._release(done)
        self._dispatch()

    def _release(self, task: TextTask) -> None:
        self._running[task.client] -= 1
        if not self._running[task.client]:
            del self._running[task.client]

    def _replace(self, worker: WorkerHandle) -> None:
        """Start another worker for one that has ended, and end its task."""
        self._workers.discard(worker)
        burial = asyncio.ensure_future(self._bury(worker))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    async def _bury(self, worker: WorkerHandle) -> None:
        # In a thread, as the kernel may need a while to take back its memory.
        await asyncio.to_thread(process.stop_all, [worker.process], 0.0, grace_s=0.0)
        returncode = worker.process.returncode
        assert returncode is not None, "it has been waited for"
        if worker.task is not None:
            self._release(worker.task)
            worker.task.fail(*self._fault(returncode, is_late=worker.is_late))
        if worker.is_ready:
            self._start_worker()
        else:
            self._fail_waiting(f"the tokenizer's process could not start: it {process.describe_exit(returncode)}")
            asyncio.get_running_loop().call_later(_RESTART_S, self._start_worker)

    def _fault(self, returncode: int, *, is_late: bool) -> tuple[str, str]:
        """Return the error of a task whose worker has ended: code and message."""
        if is_late:
            limit = f"{self._limits.timeout_s:g} s"
            return "INVALID_ARGUMENT", f"prompt: to render and tokenise it must take at most {limit}"
        if returncode == -signal.SIGABRT:  # how the tokenizer ends when it gets no memory
            return "INVALID_ARGUMENT", text_worker.too_large(self._limits.memory_bytes)
        return "INTERNAL", f"the process that tokenised this prompt {process.describe_exit(returncode)}"

    def _fail_waiting(self, message: str) -> None:
        for task in [task for tasks in self._waiting.values() for task in tasks]:
            task.fail("UNAVAILABLE", message)
        self._waiting.clear()
        self._waiting_bytes.clear()
