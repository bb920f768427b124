"""The weighted sum of expert rows is a matter of bits: products and sums round separately, in top-k order."""

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import combine

COMBINES = {"spec": combine.reference, "cpu": registry.choose("cpu").combine, "torch": registry.plain().combine}


def formula(rows, weights):
    """In numpy, which never contracts a product and a sum into one rounding."""
    rows, weights = rows.float().numpy(), weights.numpy()
    total = np.zeros(rows.shape[::2], np.float32)
    for k in range(rows.shape[1]):
        total = total + rows[:, k] * weights[:, k, None]
    return torch.from_numpy(total)


@pytest.mark.parametrize("combined", COMBINES.values(), ids=COMBINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (1, 1, 64), (33, 8, 37), (200, 4, 16), (3, 2, 1)], ids=str)
def test_bit_for_bit(combined, dtype, shape):
    generator = torch.Generator().manual_seed(9)
    rows, weights = torch.randn(shape, generator=generator).to(dtype), torch.rand(shape[:2], generator=generator)
    y = combined(rows, weights)
    assert y.dtype == dtype
    assert torch.equal(y, formula(rows, weights).to(dtype))


@pytest.mark.parametrize("combined", COMBINES.values(), ids=COMBINES)
def test_the_order_is_that_of_k(combined):
    # 1e8 + 1 - 1e8 is 0 in fp32, 1e8 - 1e8 + 1 is 1.
    rows = torch.tensor([[[1e8], [1.0], [-1e8]], [[1e8], [-1e8], [1.0]]])
    assert combined(rows, torch.ones(2, 3)).flatten().tolist() == [0.0, 1.0]
