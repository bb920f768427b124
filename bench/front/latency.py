"""The time that a front adds to a token, beside a link to the controller that does nothing but take down the time."""

from __future__ import annotations

import bisect
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Self

import numpy as np

from expertwire.comm.control.channel import ChannelClosed
from expertwire.engine import messages
from expertwire.engine.engine import Engine
from expertwire.engine.frontend.api import RequestOptions
from expertwire.scheduler.outputs import StepOutputs
from expertwire.scheduler.sampling_params import SamplingParams

_PROMPT = np.arange(10, 26, dtype=np.int32)
_SKEW_S = 0.5e-3  # how much earlier than over the bare link tokens may come in the median: both share the cores


class Steps:
    """A request of its own, over a link to the controller without a front.

    Attributes:
        times_s: when its token of each step came, by `time.monotonic`.
    """

    def __init__(self, engine: Engine) -> None:
        self.times_s: list[float] = []
        self._channel = engine.connect()
        params = SamplingParams(seed=1, max_tokens=engine.info.max_model_len - len(_PROMPT), ignore_eos=True)
        submit = messages.Submit(
            sequence_ids=np.zeros(1, np.int64),
            params=params.to_dict(),
            options=RequestOptions().to_dict(),
            tokens=_PROMPT,
        )
        for message in (messages.Hello(), submit):
            self._channel.send(messages.encode(message))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()
        self._channel.close()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                if (arrays := self._channel.recv(0.5)) is not None:
                    now = time.monotonic()
                    if isinstance(messages.decode(arrays), StepOutputs):
                        self.times_s.append(now)
        except ChannelClosed:
            pass


def added_ms(arrivals_s: Sequence[float], steps_s: Sequence[float]) -> list[float]:
    """Return by how much each token came later than the outputs of its step.

    Both streams have a token of every step, but their first steps are not known: it is taken to be the one with the shortest
    times whose median is not negative. Single ones may be: the thread that reads the bare link has to wait for a core as well.
    """
    last = min(bisect.bisect(steps_s, arrivals_s[0] + _SKEW_S), len(steps_s)) - 1
    for first in range(last, -1, -1):
        pairs = list(zip(arrivals_s, steps_s[first:], strict=False))
        found = [arrival - step for arrival, step in pairs]
        if statistics.median(found) > -_SKEW_S:
            return [1e3 * each for each in found]
    raise ValueError(
        f"tokens came before their steps: {arrivals_s[0]:.4f} is before the first step, {steps_s[0]:.4f}, or steps are missing "
        f"(median distance of steps {statistics.median(np.diff(steps_s)):.4f} s)"
    )
