"""RMS norm, alone and after the residual sum: every implementation against the mathematics."""

import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import rms_norm

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
SHAPES = [(0, 64), (1, 64), (5, 33), (300, 8), (2, 1)]
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6}}


def inputs(shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    x, delta = (scale * torch.randn(shape, generator=generator) for _ in range(2))
    return x.to(dtype), delta.to(dtype), (1 + torch.randn(shape[1], generator=generator)).to(dtype)


def formula(x, weight, eps):
    """In fp64, without rounding on the way."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norm(ops, dtype, shape, scale):
    x, delta, weight = inputs(shape, dtype, scale)
    y = ops.rms_norm(x, weight, 1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), formula(x, weight, 1e-6), **TOLERANCE[dtype])
    total, y = ops.add_rms_norm(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    assert torch.equal(y, ops.rms_norm(total, weight, 1e-6))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_eps_counts_and_a_row_of_zeros_is_zero(ops):
    x, weight = torch.tensor([[1e-3, -1e-3], [0.0, 0.0]]), torch.tensor([1.0, 2.0])
    expected = torch.tensor([[2**-0.5, -(2**0.5)], [0.0, 0.0]])
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rows_bits_do_not_depend_on_its_neighbours(dtype):
    x, delta, weight = inputs((40, 70), dtype)
    whole = OPS["cpu"].add_rms_norm(x, delta, weight, 1e-6)
    for t in range(40):
        alone = OPS["cpu"].add_rms_norm(x[t : t + 1], delta[t : t + 1], weight, 1e-6)
        assert all(torch.equal(a[0], w[t]) for a, w in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_lie_apart(dtype):
    x, _, weight = inputs((7, 150), dtype)
    part, weight = x[:, 3:73], weight[:70]
    assert torch.equal(OPS["cpu"].rms_norm(part, weight, 1e-6), OPS["cpu"].rms_norm(part.contiguous(), weight, 1e-6))


def test_the_reference_is_the_formula():
    x, _, weight = inputs((9, 17), torch.float32)
    torch.testing.assert_close(
        rms_norm.reference(x, weight, 1e-5).double(), formula(x, weight, 1e-5), **TOLERANCE[x.dtype]
    )
