"""What no interpreter shows of the combine: the machine adds and multiplies apart."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from expertwire.kernels.gpu import combine
from expertwire.kernels.gpu import compile as ahead_of_time


def test_products_and_sums_round_separately():
    case = next(case for case in combine.cases() if "K2 " in case.name)
    for arch in case.expect:
        compiled = ahead_of_time.compile_case(case, arch)
        assert not compiled.has("FFMA")
        assert compiled.has("FMUL")
        assert compiled.has("FADD")
