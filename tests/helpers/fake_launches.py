"""Fake of a GPU where only launches are looked at: tensors on torch's "meta" device, which have shapes and no numbers, or
on the CPU, where new memory is zeros; and Triton's kernels, specialised as a launch would do it and neither compiled nor run.

As on a GPU, a variant of a kernel that no launch has had before would be compiled now: its key is that of Triton's own cache,
made by Triton's own binder (`JITFunction.run` of triton/runtime/jit.py, 3.6 and 3.7: `binder(...)`, then `compute_cache_key`). A
host that asks for a number of a meta tensor fails, as in a graph's capture.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from expertwire.kernels.gpu.compile_ahead import absent_gpu

# Torch's operations that launch nothing, beside those that return views.
ALLOCATIONS = {"empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like"}


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    variant: str  # another one is another compilation; "" for torch's own


class FakeLaunches(TorchDispatchMode):
    """`launches` in their order, those of Triton's kernels and of torch's operations, named "torch.add". `compiled`: kernels and
    variants that have ever been launched."""

    def __init__(self, arch: int = 90) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.compiled: set[tuple[JITFunction, str]] = set()
        self._driver = absent_gpu(arch)
        self._patch = mock.patch.object(JITFunction, "run", self._run_of())
        self._seen: set[JITFunction] = set()

    def _run_of(self) -> Any:
        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self.launches.append(Launch(kernel.__name__, tuple(grid), self.variant(kernel, *args, **options)))
            self.compiled.add((kernel, self.launches[-1].variant))

        return run

    def variant(self, kernel: JITFunction, *args: Any, **options: Any) -> str:
        """Return the key of a launch's variant; another key is another compilation."""
        if kernel not in self._seen:
            kernel.device_caches.clear()  # keyed by the device's number, whatever it is
            self._seen.add(kernel)
        *_, binder = kernel.device_caches[0]
        _, specialization, options = binder(*args, **options)
        return str((specialization, options))

    def __enter__(self) -> FakeLaunches:
        self._driver.__enter__()
        self._patch.__enter__()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._patch.__exit__(kind, error, traceback)
        self._driver.__exit__(kind, error, traceback)
        for kernel in self._seen:
            kernel.device_caches.clear()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = operation.overloadpacket.__name__, operation(*args, **(kwargs or {}))
        if name in ALLOCATIONS:
            return out.zero_()
        # Some convert, or return what they were given.
        if out is not args[0] if name == "to" else not operation.is_view:
            self.launches.append(Launch(f"torch.{name}", (), ""))
        return out

    def take(self) -> list[Launch]:
        """The launches since the last call."""
        taken, self.launches = self.launches, []
        return taken


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.removesuffix("_kernel").removeprefix("_") for launch in launches]


def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")
