"""The GPU's experts, prepared from a checkpoint's weights, in Triton's interpreter against the references."""

import contextlib

import numpy as np
import pytest
import torch

from expertwire.bench.kernels import reference_formats
from expertwire.kernels import formats
from expertwire.kernels.gpu import block_scaled_mma, grouped_gemm_tiles
from expertwire.kernels.gpu import experts as gpu_experts
from expertwire.kernels.gpu import linear as gpu_linear
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops import experts, linear, quantize
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.variants import Activation

DEVICE = Device(arch=90, num_sms=2)
OFFSETS = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
GROUPS = {"fp8_block": 128, "fp8_row": 128}  # of x, which is quantised with fp8 weights


def normal(*shape, seed, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_multiplied(x, format):
    """Return rows with the rounding of their quantisation, if the format has one."""
    if format not in GROUPS:
        return x
    return quantize.dequantize(quantize.reference(x, GROUPS[format])).to(x.dtype)


def weights_of(format, width, inner):
    w13, w2 = normal(3, 2 * inner, width, seed=1, scale=width**-0.5), normal(3, width, inner, seed=2, scale=inner**-0.5)
    w13[:, :inner] *= torch.linspace(0.5, 2, inner)[:, None]
    if format == "dense":
        return w13, w2
    if format == "nvfp4":  # gate and up share their global scale
        w13[:, 0, 0] = w13[:, inner, 0] = w13.abs().max()
    return formats.quantize(format, w13, (inner, inner)), formats.quantize(format, w2)


def quantize_tiles(x, expert_offsets, tile_map):
    values, scales = quantize.reference(x)
    return values, grouped_gemm_tiles.tile_scales(scales, None, expert_offsets, tile_map)


@pytest.mark.filterwarnings("ignore:overflow")  # scales of padding are undefined
@pytest.mark.parametrize("format", ["dense", *formats.FORMATS])
def test_experts(format, monkeypatch):
    """Use biases and clamps; also rewrite an expert in place."""
    # The interpreter rounds to fp8 wrongly.
    monkeypatch.setattr(gpu_experts.quantize, "quantize", quantize.reference)
    monkeypatch.setattr(gpu_experts.grouped_gemm_tiles, "quantize_tiles", quantize_tiles)
    width, inner = (128, 128) if format in GROUPS else (96, 64)
    activation = Activation("swiglu_clamped", limit=1.5)
    bias13, bias2 = normal(3, 2 * inner, seed=3), normal(3, width, seed=4)
    weights, x = weights_of(format, width, inner), normal(20, width, seed=5)
    index = torch.randint(20, (20,), generator=torch.Generator().manual_seed(6)).int()
    apply = gpu_experts.prepare(GroupedMlpWeights(*weights, activation, bias13, bias2), device=DEVICE)
    w13, w2 = (formats.dequantize(weight, torch.float32) for weight in weights)
    home = torch.arange(20).int()
    for rewritten in (False, True):
        if rewritten:
            for tensor in (*apply.weights, w13, w2):
                assert tensor.shape[0] == 3
                tensor[2].copy_(tensor[0])
        hidden = experts.w13_reference(as_multiplied(x, format), index, OFFSETS, w13, activation, bias13)
        expected = experts.w2_reference(as_multiplied(hidden, format), OFFSETS, w2, home, torch.empty(20, width), bias2)
        found = apply(x, index.long(), OFFSETS.numpy().astype(np.int64))
        error = (found - expected).norm() / expected.norm()
        assert error < (2e-3 if format in GROUPS else 1e-5), error  # a few numbers of x may round the other way
    assert any(tensor is bias13 for tensor in apply.weights)


def test_tiles_are_for_the_rows_that_are_expected(monkeypatch):
    """The result is the same if few or all of the possible rows come."""
    seen, token_tile = [], gpu_experts.grouped_gemm_tiles.token_tile
    monkeypatch.setattr(
        gpu_experts.grouped_gemm_tiles, "token_tile", lambda *args: seen.append(token_tile(*args)) or seen[-1]
    )
    weights, x = weights_of("dense", 96, 64), normal(9, 96, seed=5)
    index, found = torch.zeros(400, dtype=torch.int32), []
    index[:20] = torch.randint(9, (20,), generator=torch.Generator().manual_seed(6))
    for expected in (1.0, 0.05):
        apply = gpu_experts.prepare(GroupedMlpWeights(*weights), device=DEVICE, expected=expected)
        found.append(apply(x, index, OFFSETS, torch.arange(400).int()))
    assert max(seen) == 128
    assert min(seen) == 16
    torch.testing.assert_close(found[0][:20], found[1][:20])


@pytest.mark.parametrize("format", block_scaled_mma.FORMATS)
def test_rows_are_quantised_for_4_bit_weights_where_that_is_chosen(format, monkeypatch):
    """Check the kernels without native scales: products of the rounded numbers."""
    monkeypatch.setattr(
        gpu_experts.block_scaled_mma, "quantize_rows", lambda *args: reference_formats.quantize_scaled_rows(*args[:2])
    )
    (w13, w2), x = weights_of(format, 128, 64), normal(20, 128, seed=5)
    x[3] *= 1e-4  # what a row is small by is its own affair
    index, home = torch.randint(20, (20,), generator=torch.Generator().manual_seed(6)).int(), torch.arange(20).int()
    apply = gpu_experts.prepare(GroupedMlpWeights(w13, w2), device=DEVICE, scale_rows=True)
    assert apply.w13.format == block_scaled_mma.FORMATS[format]
    found = apply(x, index, OFFSETS, home)
    plain13, plain2 = (formats.dequantize(weight, torch.float32) for weight in (w13, w2))
    hidden = experts.w13_reference(dequantised(format, x), index, OFFSETS, plain13, Activation())
    expected = experts.w2_reference(dequantised(format, hidden), OFFSETS, plain2, home, torch.empty(20, 128))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))
    unrounded = gpu_experts.prepare(GroupedMlpWeights(w13, w2), device=DEVICE)(x, index, OFFSETS, home)
    assert 0.001 < (found - unrounded).norm() / unrounded.norm() < 0.3
    with pytest.raises(ValueError, match="64 divides, got") if format == "nvfp4" else contextlib.nullcontext():
        gpu_experts.prepare(GroupedMlpWeights(*weights_of(format, 96, 64)), device=DEVICE, scale_rows=True)


