"""Compile cases: every launch that the GPU kernels' wrappers can make, at the shapes of real models."""

from __future__ import annotations

from expertwire.bench.kernels.compile_cases import (
    all_to_all,
    attention,
    gated_delta_rule,
    grouped_gemm,
    layer_ops,
    linear,
    mamba2,
    mla,
    sampling,
    selective_scan,
    sparse_attention,
)
from expertwire.bench.kernels.compile_check import Case

_FAMILIES = (
    all_to_all,
    attention,
    gated_delta_rule,
    grouped_gemm,
    layer_ops,
    linear,
    mamba2,
    mla,
    sampling,
    selective_scan,
    sparse_attention,
)


def every_case() -> list[Case]:
    """Return the compile cases of all kernels."""
    return [case for family in _FAMILIES for case in family.cases()]
