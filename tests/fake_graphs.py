"""What stands for CUDA graphs where there is no GPU: operations and interpreted kernels are written down and done again, on the
same memory and without the code that asked for them. As on a GPU, a host that asks for a number meanwhile is an error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from expertwire.engine.device_graphs import Captured

_ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class _Tape(TorchDispatchMode):
    """Writes down what happens within. Its own tensors are kept, so that none takes another's place."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Callable[[], None]] = []
        self._paused = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in _ASKING or self._paused, f"the host asks for a number: {operation}"
        kwargs = kwargs or {}
        out = operation(*args, **kwargs)
        if not self._paused:
            self.work.append(partial(_again, operation, args, kwargs, out))
        return out

    def launch(self, run, kernel, *args, **kwargs):
        """A kernel: what the interpreter does is not written down."""
        self._paused = True
        run(kernel, *args, **kwargs)
        self._paused = False
        self.work.append(partial(run, kernel, *args, **kwargs))


def _again(operation, args, kwargs, out):
    for kept, found in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs)), strict=True):
        if (
            isinstance(kept, torch.Tensor) and kept.data_ptr() != found.data_ptr()
        ):  # neither a view nor written in place
            kept.copy_(found)


class FakeCapture:
    """As `device_graphs.cuda()` gives one. `replays` counts all."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        tape, run = _Tape(), InterpretedFunction.run
        launch = lambda kernel, *args, **kwargs: tape.launch(run, kernel, *args, **kwargs)  # noqa: E731
        with mock.patch.object(InterpretedFunction, "run", launch), tape:
            out = work()
        return Captured(partial(self._replay, tape.work), out)

    def _replay(self, work):
        self.replays += 1
        for again in work:
            again()
