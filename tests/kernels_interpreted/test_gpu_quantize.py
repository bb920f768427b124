"""Quantisation and activation against their references.

The interpreter rounds to fp8 wrongly: values are compared before rounding.
"""

import pytest
import torch

from expertwire.kernels.gpu import quantize as gpu
from expertwire.kernels.ops import experts, quantize

SHAPES = [(0, 256, 128), (1, 128, 128), (3, 768, 128), (2, 2048, 128), (2, 1280, 1280), (3, 100, 100), (2, 96, 32)]


def rows(tokens, width, dtype, seed=0):
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    if tokens > 1:
        x[0] *= 1e-3
        x[1, : width // 2] = 0.0
        x[1, -1] = 60000.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width", "group"), SHAPES)
def test_quantize(dtype, tokens, width, group):
    x = rows(tokens, width, dtype)
    done, expected = gpu.quantize(x, group, dtype=torch.float32), quantize.scaled(x, group)
    assert torch.equal(done.scales_TJ, expected.scales_TJ)
    assert torch.equal(done.values_TD, expected.values_TD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [shape[:2] for shape in SHAPES])
def test_silu_mul(dtype, tokens, width):
    x = rows(tokens, 2 * width, dtype).clamp(-100, 100)
    torch.testing.assert_close(gpu.silu_mul(x), experts.silu_mul_reference(x))


def test_silu_is_rounded_before_it_is_multiplied():
    """Then nearly all bits equal the reference's, not only the values."""
    x = rows(3, 2 * 2048, torch.float16).clamp(-100, 100)
    assert (gpu.silu_mul(x) != experts.silu_mul_reference(x)).float().mean() < 0.01


def test_fp8_comes_out_near_what_went_in():
    """Some of the interpreter's roundings are off by a binade, none by more."""
    x = rows(4, 512, torch.float32)
    done = gpu.quantize(x)
    assert done.values_TD.dtype == torch.float8_e4m3fn
    error = (quantize.dequantize(done) - x).abs()
    least = quantize.LARGEST * done.scales_TJ.repeat_interleave(128, 1) * 2**-18
    assert (error <= x.abs() / 2 + least).all()
    assert error.mean() < 0.05 * x.abs().mean()


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(AssertionError, match="96 of 192"):
        gpu.quantize(torch.zeros(1, 192), 96)


def test_missing_rows_are_not_read(monkeypatch):
    x, poison = rows(5, 256, torch.float32), torch.full((5, 256), 7.0)
    room = gpu.allocate
    monkeypatch.setattr(gpu, "allocate", lambda *args: room(*args)._replace(values_TD=poison))
    done = gpu.quantize(x, num_rows=torch.tensor([9, 3], dtype=torch.int32)[1:], dtype=torch.float32)
    assert torch.equal(done.values_TD[:3], quantize.scaled(x).values_TD[:3])
    assert (done.values_TD[3:] == 7).all()


def test_rows_that_an_index_names(monkeypatch):
    """Rows that have come, among all that other ranks can send; one that two experts have is named twice."""
    x = rows(40, 256, torch.bfloat16)
    x[7] = float("nan")  # nobody has sent it
    index, num = torch.tensor([31, 2, 31, 0, 7], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    room = quantize.QuantizedRows(torch.full((40, 256), -7.0), torch.full((40, 2), -7.0))
    monkeypatch.setattr(gpu, "allocate", lambda *args: room)
    done, expected = gpu.quantize(x, index=index, num_rows=num, dtype=torch.float32), quantize.scaled(x)
    come = [0, 2, 31]
    assert torch.equal(done.values_TD[come], expected.values_TD[come])
    assert torch.equal(done.scales_TJ[come], expected.scales_TJ[come])
    others = [row for row in range(40) if row not in come]
    assert (done.values_TD[others] == -7).all()
    assert (done.scales_TJ[others] == -7).all()
