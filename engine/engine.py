"""A running engine: the processes of a controller and its ranks."""

from __future__ import annotations

import dataclasses
import json
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from expertwire.comm.control.channel import SocketChannel
from expertwire.engine import process
from expertwire.engine.config.engine_config import EngineConfig, ModelInfo
from expertwire.engine.config.generation_config import default_sampling_params
from expertwire.engine.config.thinking import ThinkingIds
from expertwire.engine.config.validation import validate
from expertwire.engine.frontend.api import EngineFailed
from expertwire.engine.frontend_hub import send_connection
from expertwire.engine.launcher import Launcher, RankFailed, WorkerSpec
from expertwire.engine.models.registry import read_model_config
from expertwire.engine.startup import ControllerArgs

_POLL_S = 0.1
_STOP_S = 5.0


class Engine:
    """Start the controller and the ranks, and wait until they can serve.

    Args:
        config: the engine's options.
        launcher: starts the ranks.
        end_of_turn_ids: tokens that end an output besides the checkpoint's end-of-sequence ids.
        thinking: the tokens of its reasoning; None if requests cannot control that.
        log_stats: whether the controller writes a line of statistics to standard error every 10 s.

    Attributes:
        info: the model and its limits.

    Raises:
        ValueError: the options do not fit the model or the machine.
        EngineFailed: a rank could not start; the message names it.
    """

    def __init__(
        self,
        config: EngineConfig,
        launcher: Launcher,
        end_of_turn_ids: Sequence[int] = (),
        thinking: ThinkingIds | None = None,
        *,
        log_stats: bool = False,
    ) -> None:
        model = read_model_config(config.model, config.dtype, config.kv_cache_dtype, config.snapshot_every)
        eos_token_ids = dict.fromkeys((*model.eos_token_ids, *end_of_turn_ids))
        model = dataclasses.replace(model, eos_token_ids=tuple(eos_token_ids))
        max_model_len = validate(config, model)
        token = secrets.token_hex(16)
        self._launcher = launcher
        self._status = _Status()
        args = ControllerArgs(
            config=config,
            model=model,
            max_model_len=max_model_len,
            default_sampling_params=default_sampling_params(config.model, config.generation_config),
            hub_address=launcher.hub_address(),
            token=token,
            thinking=thinking if thinking is not None and thinking.fits(model.vocab_size) else None,
            log_stats=log_stats,
        )
        self._to_controller, theirs = socket.socketpair()
        with theirs:
            self._controller = process.start_call(
                "expertwire.engine.controller:controller_main",
                args,
                theirs.fileno(),
                stdout=subprocess.PIPE,
                sockets=[theirs],
            )
        self._reader = threading.Thread(target=self._status.read, args=(self._controller.stdout,), daemon=True)
        self._reader.start()
        try:
            launcher.connect()
            listening = self._await("listening", config.start_timeout_s)
            spec = WorkerSpec(config=config, num_ranks=config.ep_size, address=listening["hub"], token=token)
            launcher.start(spec)
            self.info = ModelInfo.from_dict(self._await("ready", config.start_timeout_s))
        except RankFailed as error:
            self.close()
            raise EngineFailed(str(error), error.rank) from error
        except BaseException:
            self.close()
            raise
        # When a rank dies, the controller ends; then the other ranks must end too.
        threading.Thread(target=self._tear_down_after_failure, daemon=True).start()

    @property
    def failure(self) -> str | None:
        """The message with which the engine failed, or None."""
        return self._status.failure[1] if self._status.failure is not None else None

    def connect(self) -> SocketChannel:
        """Return a new channel for a `Frontend` of this process. Raise as `connect_socket`."""
        return SocketChannel(self.connect_socket())

    def connect_socket(self) -> socket.socket:
        """Return the frontend's end of a new connection to the controller, for instance for a child process.

        Raises:
            EngineFailed: the controller has ended.
        """
        try:
            return send_connection(self._to_controller)
        except OSError as error:
            raise EngineFailed(self.failure or "the controller has ended") from error

    def close(self) -> None:
        """End every process of the engine and wait for them. Idempotent."""
        self._status.closing = True
        process.stop_all([self._controller], _STOP_S, grace_s=0.0)
        self._to_controller.close()
        self._launcher.stop(_STOP_S)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _await(self, key: str, timeout_s: float) -> dict:
        deadline = time.monotonic() + timeout_s
        while not self._status.wait(key, _POLL_S):
            if self._status.failure is not None:
                rank, message = self._status.failure
                raise EngineFailed(message, rank)
            if key != "listening":
                self._launcher.poll()
            if time.monotonic() > deadline:
                raise EngineFailed(f"the engine was not {key} within start_timeout_s = {timeout_s:g} s", -1)
        return self._status.lines[key]

    def _tear_down_after_failure(self) -> None:
        self._reader.join()
        if not self._status.closing:
            self._launcher.stop(_STOP_S)


class _Status:
    """The status that the controller reports on its standard output."""

    def __init__(self) -> None:
        self.lines: dict[str, dict] = {}
        self.failure: tuple[int, str] | None = None
        self.closing = False
        self._news = threading.Condition()

    def read(self, stream: IO[bytes]) -> None:
        for line in stream:
            status = json.loads(line)
            with self._news:
                self.lines |= status
                if "failed" in status:
                    self.failure = (status["failed"]["rank"], status["failed"]["message"])
                self._news.notify_all()
        with self._news:
            if self.failure is None and not self.closing:
                self.failure = (-1, "the controller has died")
            self._news.notify_all()

    def wait(self, key: str, timeout_s: float) -> bool:
        with self._news:
            return (
                self._news.wait_for(lambda: key in self.lines or self.failure is not None, timeout_s)
                and key in self.lines
            )
