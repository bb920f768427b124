"""Prepared linear layers against the product, at every number of rows where another path may run."""

import pytest
import torch

from expertwire.kernels.cpu.gemm import prepare_linear
from expertwire.kernels.ops import linear

ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129]
SHAPES = [(320, 64), (64, 320), (8, 64), (20, 32), (60, 96), (96, 24), (33, 17), (1, 5), (256, 512)]  # outputs, inputs


@pytest.fixture(params=[1, 2, 3], ids=["1 thread", "2 threads", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_prepared(dtype, shape, with_bias):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    layer = prepare_linear(weight.clone(), bias)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=generator).to(dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        y = layer(x)
        assert (y.shape, y.dtype) == ((rows, shape[0]), dtype)
        # fp32: a sum of n products of about 1. bf16: one rounding of the result (and what is left of it after cancelling).
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2e-2}
        torch.testing.assert_close(
            y.double(), expected, **tolerance, msg=lambda text, rows=rows: f"{rows} rows: {text}"
        )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 64), (20, 32), (320, 64), (33, 17), (256, 1024)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_bits_of_rows_do_not_depend_on_their_company(dtype, shape, with_bias):
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    layer = prepare_linear(torch.randn(shape, generator=generator).to(dtype), bias)
    num = 333
    x = torch.randn(num, shape[1], generator=generator).to(dtype)
    whole = layer(x)
    for first, last in [(0, 1), (num - 1, num), (3, 5), (1, 17), (2, 66), (5, 134), (7, 300), (0, num - 1), (1, num)]:
        assert torch.equal(layer(x[first:last]), whole[first:last]), f"rows {first} to {last} of {num}"


def test_reference_rounds_once():
    x, weight = torch.full((1, 512), 1 + 2**-7).bfloat16(), torch.ones(1, 512).bfloat16()
    expected = torch.tensor(512 * (1 + 2**-7)).bfloat16()
    assert linear.reference(x, weight).item() == expected.item() == 516
    assert linear.reference(x, weight, torch.ones(1).bfloat16()).item() == torch.tensor(517.0).bfloat16().item()
