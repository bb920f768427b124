"""Machine code of combine: products and sums are separate instructions, which no interpreter shows."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from expertwire.bench.kernels.compile_cases.layer_ops import combine_cases
from expertwire.bench.kernels.compile_check import compile_case


def test_products_and_sums_round_separately():
    case = next(case for case in combine_cases() if "K2 " in case.name)
    for arch in case.expect:
        compiled = compile_case(case, arch)
        assert not compiled.has("FFMA")
        assert compiled.has("FMUL")
        assert compiled.has("FADD")
