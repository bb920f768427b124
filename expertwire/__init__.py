"""Expertwire: a serving engine for Mixture-of-Experts language models on NVLink clusters.

It exports `LLM`, `CascadeLLM`, `SamplingParams`, `TenantQuota` and the version; modules that are slow to import are imported on
first use.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "CascadeLLM", "RequestOutput", "SamplingParams", "TenantQuota", "__version__"]

if TYPE_CHECKING:
    from expertwire.cascade import CascadeLLM
    from expertwire.llm import LLM, RequestOutput
    from expertwire.scheduler.quotas import TenantQuota
    from expertwire.scheduler.sampling_params import SamplingParams

# With a checkout's root on sys.path, its folders would shadow other packages of the same names (`kernels`, `comm`).
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").exists():
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]


def __getattr__(name: str) -> object:
    if name in ("LLM", "RequestOutput"):
        from expertwire import llm

        return getattr(llm, name)
    if name == "CascadeLLM":
        from expertwire.cascade import CascadeLLM

        return CascadeLLM
    if name == "SamplingParams":
        from expertwire.scheduler.sampling_params import SamplingParams

        return SamplingParams
    if name == "TenantQuota":
        from expertwire.scheduler.quotas import TenantQuota

        return TenantQuota
    raise AttributeError(f"module 'expertwire' has no attribute {name!r}")