def dequantised(format, x):
    values, scales, row_scales = reference_formats.quantize_scaled_rows(block_scaled_mma.FORMATS[format], x)
    if row_scales is None:
        return reference_formats.dequantize_scaled(values, scales)
    codes = torch.stack((values & 15, values >> 4), -1).flatten(1)
    return reference_formats.dequantize_scaled(codes, scales) * row_scales[:, None]


@pytest.mark.parametrize("format", ["fp8_row", "fp8_block", "mxfp4"])
def test_of_a_buffer_only_rows_that_have_come_are_quantised(format, monkeypatch):
    """A symmetric buffer has room for all ranks' longest prompts, and a decode fills little of it."""
    asked = []

    def note(num_rows, index):
        asked.append((None if index is None else index.tolist(), None if num_rows is None else int(num_rows)))

    def quantised(x, group, *, num_rows, index):
        note(num_rows, index)
        return quantize.reference(x, group)

    def rows_quantised(format, x, num_rows, index):
        note(num_rows, index)
        return reference_formats.quantize_scaled_rows(format, x)

    monkeypatch.setattr(gpu_experts.quantize, "quantize", quantised)
    monkeypatch.setattr(gpu_experts.block_scaled_mma, "quantize_rows", rows_quantised)
    monkeypatch.setattr(gpu_experts.grouped_gemm_tiles, "quantize_tiles", quantize_tiles)
    weights = GroupedMlpWeights(*weights_of(format, 128, 128))
    apply = gpu_experts.prepare(weights, device=DEVICE, scale_rows=format == "mxfp4")
    index = torch.randint(9, (20,), generator=torch.Generator().manual_seed(6)).int()
    small = normal(9, 128, seed=5)
    buffer = torch.cat((small, torch.full((60, 128), torch.nan)))
    found = [apply(x, index, OFFSETS, torch.arange(20).int()) for x in (small, buffer)]
    assert torch.equal(*found)
    of_x = asked[:: 1 if format == "fp8_block" else 2]
    assert of_x == [(None, None), (index.tolist(), 20)]


@pytest.mark.filterwarnings("ignore:overflow")  # scales of padding are undefined
def test_packed_rows_give_the_bits_of_rows_that_are_quantised_here(monkeypatch):
    monkeypatch.setattr(gpu_experts.quantize, "quantize", quantize.reference)
    monkeypatch.setattr(gpu_experts.grouped_gemm_tiles, "quantize_tiles", quantize_tiles)
    apply = gpu_experts.prepare(GroupedMlpWeights(*weights_of("fp8_block", 256, 128)), device=DEVICE)
    x, index = normal(9, 256, seed=5).bfloat16(), torch.randint(9, (20,), generator=torch.Generator().manual_seed(6))
    found = [apply(rows, index, OFFSETS) for rows in (x, quantize.pack(quantize.reference(x)))]
    assert found[1].dtype == torch.bfloat16
    assert torch.equal(*found)


def test_global_scales_that_differ():
    w13, w2 = weights_of("nvfp4", 96, 64)
    w13.global_scales[1, 1] *= 2
    with pytest.raises(ValueError, match="global scales"):
        gpu_experts.prepare(GroupedMlpWeights(w13, w2), device=DEVICE)


def test_a_linear_layer_is_unpacked():
    weight, x = formats.quantize("mxfp4", normal(64, 64, seed=1)), normal(3, 64, seed=2)
    y = gpu_linear.prepare(weight, device=DEVICE, dtype=torch.float32)(x)
    torch.testing.assert_close(y, linear.reference(x, formats.dequantize(weight, torch.float32)), rtol=1e-4, atol=1e-4)
