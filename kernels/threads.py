"""The number of the processor's threads that torch uses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_FEW = 1 << 18  # numbers whose softmax takes about 0.1 ms on one thread


@contextlib.contextmanager
def as_many_as_worth(x: Tensor) -> Iterator[None]:
    """Let torch use one thread for operations on few numbers in a CPU's memory, else all.

    Its softmax divides even two short rows among all threads and waits for them: a few us become 0.5 ms or more where another
    process has the other core, and then the thread spins on that core. Results are the same.
    """
    if not x.is_cpu or x.numel() > _FEW:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
