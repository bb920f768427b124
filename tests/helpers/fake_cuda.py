"""Fake of `torch.cuda` where there is no GPU: the devices that a process sees, the current one, and the memory taken of
them. A rank may be a thread, with a current device of its own. Tensors lie on the CPU whatever device they name."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode


class FakeCuda:
    """Install with `FakeCuda(...).install(monkeypatch)`.

    Args:
        num_devices: that a process sees.
        total_bytes: memory of a device.
        used_bytes: that others than this process's torch have taken of each.
    """

    def __init__(self, num_devices: int = 1, total_bytes: int = 80 << 30, used_bytes: int = 0) -> None:
        self.num_devices, self.total_bytes, self.used_bytes = num_devices, total_bytes, used_bytes
        self._of_thread = threading.local()

    def install(self, monkeypatch) -> FakeCuda:
        for name in (
            "current_device", "set_device", "device_count", "is_available", "synchronize", "mem_get_info", "empty_cache",
            "reset_peak_memory_stats", "max_memory_allocated", "memory_allocated", "memory_reserved",
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)
        monkeypatch.setattr(torch.cuda, "Event", _Event)
        return self

    def is_available(self) -> bool:
        return self.num_devices > 0

    def device_count(self) -> int:
        return self.num_devices

    def current_device(self) -> int:
        return getattr(self._of_thread, "device", 0)

    def set_device(self, device) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        assert 0 <= index < self.num_devices, f"CUDA error: invalid device ordinal {index} of {self.num_devices}"
        self._of_thread.device = index

    def synchronize(self, device=None) -> None:
        return None

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return self.total_bytes - self.used_bytes - self.memory_reserved(device), self.total_bytes

    def empty_cache(self) -> None:
        return None

    def reset_peak_memory_stats(self, device=None) -> None:
        return None

    def memory_allocated(self, device=None) -> int:
        """Return the bytes held by this process's torch; tests replace this."""
        return 0

    def memory_reserved(self, device=None) -> int:
        return self.memory_allocated(device)

    def max_memory_allocated(self, device=None) -> int:
        return self.memory_allocated(device)

    def properties(self, device=None) -> SimpleNamespace:
        return SimpleNamespace(
            multi_processor_count=4, major=9, minor=0, uuid=f"0000-{device}", total_memory=self.total_bytes
        )


class _Event:
    """An event that needs no waiting, as all work is done at once."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._at = 0.0

    def record(self, stream=None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: _Event) -> float:
        return (later._at - self._at) * 1e3


class OnCpu(TorchFunctionMode):
    """Tensors that are asked for on a CUDA device are made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **kwargs or {})
        if function is torch.Tensor.pin_memory:
            return args[0]
        args = [_cpu(arg) for arg in args]
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return function(*args, **kwargs)


def _cpu(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    return value
