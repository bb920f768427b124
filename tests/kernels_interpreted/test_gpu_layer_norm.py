"""Layer normalisation, with and without the residual addition, against its references."""

import pytest
import torch

from expertwire.kernels.gpu import layer_norm as gpu
from expertwire.kernels.ops import layer_norm

SHAPES = [(0, 64), (1, 1), (3, 128), (2, 1000), (5, 2560)]
EPS = 1e-5


def inputs(tokens, width, dtype):
    generator = torch.Generator().manual_seed(width)
    x, delta = (torch.randn(tokens, width, generator=generator).add(3).to(dtype) for _ in range(2))
    if tokens > 1:
        x[0] = delta[0] = 0.0
        x[1] *= 1e-3
    weight, bias = (torch.randn(width, generator=generator).to(dtype) for _ in range(2))
    return x, delta, weight, bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_norm_and_sum(dtype, tokens, width):
    x, delta, weight, bias = inputs(tokens, width, dtype)
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    expected = layer_norm.reference(x, weight, bias, EPS)
    torch.testing.assert_close(gpu.layer_norm(x, weight, bias, EPS), expected, **tolerance)
    done = gpu.add_layer_norm(x, delta, weight, bias, EPS)
    expected = layer_norm.add_reference(x, delta, weight, bias, EPS)
    assert torch.equal(done[0], expected[0])
    torch.testing.assert_close(done[1], expected[1], **tolerance)


def test_the_norm_is_that_of_the_rounded_sum():
    """Then nearly all bits equal the reference's, not only the values."""
    x, delta, weight, bias = inputs(5, 2560, torch.float16)
    y = gpu.add_layer_norm(x, delta, weight, bias, EPS)[1]
    assert (y != layer_norm.add_reference(x, delta, weight, bias, EPS)[1]).float().mean() < 0.01


@pytest.mark.parametrize("name", ["weights", "biases"])
def test_vectors_of_another_width_are_refused(name):
    weight, bias = (torch.ones(63 if name == which else 64) for which in ("weights", "biases"))
    with pytest.raises(AssertionError, match=f"{name} for 64"):
        gpu.layer_norm(torch.zeros(2, 64), weight, bias, EPS)
