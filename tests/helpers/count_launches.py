"""Counts what a GPU would be given: interpreted kernels, and operations of torch that read or write memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

_ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias"}


class _Operations(TorchDispatchMode):
    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self._counts, self._paused = counts, False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if not (self._paused or operation.is_view or name in _ALLOCATIONS):
            self._counts[name] += 1
        return operation(*args, **kwargs or {})

    def launch(self, run, kernel, *args, **kwargs):
        """A kernel: what the interpreter does is not counted."""
        self._counts[kernel.fn.__name__] += 1
        self._paused = True
        try:
            return run(kernel, *args, **kwargs)
        finally:
            self._paused = False


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Yield the counter of launches by name, filled while the block runs."""
    counts: Counter[str] = Counter()
    operations, run = _Operations(counts), InterpretedFunction.run
    launch = lambda kernel, *args, **kwargs: operations.launch(run, kernel, *args, **kwargs)  # noqa: E731
    with mock.patch.object(InterpretedFunction, "run", launch), operations:
        yield counts
