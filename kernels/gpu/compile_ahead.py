"""Compilation of a program's launches before it makes them, in several processes, for a GPU that need not be here.

`recorded` runs the program without launching: Triton calls `knobs.runtime.jit_cache_hook` before it
compiles for a launch, and neither compiles nor launches if the hook returns true
(`JITFunction._do_compile` and `run` in triton/runtime/jit.py, 3.6.0 and 3.7.1). What the hook
receives (`specialization_data`) is what `JITFunction.preload` compiles, in any process. Results are
found by their key in Triton's cache on disk, which processes share: it has the source, the
specialised arguments, the options and the target (`get_cache_key` in triton/runtime/cache.py), not
the process. Files appear whole, by renaming (`FileCacheManager.put`).
"""

from __future__ import annotations

import hashlib
import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget


class _AbsentGpu:
    """A Triton driver without a device: enough to compile, nothing to launch with."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextmanager
def absent_gpu(arch: int) -> Iterator[None]:
    """Compile for a GPU of this architecture, which need not be here."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(_AbsentGpu(arch))
    try:
        yield
    finally:
        config._active = before


@dataclass(frozen=True)
class Launch:
    """A launch to compile: the kernel's module and name in it, and Triton's description of the specialisation."""

    module: str
    kernel: str
    specialization: str

    def belongs_to(self, share: int, num_shares: int) -> bool:
        """Return whether this launch is in a share, the same everywhere; equal launches are in the same one."""
        digest = hashlib.blake2b(f"{self.module}.{self.kernel} {self.specialization}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % num_shares == share


def is_needed() -> bool:
    """Return whether kernels are compiled at all, and not interpreted."""
    return not triton.knobs.runtime.interpret


def recorded(program: Callable[[], object], arch: int) -> list[Launch]:
    """Return the launches that a program makes, each once, in their order; nothing is launched or compiled.

    The program must not look at what kernels compute, so its tensors may be on "meta". Launches
    that this process has compiled for are not seen.
    """
    found: dict[Launch, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[Launch(fn.module, fn.name, compile["specialization_data"])] = None
        return True

    with absent_gpu(arch), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        program()
    return list(found)


def compile_all(launches: Sequence[Launch], arch: int, num_processes: int) -> None:
    """Compile launches in forked processes, into Triton's cache on disk.

    The calling process must have no other threads and no CUDA context, since it is forked.

    Raises:
        RuntimeError: a kernel does not compile; the message names it.
    """
    if not launches:
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(num_processes, len(launches)), mp_context=context) as pool:
        for _ in pool.map(partial(_compile, arch=arch), launches):
            pass


def _compile(launch: Launch, arch: int) -> None:
    kernel = reduce(getattr, launch.kernel.split("."), importlib.import_module(launch.module))
    try:
        with absent_gpu(arch):
            kernel.preload(launch.specialization)
            kernel.device_caches.clear()  # keyed by the device's number
    except Exception as error:  # noqa: BLE001 - Triton raises anything, and not everything can be pickled
        raise RuntimeError(f"{launch.module}.{launch.kernel} does not compile for sm_{arch}: {error}") from None


def share_of(launches: Iterable[Launch], share: int, num_shares: int) -> list[Launch]:
    """Return the launches that are in a share."""
    return [launch for launch in launches if launch.belongs_to(share, num_shares)]
