"""Every Triton kernel on a GPU: against its reference, and with the same bits in any company.

The cases are those of `bench kernels`, which tests/bench runs on a CPU, interpreted, on toy sizes.
"""

import json

import pytest
import torch

pytest.importorskip("triton")

from expertwire.bench.kernels import run as kernels
from expertwire.bench.kernels import suites as kernels_suites
from expertwire.bench.kernels.measure import TensorRng, run_item
from expertwire.kernels.gpu.device import describe

pytestmark = pytest.mark.gpu

ITEMS = {
    f"{part} {item.key}": item for part in kernels.CHECKS for item in kernels_suites.items(part, quick=True, tiny=False)
}


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_kernel(name):
    result = run_item(ITEMS[name], TensorRng.of("cuda", describe("cuda"), torch.bfloat16, 0, name))
    torch.cuda.synchronize()
    # Other tiles may give other bits; where they do, the invariant mode does not use them.
    compared = result.get("findings") or result["classes"]
    wrong = {key: value for key, value in compared.items() if not _is_right(key, value, "classes" in result)}
    assert not wrong, json.dumps(wrong)


def _is_right(key, value, of_bits):
    if of_bits:
        return len(value) == 1 or key.startswith("tiles of")
    found, most = value
    return found is not None and found <= most
