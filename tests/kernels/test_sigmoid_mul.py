"""The product with a gate's sigmoid against the formula, and rows whose bits do not depend on their number."""

import pytest
import torch

from expertwire.kernels import registry

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
TOLERANCE = {torch.float32: {"rtol": 1e-6, "atol": 1e-30}, torch.bfloat16: {"rtol": 2**-8, "atol": 1e-30}}


def inputs(shape, dtype, one_gate):
    """Gates lie within rows that hold more."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator).to(dtype)
    whole = 5 * torch.randn(*shape[:2], 3 * shape[2], generator=generator).to(dtype)
    return x, whole[..., 2:3] if one_gate else whole[..., shape[2] : 2 * shape[2]]


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 1, 1), (5, 3, 33), (70, 2, 64)], ids=str)
@pytest.mark.parametrize("one_gate", [True, False])
def test_formula(ops, dtype, shape, one_gate):
    x, gate = inputs(shape, dtype, one_gate)
    y = ops.sigmoid_mul(x, gate)
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    torch.testing.assert_close(y.double(), x.double() / (1 + (-gate.double()).exp()), **TOLERANCE[dtype])


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_extreme_gates(ops):
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4])
    y = ops.sigmoid_mul(torch.full((1, 1, 5), 2.0), gate[None, None])
    torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("one_gate", [True, False])
def test_bits_do_not_depend_on_other_rows(dtype, one_gate):
    x, gate = inputs((50, 3, 33), dtype, one_gate)
    whole = OPS["cpu"].sigmoid_mul(x, gate)
    for t in range(50):
        assert torch.equal(OPS["cpu"].sigmoid_mul(x[t : t + 1], gate[t : t + 1])[0], whole[t])
