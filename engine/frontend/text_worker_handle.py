"""A front's end of a worker process that tokenises (`text_worker`)."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Mapping

import numpy as np

from expertwire.comm.control.channel import ChannelClosed, SocketChannel
from expertwire.engine import process
from expertwire.engine.frontend import text_worker
from expertwire.engine.frontend.api import RequestError, RequestFailed
from expertwire.engine.frontend.text_worker import Arrays, WorkerArgs


class TextTask:
    """A task of one client for a worker.

    Attributes:
        num_bytes: size of its arrays.
        answer: the worker's answer; done without one if the client has gone.
    """

    def __init__(self, client: str, arrays: dict[str, np.ndarray]) -> None:
        self.client = client
        self.arrays = arrays
        self.num_bytes = sum(array.nbytes for array in arrays.values())
        self.answer: asyncio.Future[Arrays] = asyncio.get_running_loop().create_future()

    def fail(self, code: str, message: str) -> None:
        """End with an error, a gRPC code and its message."""
        if not self.answer.done():
            self.answer.set_exception(RequestFailed(RequestError(code, message)))


class WorkerHandle:
    """A worker process and the link to it, over which the event loop sends one task at a time.

    Args:
        args: arguments of the process, without the link.
        on_idle: called when the worker is ready, and with each task that it has done.
        on_end: called once if the worker ends, and not by `close`. Its last task is still `task`.

    Attributes:
        process: the process.
        is_ready: whether it has read its tokenizer.
        is_late: whether it was killed because of its task's time.
        task: the task that it works on, or None.
    """

    def __init__(
        self, args: WorkerArgs, on_idle: Callable[[TextTask | None], None], on_end: Callable[[WorkerHandle], None]
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            full = dataclasses.replace(args, link=theirs.fileno())
            target = f"{text_worker.__name__}:{text_worker.worker_main.__name__}"
            self.process = process.start_call(target, full, sockets=[theirs])
        self.is_ready = self.is_late = False
        self.task: TextTask | None = None
        self._on_idle, self._on_end = on_idle, on_end
        self._link = SocketChannel(ours, max_pending=None)
        self._descriptor = ours.fileno()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._use_link, self._receive)
        self._timer: asyncio.TimerHandle | None = None

    def start(self, task: TextTask, timeout_s: float) -> None:
        """Send a task; kill the worker if it has not answered after `timeout_s` seconds."""
        self.task = task
        self._timer = self._loop.call_later(timeout_s, self._kill_late)
        self._use_link(lambda: self._link.send(task.arrays))

    def close(self) -> None:
        """Kill the process, without waiting for its end."""
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._stop_timer()
        self._link.close()
        self.process.kill()

    def _use_link(self, action: Callable[[], object]) -> None:
        """Receive or send; let the loop send what the kernel has not taken."""
        try:
            action()
            if self._link.pending:
                self._loop.add_writer(self._descriptor, self._use_link, self._link.flush)
            else:
                self._loop.remove_writer(self._descriptor)
        except ChannelClosed:
            self.close()
            self._on_end(self)

    def _receive(self) -> None:
        while (answer := self._link.recv(0)) is not None:
            self._stop_timer()
            task, self.task, self.is_ready = self.task, None, True
            if task is not None:
                _finish(task, answer)
            self._on_idle(task)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _kill_late(self) -> None:
        self.is_late = True
        self.process.kill()


def _finish(task: TextTask, answer: Mapping[str, np.ndarray]) -> None:
    if "error" in answer:
        code, _, message = text_worker.to_text(answer["error"]).partition("\n")
        task.fail(code, message)
    elif not task.answer.done():
        task.answer.set_result(answer)
