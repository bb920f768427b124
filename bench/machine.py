"""A description of the machine that the benches ran on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Return the CPU's name, as far as the system knows it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
