"""The gated norms' kernel in the interpreter against the reference."""

import pytest
import torch

from expertwire.kernels.gpu import gated_rms_norm as gpu
from expertwire.kernels.ops import gated_rms_norm

SHAPES = [(0, 64, 64), (1, 64, 32), (3, 99, 33), (2, 2560, 128), (2, 3000, 3000)]  # tokens, width, group
EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_values(dtype, shape, gate_first):
    tokens, width, group = shape
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(tokens, 2 * width + 3, generator=generator).to(dtype)
    x, z, weight = wide[:, :width], wide[:, width + 3 :], torch.randn(width, generator=generator).to(dtype)
    x[:1] *= 1e-3
    rest = weight, EPS, group, gate_first
    torch.testing.assert_close(gpu.gated_rms_norm(x, z, *rest), gated_rms_norm.reference(x, z, *rest))


def test_a_weight_of_one_group_is_refused():
    with pytest.raises(AssertionError, match="weights for 64"):
        gpu.gated_rms_norm(torch.zeros(2, 64), torch.zeros(2, 64), torch.ones(32), EPS, 32, True)
