"""Time that a device takes for a step: marks between pieces of its work."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Timeline(Protocol):
    """The order of a device's work."""

    def mark(self) -> Any:
        """Return a mark behind all work that the device was given so far."""
        ...

    def is_reached(self, mark: Any) -> bool:
        """Return whether the device has done what lies before the mark."""
        ...

    def wait_us(self, start: Any, end: Any) -> int:
        """Wait for `end` and return the time between two marks, in us."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        ...


class HostTimeline:
    """For work that the host computes: it is done once the host is there."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_reached(self, mark: float) -> bool:
        return True

    def wait_us(self, start: float, end: float) -> int:
        return int((end - start) * 1e6)

    def synchronize(self) -> None:
        return None


class CudaTimeline:
    """Events of the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def wait_us(self, start: torch.cuda.Event, end: torch.cuda.Event) -> int:
        end.synchronize()
        return int(start.elapsed_time(end) * 1e3)

    def synchronize(self) -> None:
        torch.cuda.synchronize()
