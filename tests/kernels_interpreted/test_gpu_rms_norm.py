"""The norm, with and without the residual addition, against its references."""

import pytest
import torch

from expertwire.kernels.gpu import rms_norm as gpu
from expertwire.kernels.ops import rms_norm

SHAPES = [(0, 64), (1, 1), (3, 128), (2, 1000), (5, 2880)]
EPS = 1e-6


def inputs(tokens, width, dtype):
    generator = torch.Generator().manual_seed(width)
    x, delta = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    if tokens > 1:
        x[0] = delta[0] = 0.0
        x[1] *= 1e-3
    return x, delta, (1 + torch.randn(width, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norm_and_sum(dtype, tokens, width):
    x, delta, weight = inputs(tokens, width, dtype)
    torch.testing.assert_close(gpu.rms_norm(x, weight, EPS), rms_norm.reference(x, weight, EPS))
    done, expected = gpu.add_rms_norm(x, delta, weight, EPS), rms_norm.add_reference(x, delta, weight, EPS)
    assert torch.equal(done[0], expected[0])
    torch.testing.assert_close(done[1], expected[1])


def test_the_norm_is_that_of_the_rounded_sum():
    """Then nearly all bits equal the reference's, not only the values."""
    x, delta, weight = inputs(5, 2880, torch.float16)
    y, expected = gpu.add_rms_norm(x, delta, weight, EPS)[1], rms_norm.add_reference(x, delta, weight, EPS)[1]
    assert (y != expected).float().mean() < 0.01


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(AssertionError, match="weights for 64"):
        gpu.rms_norm(torch.zeros(2, 64), torch.ones(63), EPS)
