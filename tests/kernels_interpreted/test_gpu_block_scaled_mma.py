"""Rows quantised for block-scaled products, against their reference.

The interpreter rounds to fp8 wrongly: MXFP8 values are compared before rounding.
"""

import pytest
import torch

from expertwire.bench.kernels import reference_formats
from expertwire.kernels.gpu import block_scaled_mma


def rows(num, width, dtype=torch.float32):
    x = torch.randn(num, width, generator=torch.Generator().manual_seed(width))
    x[1] *= 1e-5
    x[2, : width // 2] = 0.0
    x[3] = 0.0
    x[4, 5] = 3000.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 96, 160, 2880])
def test_mxfp8(dtype, width):
    """Compare exponents, and values bit by bit, since products with powers of two are exact."""
    x = rows(6, width, dtype)
    values, scales, none = block_scaled_mma.quantize_rows("mxfp4_x8", x, value_dtype=torch.float32)
    _, expected = reference_formats.quantize_scaled("e4m3", x)
    assert none is None
    assert scales.tolist() == expected.tolist()
    factor = torch.exp2(127 - expected.double()).repeat_interleave(32, 1)
    assert torch.equal(values, (x.double() * factor).float())
    assert values.abs().max() <= 448


def test_the_exponent_is_the_least_that_fits():
    """448 needs none, anything above it the next one."""
    x = torch.zeros(3, 32)
    x[:, 0] = torch.tensor([448.0, 448.0 * (1 + 2**-20), 447.0])
    assert block_scaled_mma.quantize_rows("mxfp4_x8", x, value_dtype=torch.float32)[1].flatten().tolist() == [
        127,
        128,
        127,
    ]


@pytest.mark.parametrize("width", [64, 192, 2880])
def test_nvfp4(width):
    x = rows(6, width)
    packed, scales, row_scales = block_scaled_mma.quantize_rows("nvfp4_x4", x)
    assert torch.equal(row_scales, x.abs().amax(1).clamp(min=2.0**-100) / 2688)
    groups = x.unflatten(1, (-1, 16))
    assert torch.equal(scales.float(), (groups.abs().amax(2) / (row_scales * 6)[:, None]).to(scales.dtype).float())
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    found = reference_formats.dequantize_scaled(codes, scales) * row_scales[:, None]
    steps = (scales.float() * row_scales[:, None]).repeat_interleave(16, 1)
    inside = x.abs() <= 6 * steps  # a scale may have been rounded down
    assert ((found - x).abs()[inside] <= steps[inside] * (1 + 1e-5)).all(), (
        "more than half of the widest step, from 4 to 6"
    )
    torch.testing.assert_close(found.abs()[~inside], 6 * steps[~inside])
    small = (x / steps).abs() < 1.75
    assert ((found - x).abs()[small] <= 0.25 * steps[small] * (1 + 1e-5)).all()


def test_of_two_codes_as_near_the_smaller():
    x = torch.tensor([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -0.25, 0.26, -6.0, 4.9, 0, 1, 2] * 4)[None]
    packed, _, _ = block_scaled_mma.quantize_rows("nvfp4_x4", x)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)[0, :16]
    assert (codes & 7).tolist() == [7, 0, 1, 2, 3, 4, 5, 6, 6, 0, 1, 7, 6, 0, 2, 4]
    assert (codes >> 3).tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0]


def test_a_row_has_the_same_bits_alone_and_in_a_batch():
    x = rows(9, 192)
    for format, options in (("mxfp4_x8", {"value_dtype": torch.float32}), ("nvfp4_x4", {})):
        whole = block_scaled_mma.quantize_rows(format, x, **options)
        for r in range(9):
            alone = block_scaled_mma.quantize_rows(format, x[r : r + 1], **options)
            for one, every in zip(alone, whole, strict=True):
                assert one is every is None or torch.equal(one[0].float(), every[r].float())


def test_missing_rows_are_not_read():
    x = rows(6, 64)
    x[4:] = torch.nan
    values, scales, _ = block_scaled_mma.quantize_rows(
        "mxfp4_x8", x, torch.tensor([4], dtype=torch.int32), value_dtype=torch.float32
    )
    expected = block_scaled_mma.quantize_rows("mxfp4_x8", x[:4], value_dtype=torch.float32)
    assert torch.equal(values[:4], expected[0])
    assert torch.equal(scales[:4], expected[1])


@pytest.mark.parametrize("format", ["mxfp4_x8", "nvfp4_x4"])
def test_rows_that_an_index_names(format):
    """A row that two experts have is named twice; those behind the number of rows do not count."""
    x, options = rows(9, 128), {"value_dtype": torch.float32} if format == "mxfp4_x8" else {}
    index, num = torch.tensor([4, 6, 4, 1, 8], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    found = block_scaled_mma.quantize_rows(format, x, num, index, **options)
    for some, every in zip(found, block_scaled_mma.quantize_rows(format, x, **options), strict=True):
        assert some is every is None or torch.equal(some[[1, 4, 6]].float(), every[[1, 4, 6]].float())
