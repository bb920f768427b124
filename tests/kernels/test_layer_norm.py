"""Layer normalisation, alone and behind a sum."""

import pytest
import torch

from expertwire.kernels import registry

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}


def scene(dtype, width):
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(37, width, generator=generator).add(3).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, generator=generator).to(dtype) for _ in range(2))
    return x, delta, weight, bias


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 33, 96, 2560])
def test_layer_norm(ops, dtype, width):
    x, delta, weight, bias = scene(dtype, width)
    total, y = ops.add_layer_norm(x, delta, weight, bias, 0.01)
    assert torch.equal(total, x + delta)
    exact = total.double()
    centred = exact - exact.mean(1, keepdim=True)
    expected = centred / (centred.pow(2).mean(1, keepdim=True) + 0.01).sqrt() * weight.double() + bias.double()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
    torch.testing.assert_close(y.double(), expected, **tolerance)
    assert y.dtype == dtype and torch.equal(ops.layer_norm(total, weight, bias, 0.01), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [33, 96, 2560])
def test_bits_do_not_depend_on_the_other_rows(dtype, width):
    x, delta, weight, bias = scene(dtype, width)
    whole = OPS["cpu"].add_layer_norm(x, delta, weight, bias, 0.01)[1]
    for t in range(len(x)):
        assert torch.equal(
            OPS["cpu"].add_layer_norm(x[t : t + 1], delta[t : t + 1], weight, bias, 0.01)[1][0], whole[t]
        )
