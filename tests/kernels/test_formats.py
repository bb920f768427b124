"""Quantised weights: what their bytes mean, by hand, number by number; and that quantisation finds the nearest numbers."""

import dataclasses
import math

import pytest
import torch

from expertwire.kernels import formats
from expertwire.kernels.cpu.gemm import prepare_linear
from expertwire.kernels.formats import QuantizedWeight, dequantize, quantize
from expertwire.kernels.ops import linear

E4M3 = torch.tensor(
    [
        (-1) ** (code >> 7)
        * ((code & 7) / 8 * 2.0**-6 if code >> 3 & 15 == 0 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3 & 15) - 7))
        for code in range(256)
    ]
)
E4M3[[0x7F, 0xFF]] = math.nan
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
GROUP = {"int4": 32, "mxfp4": 32, "nvfp4": 16}
BITS = {"fp8_block": 8, "fp8_row": 8, "int4": 4, "mxfp4": 4, "nvfp4": 4}  # of data, without scales
PARTS = [(576,), (130, 70), (1, 127, 129)]


def random_bytes(*shape, generator):
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def random_weight(format, lead, parts, columns, seed=0):
    """Any bytes that are no NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(parts)
    data = random_bytes(*lead, rows, columns * BITS[format] // 8, generator=generator)
    if format.startswith("fp8"):
        data = torch.where(data & 127 == 127, 5, data).to(torch.uint8).view(formats.FP8)
        blocks = sum(math.ceil(part / 128) for part in parts), math.ceil(columns / 128)
        scales = torch.rand(*lead, *(blocks if format == "fp8_block" else (rows,)), generator=generator) + 0.1
        return QuantizedWeight(format=format, data=data, scales=scales, parts=parts)
    scales = torch.randint(100, 140, (*lead, rows, columns // GROUP[format]), generator=generator)
    if format == "int4":
        scales = (scales / 777).bfloat16()
        return QuantizedWeight(format=format, data=data.view(torch.int32), scales=scales, parts=parts)
    if format == "mxfp4":
        return QuantizedWeight(format=format, data=data, scales=scales.to(torch.uint8), parts=parts)
    scales, globals_P = (
        scales.to(torch.uint8).sub(80).view(formats.FP8),
        torch.rand(*lead, len(parts), generator=generator),
    )
    return QuantizedWeight(format=format, data=data, scales=scales, parts=parts, global_scales=globals_P)


def number(weight, row, column):
    """fp32, of a matrix: its code's value and its scale, looked up in the bytes."""
    format = weight.format
    if format.startswith("fp8"):
        value = E4M3[weight.data.view(torch.uint8)[row, column].item()]
    elif format == "int4":
        value = torch.tensor((weight.data[row, column // 8].item() >> 4 * (column % 8) & 15) - 8.0)
    else:
        value = torch.tensor(E2M1[weight.data[row, column // 2].item() >> 4 * (column % 2) & 15])
    starts = [sum(weight.parts[:i]) for i in range(len(weight.parts))]
    part = max(i for i, start in enumerate(starts) if start <= row)
    if format == "fp8_row":
        return value * weight.scales[row]
    if format == "fp8_block":
        before = sum(math.ceil(rows / 128) for rows in weight.parts[:part])
        return value * weight.scales[before + (row - starts[part]) // 128, column // 128]
    scale = weight.scales[row, column // GROUP[format]]
    if format == "mxfp4":
        return value * 2.0 ** (scale.item() - 127)
    if format == "nvfp4":
        return value * (E4M3[scale.view(torch.uint8).item()] * weight.global_scales[part])
    return value * scale.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("format", formats.FORMATS)
def test_every_number_is_its_code_times_its_scale(format, parts, dtype):
    """Also where blocks of 128 are cut off, below and at the right: some rows around every edge, and all columns."""
    weight = random_weight(format, (), parts, 160)
    edges = [0, *(sum(parts[: i + 1]) for i in range(len(parts)))]
    rows = sorted({row for edge in edges for row in (edge - 1, edge, edge + 127, edge + 128) if 0 <= row < sum(parts)})
    expected = torch.stack([torch.stack([number(weight, row, column) for column in range(160)]) for row in rows])
    assert torch.equal(dequantize(weight, dtype)[rows], expected.to(dtype))


@pytest.mark.parametrize("format", formats.FORMATS)
def test_experts_are_matrices_of_their_own(format):
    weight = random_weight(format, (3,), (32, 160), 96)
    whole = dequantize(weight, torch.float32)
    assert whole.shape == weight.shape == (3, 192, 96)
    assert all(torch.equal(dequantize(weight.expert(e), torch.float32), whole[e]) for e in range(3))
    assert torch.equal(dequantize(weight.experts(1, 3), torch.float32), whole[1:])
    weight.expert(1).data.view(torch.uint8).fill_(0x44)
    assert not torch.equal(dequantize(weight, torch.float32)[1], whole[1]), "an expert is a copy"


def test_bytes_as_published():
    """gpt-oss: low half first, exponents less 127. compressed-tensors: number i at bits 4 i, less 8."""
    mxfp4 = QuantizedWeight(
        format="mxfp4",
        data=torch.tensor([[0x21, 0x9F, *[0] * 14]], dtype=torch.uint8),
        scales=torch.tensor([[128]], dtype=torch.uint8),
        parts=(1,),
    )
    assert dequantize(mxfp4, torch.float32)[0, :5].tolist() == [1, 2, -12, -1, 0]
    int4 = QuantizedWeight(
        format="int4",
        data=torch.tensor([[-0x01234568, 0, 0, 0]], dtype=torch.int32),  # 0xfedcba98
        scales=torch.tensor([[0.5]], dtype=torch.bfloat16),
        parts=(1,),
    )
    assert dequantize(int4, torch.float32)[0, :9].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, -4]


def test_exponents():
    values = formats.exponents_to_fp32(torch.tensor([0, 1, 127, 130, 254, 255], dtype=torch.uint8))
    assert values[:-1].tolist() == [2.0**-127, 2.0**-126, 1, 8, 2.0**127]
    assert values[-1].isnan()


def scales_of(weight):
    """fp32 [M, K]: what the codes are multiplied by; found with codes of 1."""
    one = {"int4": 0x99, "mxfp4": 0x22, "nvfp4": 0x22}.get(weight.format, 0x38)
    ones = torch.full_like(weight.data.view(torch.uint8), one).view(weight.data.dtype)
    return dequantize(dataclasses.replace(weight, data=ones), torch.float32)


def normal(*shape, seed=1):
    """Return normal numbers of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[-2])[:, None]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_quantized_numbers_are_the_nearest(format):
    w = normal(200, 160)
    weight = quantize(format, w, (130, 70))
    scales, found = scales_of(weight), dequantize(weight, torch.float32)
    values = {"int4": range(-8, 8), "mxfp4": E2M1, "nvfp4": E2M1}.get(format, E4M3[~E4M3.isnan()].tolist())
    nearest = torch.full_like(w, math.inf)
    for value in values:
        nearest = torch.minimum(nearest, (w - value * scales).abs())
    torch.testing.assert_close((w - found).abs(), nearest, rtol=1e-4, atol=1e-9)


# What the largest number of a group, row or block becomes in units of its scale, by the rules that `quantize` names.
LARGEST = {"fp8_block": (447, 449), "fp8_row": (447, 449), "int4": (7.4, 7.6), "mxfp4": (4, 8), "nvfp4": (5.6, 6.4)}


@pytest.mark.parametrize("format", formats.FORMATS)
def test_scales_use_the_range(format):
    w = normal(200, 160).clamp(min=-0.0).add(1e-3)
    least, most = LARGEST[format]
    weight = quantize(format, w, (130, 70))
    ratios = w / scales_of(weight)
    if format == "fp8_block":
        tops = torch.stack([r.max() for half in ratios.split((128, 2, 70)) for r in half.split(128, dim=1)])
    else:
        tops = ratios.unflatten(1, (-1, GROUP.get(format, 160))).amax(-1)
        if format == "nvfp4":  # groups far below the largest have scales that fp8 has no digits for
            tops = tops[weight.scales.float() > 2.0**-6]
    assert least <= tops.min(), (format, tops.min())
    assert tops.max() <= most, (format, tops.max())


def test_of_two_as_near_the_even_code():
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)[None]
    found = dequantize(quantize("mxfp4", halfway), torch.float32)
    assert found[0, :8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_parts_are_quantized_apart(format):
    """And experts too; zeros stay zeros."""
    w = torch.stack((normal(192, 160), torch.zeros(192, 160)))
    whole = dequantize(quantize(format, w, (64, 128)), torch.float32)
    apart = [dequantize(quantize(format, part), torch.float32) for part in w[0].split((64, 128))]
    assert torch.equal(whole[0], torch.cat(apart))
    assert torch.equal(whole[1], w[1])


@pytest.mark.parametrize("name", formats.ON_THE_FLY)
def test_on_the_fly(name):
    """bf16 experts; bytes as the format promises."""
    w = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight = formats.quantize_experts(w, name, (128, 128))
    assert weight.format == formats.ON_THE_FLY[name]
    bits = {"fp8": 8 + 32 / 128**2, "int4": 4 + 16 / 32, "mxfp4": 4 + 8 / 32}[name]
    assert weight.nbytes * 8 == bits * w.numel()
    error = (dequantize(weight, torch.float32) - w.float()).norm() / w.float().norm()
    assert error < {"fp8": 0.03, "int4": 0.11, "mxfp4": 0.13}[name]


def test_unknown_name():
    with pytest.raises(ValueError, match=r"quantize is 'fp4'.*'fp8', 'int4', 'mxfp4'"):
        formats.quantize_experts(torch.zeros(1, 32, 32), "fp4")


@pytest.mark.parametrize(
    ("format", "change"),
    [
        ("fp8_block", {"parts": (200,)}),  # two parts of 130 and 70 have a block more
        ("fp8_row", {"scales": torch.ones(199)}),
        ("int4", {"scales": torch.ones(200, 5)}),
        ("mxfp4", {"parts": (100, 90)}),
        ("nvfp4", {"global_scales": None}),
        ("mxfp4", {"global_scales": torch.ones(2)}),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit(format, change):
    weight = random_weight(format, (), (130, 70), 160)
    with pytest.raises(AssertionError, match=format):
        dataclasses.replace(weight, **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_linear_layer_is_unpacked(format, dtype):
    weight = random_weight(format, (), (64, 80), 96)
    bias, x = torch.randn(144).to(dtype), torch.randn(3, 96).to(dtype)
    y = prepare_linear(weight, bias, dtype=dtype)(x)
    assert torch.equal(y, prepare_linear(dequantize(weight, dtype), bias)(x))
    torch.testing.assert_close(y, linear.reference(x, dequantize(weight, dtype), bias), rtol=2**-7, atol=1e-2)


def test_a_linear_layer_in_another_dtype():
    w, x = torch.randn(32, 64), torch.randn(3, 64).bfloat16()
    assert torch.equal(prepare_linear(w, dtype=torch.bfloat16)(x), prepare_linear(w.bfloat16())(x))
