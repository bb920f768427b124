"""The memory of a front: when cyclic garbage is collected, and when free memory goes back to the operating system.

What our own code makes is freed by its reference counts. gRPC leaves a small cycle for each call, which is found as soon as
younger objects are collected (grpcio 1.85).
"""

from __future__ import annotations

import gc
import sys
import time

import psutil

from expertwire.engine import process

_YOUNG = 20_000  # more objects, after which the youngest generation is collected
_ROUNDS = 2  # collections of it, after which the next one is collected too
_NEVER = 1 << 30
_FEW = 50_000  # blocks of memory that calls hold, in which the oldest generation is collected within some 20 ms
_MOST = 16_000_000  # blocks by which a front may grow that always has calls, which takes a second or two
_TRIMMED = 64 << 20  # bytes more than at the beginning, at which free memory is returned
_TRIM_S = 10.0  # seconds between two returns: gRPC frees what calls took somewhat later than they end


class Memory:
    """The memory of this process, which has just begun to serve.

    By default the youngest generation is collected whenever 700 more objects live, as in a step of many streams, and took 5 %
    of the time with 64 (perf). The oldest one has what all open calls hold, and a front that collects it says nothing meanwhile:
    one with 700 MiB was killed for it. So here that waits for a moment without calls, or one when they hold little; the return of
    memory, of which 100 MiB take about 20 ms, does too.
    """

    def __init__(self) -> None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(_YOUNG, _ROUNDS, _NEVER)
        self._num_frozen = self._num_left = sys.getallocatedblocks()
        self._process, self._trim_s = psutil.Process(), 0.0
        self._resident = self._process.memory_info().rss

    def tend(self, num_calls: int) -> None:
        """Collect and return what is free, if this is the moment; called a few times a second with the number of open calls."""
        num_blocks = sys.getallocatedblocks()
        is_short = num_calls == 0 or num_blocks < self._num_frozen + _FEW
        # Otherwise nothing has become old since the last time.
        if gc.get_count()[2] and (is_short or num_blocks > self._num_left + _MOST):
            gc.collect()
            self._num_left = sys.getallocatedblocks()
        now = time.monotonic()
        if is_short and now >= self._trim_s and self._process.memory_info().rss > self._resident + _TRIMMED:
            process.return_memory()
            self._trim_s = now + _TRIM_S
