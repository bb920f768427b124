"""Expertwire: a serving engine for Mixture-of-Experts language models on NVLink clusters.

It exports `LLM`, `CascadeLLM`, `SamplingParams`, `TenantQuota` and the version; modules that are slow to import are imported on
first use.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "CascadeLLM", "RequestOutput", "SamplingParams", "TenantQuota", "__version__"]

if TYPE_CHECKING:
    from expertwire.cascade import CascadeLLM
    from expertwire.llm import LLM
    from expertwire.outputs import RequestOutput
    from expertwire.scheduler.quotas import TenantQuota
    from expertwire.scheduler.sampling_params import SamplingParams

# With a checkout's root on sys.path, its folders would shadow other packages of the same names (`kernels`, `comm`).
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").exists():
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]


# Imported on first use.
_MODULES = {
    "LLM": "expertwire.llm",
    "CascadeLLM": "expertwire.cascade",
    "RequestOutput": "expertwire.outputs",
    "SamplingParams": "expertwire.scheduler.sampling_params",
    "TenantQuota": "expertwire.scheduler.quotas",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'expertwire' has no attribute {name!r}")
