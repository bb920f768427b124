"""The product with a gate's sigmoid against its reference."""

import pytest
import torch

from expertwire.kernels.gpu.sigmoid_mul import sigmoid_mul
from expertwire.kernels.ops.sigmoid_mul import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 1, 100), (2, 5, 64)], ids=str)
@pytest.mark.parametrize("one_gate", [True, False])
def test_reference(dtype, shape, one_gate):
    generator = torch.Generator().manual_seed(0)
    x, whole = (torch.randn(*shape[:2], size * shape[2], generator=generator).to(dtype) for size in (1, 3))
    gate = whole[..., 2:3] if one_gate else whole[..., shape[2] : 2 * shape[2]]
    torch.testing.assert_close(sigmoid_mul(x, gate), reference(x, gate))


def test_gates_of_another_shape_are_refused():
    with pytest.raises(AssertionError):
        sigmoid_mul(torch.zeros(2, 3, 8), torch.zeros(2, 3, 4))
