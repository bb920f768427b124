"""Strict fakes of what a CUDA device asks of the host: pinned memory that a copy reads later, events, and captures."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class FakeEvent:
    """Knows which copies were asked for before it was recorded; `synchronize` lets the device make them."""

    memory: FakePinnedMemory
    recorded: int = 0

    def record(self):
        self.recorded = self.memory.asked

    def synchronize(self):
        self.memory.made = max(self.memory.made, self.recorded)


@dataclass
class FakePinnedMemory:
    """As `staging.HostMemory`. An allocation while steps run is an error, and so is writing where a copy has still to read.

    The device makes no copy before it is waited for: `asked` counts those that were asked for and `made` those that it made.
    """

    frozen: bool = False
    asked: int = 0
    made: int = 0
    allocated: list[torch.Tensor] = field(default_factory=list)

    def allocate(self, num_bytes):
        assert not self.frozen, f"{num_bytes} bytes of pinned memory are allocated while steps run"
        self.allocated.append(torch.empty(num_bytes, dtype=torch.uint8))
        return self.allocated[-1]

    def event(self):
        return FakeEvent(self)
