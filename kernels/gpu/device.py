"""The properties of a GPU that the kernels' wrappers need; read once, at start."""

from __future__ import annotations

from dataclasses import dataclass

import torch

REGISTERS_PER_SM = 65536
SUPPORTED = "9.x and 10.x, of data centres (Hopper, Blackwell)"


@dataclass(frozen=True)
class Device:
    """`arch`: compute capability, 90 for Hopper, 100 for Blackwell. `num_sms`: streaming multiprocessors."""

    arch: int
    num_sms: int

    @property
    def is_supported(self) -> bool:
        """Return whether the kernels fit.

        Their tiles take up to 192 KB of shared memory, and wgmma or tcgen05. Blackwell's workstation GPUs, 12.x, give a
        block 99 KB and have neither (CUDA C++ Programming Guide, technical specifications by compute capability).
        """
        return self.arch // 10 in (9, 10)

    @property
    def exchange_sms(self) -> int:
        """Return the multiprocessors that experts leave to a concurrent all-to-all.

        A few more than saturate NVLink, 10-12 on Hopper and 24 and more on Blackwell with twice the
        bandwidth.
        """
        return min(16 if self.arch < 100 else 24, self.num_sms // 4)


H200 = Device(arch=90, num_sms=132)
B200 = Device(arch=100, num_sms=148)


def describe(device: torch.device | str) -> Device:
    """Return the properties of a CUDA device; a CPU, where only the interpreter runs kernels, counts
    as a small Hopper.
    """
    if torch.device(device).type != "cuda":
        return Device(arch=90, num_sms=4)
    properties = torch.cuda.get_device_properties(device)
    return Device(arch=10 * properties.major + properties.minor, num_sms=properties.multi_processor_count)
