"""Grouped GEMMs in Triton's interpreter against the loop over experts."""

import dataclasses

import pytest
import torch

from expertwire.bench.kernels import reference_formats as reference
from expertwire.kernels.gpu import block_scaled_mma, formats, grouped_gemm, grouped_gemm_tiles
from expertwire.kernels.gpu.device import B200, H200, Device
from expertwire.kernels.ops import experts

DEVICE = Device(arch=90, num_sms=2)
D, F = 80, 48  # neither a multiple of the tiles
SWIGLU = experts.Activation()
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}


def rows_of(counts, spare=0, num_rows=20, seed=0, planned=16, format="dense", tokens=None):
    """Return an index into `num_rows` rows with gaps and repetitions, slots in a random order, and
    `spare` missing rows.
    """
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = sum(counts) + spare
    row_index = torch.randint(max(num_rows, 1), (total,), generator=generator, dtype=torch.int32)
    row_index[sum(counts) :] = 10**9
    home = torch.randperm(total + 3, generator=generator)[:total].to(torch.int32)
    return with_tiles(grouped_gemm.RoutedRows.of(row_index, home, offsets, planned, format), tokens)


def with_tiles(rows, tokens):
    if tokens is None:
        return rows
    tile_map = grouped_gemm_tiles.build_tile_map(rows.expert_offsets, len(rows.row_index_R), tokens)
    return dataclasses.replace(rows, tile_map=tile_map)


def randn(*shape, dtype=torch.float32, seed=1, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def w13(x, rows, weights, activation=SWIGLU, bias=None):
    packed = formats.dense(weights, gated=activation.gated)
    return grouped_gemm.w13(x, rows, packed, activation, DEVICE, bias_eF=bias)


def w13_reference(x, rows, weights, activation=SWIGLU, bias=None):
    return experts.w13_reference(x, rows.row_index_R, rows.expert_offsets, weights, activation, bias)


def nothing(rows, width, dtype=torch.float32):
    return torch.full((len(rows.home_R) + 3, width), torch.nan, dtype=dtype)


def w2(hidden, rows, weights, bias=None):
    out = nothing(rows, weights.shape[1], hidden.dtype)
    return grouped_gemm.w2(hidden, rows, formats.dense(weights), out, DEVICE, bias_eD=bias)


def w2_reference(hidden, rows, weights, bias=None):
    out = nothing(rows, weights.shape[1], hidden.dtype)
    return experts.w2_reference(hidden, rows.expert_offsets, weights, rows.home_R, out, bias)


COUNTS = [[1], [0, 0, 37, 0], [16, 0, 17, 15], [0, 1, 33], [130, 3]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_w13(counts):
    rows = rows_of(counts, spare=5)
    x, weights = randn(20, D), randn(len(counts), 2 * F, D, seed=2)
    total = sum(counts)
    assert_close(w13(x, rows, weights)[:total], w13_reference(x, rows, weights)[:total])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_w2(counts):
    """Slots without a row keep their contents."""
    rows = rows_of(counts, spare=5)
    hidden, weights = randn(sum(counts) + 5, F), randn(len(counts), D, F, seed=2)
    hidden[sum(counts) :] = torch.nan
    assert_close(w2(hidden, rows, weights), w2_reference(hidden, rows, weights))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCE[actual.dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["swiglu", "swiglu_clamped", "relu2"])
def test_activations_and_biases(kind, dtype):
    activation = experts.Activation(kind)
    counts, width = [3, 0, 18], 2 * F if activation.gated else F
    rows = rows_of(counts)
    x, weights = randn(20, D, dtype=dtype), randn(3, width, D, dtype=dtype, seed=2, scale=D**-0.5 * 3)
    bias = randn(3, width, dtype=dtype, seed=3) * 4
    expected = w13_reference(x, rows, weights, activation, bias)
    assert_close(w13(x, rows, weights, activation, bias), expected)
    hidden = expected.clamp(-4, 4)
    down, down_bias = randn(3, D, F, dtype=dtype, seed=4, scale=F**-0.5), randn(3, D, dtype=dtype, seed=5)
    assert_close(w2(hidden, rows, down, down_bias), w2_reference(hidden, rows, down, down_bias))


@pytest.mark.parametrize("tokens", [16, 32, 64, 128, 256])
def test_a_rows_bits_do_not_depend_on_the_batch(tokens):
    """Compare rows alone and among others; only a GPU can compare tile sizes, since numpy's products differ."""
    x, weights = randn(40, D), randn(2, 2 * F, D, seed=2)
    rows = rows_of([3, 150], num_rows=40, tokens=tokens)
    alone = dataclasses.replace(
        rows,
        row_index_R=rows.row_index_R[77:78],
        home_R=rows.home_R[77:78],
        expert_offsets=torch.tensor([0, 0, 1], dtype=torch.int32),
    )
    expected = w13(x, with_tiles(alone, tokens), weights)
    assert_close(expected, w13(x, with_tiles(alone, 16), weights))
    torch.testing.assert_close(w13(x, rows, weights)[77:78], expected, rtol=0, atol=0)


def test_no_rows():
    """Plan for no rows, or receive none of those planned."""
    weights = randn(2, 2 * F, D)
    assert w13(randn(0, D), rows_of([0, 0], num_rows=0), weights).shape == (0, F)
    assert w2(randn(4, F), rows_of([0, 0], spare=4), randn(2, D, F)).isnan().all()


def test_groups_of_tiles_cover_every_tile_once():
    """Use more tiles than a group holds, several blocks of weights, and experts of different size."""
    rows = rows_of([16 * 9 + 1, 5, 16 * 17], planned=1000, tokens=16)
    x, weights = randn(20, 16), randn(3, 2 * 160, 16, seed=2)
    assert_close(w13(x, rows, weights), w13_reference(x, rows, weights))


@pytest.mark.parametrize("tokens", [128, 256])
def test_an_experts_last_tile_may_be_smaller(tokens):
    """Let the last rows fill the smaller tile, or be one too many for it."""
    half = tokens // 2
    counts = [half, half + 1, 0, tokens + half, tokens + half + 1, 1]
    rows = rows_of(counts, tokens=tokens)
    x, weights = randn(20, 16), randn(6, 32, 16, seed=2)
    assert_close(w13(x, rows, weights), w13_reference(x, rows, weights))
    hidden = randn(sum(counts), 16)
    assert_close(w2(hidden, rows, weights), w2_reference(hidden, rows, weights))


FP8_COUNTS = [([5, 0, 20], None), ([3, 70], 64), ([140, 1], 128)]


@pytest.mark.parametrize(("counts", "tokens"), FP8_COUNTS, ids=str)
@pytest.mark.parametrize(("gated", "width"), [(True, 96), (True, 64), (False, 160)])
def test_fp8_blocks(counts, tokens, gated, width):
    """Use scales of 128 x 128 for weights and 128 columns for rows, with sizes that are no multiple of a block."""
    e, columns = len(counts), 208
    activation = SWIGLU if gated else experts.Activation("relu2")
    rows = rows_of(counts, spare=3, format="fp8_block", tokens=tokens)
    parts = 2 if gated else 1
    data, scales = zip(
        *(reference.quantize_blocks(randn(e, width, columns, seed=seed) * columns**-0.5) for seed in range(parts)),
        strict=True,
    )
    weights = formats.fp8_block(torch.cat(data, 1), torch.cat(scales, 1), gated=gated)
    x, x_scales = reference.quantize_rows(randn(20, columns, seed=9), 128)
    tiled_scales = grouped_gemm_tiles.tile_scales(x_scales, rows.row_index_R, rows.expert_offsets, rows.tile_map)
    actual = grouped_gemm.w13(x, rows, weights, activation, DEVICE, x_scales=tiled_scales, out_dtype=torch.float32)
    plain = torch.cat([reference.dequantize_blocks(*part) for part in zip(data, scales, strict=True)], 1)
    expected = w13_reference(reference.dequantize_rows(x, x_scales, 128), rows, plain, activation)
    total = sum(counts)
    assert_close(actual[:total], expected[:total])


@pytest.mark.filterwarnings("ignore:overflow")  # scales of padding are undefined
@pytest.mark.parametrize(("counts", "tokens"), FP8_COUNTS, ids=str)
def test_fp8_blocks_w2(counts, tokens):
    rows = rows_of(counts, spare=3, format="fp8_block", tokens=tokens)
    data, scales = reference.quantize_blocks(randn(len(counts), 160, 208) * 208**-0.5)
    hidden, x_scales = reference.quantize_rows(randn(sum(counts) + 3, 208, seed=9), 128)
    tiled_scales = grouped_gemm_tiles.tile_scales(x_scales, None, rows.expert_offsets, rows.tile_map)
    out = nothing(rows, 160)
    grouped_gemm.w2(hidden, rows, formats.fp8_block(data, scales), out, DEVICE, x_scales=tiled_scales)
    plain = reference.dequantize_rows(hidden, x_scales, 128)
    assert_close(out, w2_reference(plain, rows, reference.dequantize_blocks(data, scales)))


@pytest.mark.parametrize("scales_of", ["rows", "halves", "matrix"])
def test_fp8_rows(scales_of):
    """Use one scale a row of x, and one a row, a half (gate, up), or all of an expert's weights."""
    counts = [5, 0, 37]
    rows = rows_of(counts, spare=3, format="fp8_row")
    shape = {"rows": (3, 2 * F), "halves": (3, 2), "matrix": (3,)}[scales_of]
    data, scales = randn(3, 2 * F, D, seed=2).to(formats.FP8), randn(*shape, seed=3).abs() * D**-0.5
    weights = formats.fp8_row(data, scales, gated=True)
    x, x_scales = reference.quantize_rows(randn(20, D, seed=9), D)
    actual = grouped_gemm.w13(x, rows, weights, SWIGLU, DEVICE, x_scales=x_scales[:, 0], out_dtype=torch.float32)
    per_row = scales.view(3, -1).repeat_interleave(2 * F // scales.view(3, -1).shape[1], 1)
    plain = reference.dequantize_rows(x, x_scales, D)
    expected = w13_reference(plain, rows, data.float() * per_row[..., None])
    assert_close(actual[:42], expected[:42])
    down, down_scales = randn(3, D, F, seed=4).to(formats.FP8), randn(3, D, seed=5) * F**-0.5
    hidden, x_scales = reference.quantize_rows(randn(45, F, seed=9), F)
    out = nothing(rows, D)
    grouped_gemm.w2(hidden, rows, formats.fp8_row(down, down_scales), out, DEVICE, x_scales=x_scales[:, 0])
    plain = reference.dequantize_rows(hidden, x_scales, F)
    assert_close(out, w2_reference(plain, rows, down.float() * down_scales[..., None]))


def test_fp8_with_a_constant_scale_for_x():
    counts, (data, scales) = [5, 37], (randn(2, D, F).to(formats.FP8), randn(2, seed=5).abs())
    rows = rows_of(counts, format="fp8_row")
    hidden, scale, out = randn(42, F, seed=9).to(formats.FP8), torch.tensor([0.25]), nothing(rows, D)
    grouped_gemm.w2(hidden, rows, formats.fp8_row(data, scales), out, DEVICE, x_scales=scale)
    assert_close(out, w2_reference(hidden.float() * 0.25, rows, data.float() * scales[:, None, None]))


@pytest.mark.parametrize(("counts", "tokens"), [([5, 0, 20], None), ([140, 1], 128)], ids=str)
@pytest.mark.parametrize("format", formats.GROUPS)
def test_4_bits(format, counts, tokens):
    """Use all codes and a wide range of scales, with K no multiple of a step."""
    e, columns = len(counts), 160
    rows = rows_of(counts, spare=3, format=format, tokens=tokens)
    weights = randn(e, 96, columns, seed=2) * torch.logspace(-3, 0, 96)[:, None]
    codes, scales, global_scales = reference.quantize_4bit(format, weights)
    plain = reference.dequantize_4bit(format, codes, scales, global_scales)
    assert (plain - weights).abs().mean() < 0.15 * weights.abs().mean()
    assert codes.unique().numel() >= 15
    packed = formats.pack4(format, codes, scales, global_scales, gated=True)
    x, total = randn(20, columns, seed=3), sum(counts)
    actual = grouped_gemm.w13(x, rows, packed, SWIGLU, DEVICE)
    assert_close(actual[:total], w13_reference(x, rows, plain)[:total])
    hidden, out = randn(total + 3, columns, seed=4), nothing(rows, 96)
    grouped_gemm.w2(hidden, rows, formats.pack4(format, codes, scales, global_scales), out, DEVICE)
    assert_close(out, w2_reference(hidden, rows, plain))


def both(format, weights, x):
    """Return weights and rows of x in a block-scaled format, as the kernel takes them and as fp32 numbers."""
    w, rows = (
        reference.quantize_scaled(kind, values)
        for kind, values in zip(block_scaled_mma.KINDS[format], (weights, x), strict=True)
    )
    return (
        w,
        (reference.pack_rows(rows[0]), rows[1]),
        reference.dequantize_scaled(*w),
        reference.dequantize_scaled(*rows),
    )


@pytest.mark.parametrize(("counts", "tokens"), [([5, 0, 20], None), ([140, 1], 128)], ids=str)
@pytest.mark.parametrize("format", formats.SCALED)
def test_scales_for_both(format, counts, tokens):
    """Check the kernel without native scales, with K no multiple of a step and M none of a tile."""
    e, columns, total = len(counts), 160, sum(counts)
    rows = rows_of(counts, spare=3, format=format, tokens=tokens)
    wide = torch.logspace(-3, 0, 96)[:, None]
    w, (x, x_scales), w_plain, x_plain = both(format, randn(e, 96, columns, seed=2) * wide, randn(20, columns, seed=3))
    weights, globals_e = block_scaled_mma.pack(format, *w, gated=True), torch.arange(1.0, 1 + e)
    assert (x_plain - randn(20, columns, seed=3)).abs().mean() < 0.15
    actual = grouped_gemm.w13(x, rows, weights, SWIGLU, DEVICE, x_scales=x_scales, out_dtype=torch.float32)
    assert_close(actual[:total], w13_reference(x_plain, rows, w_plain)[:total])
    weights = block_scaled_mma.pack(format, *w, globals_e)
    _, (hidden, scales), _, plain = both(format, randn(1, 32, 32), randn(total + 3, columns, seed=4))
    out = nothing(rows, 96)
    grouped_gemm.w2(hidden, rows, weights, out, DEVICE, x_scales=scales)
    assert_close(out, w2_reference(plain, rows, w_plain * globals_e[:, None, None]))


def test_blackwell_applies_scales_natively():
    """Its instruction needs 128 rows of weights, for one token as for thousands."""
    shape = (128, 2880, 2880)
    for format in formats.SCALED:
        for planned in (1, 256, 65536):
            tokens = grouped_gemm_tiles.token_tile(format, planned, shape[0])
            hopper, blackwell = (
                grouped_gemm_tiles.tile_config(format, tokens, shape, planned, device) for device in (H200, B200)
            )
            assert (hopper.native, blackwell.native, hopper.rows, blackwell.rows) == (False, True, 128, 128)
    assert not grouped_gemm_tiles.tile_config("mxfp4", 16, shape, 1, B200).native


def test_interleaving_keeps_gate_and_up_apart():
    """Gate rows over up rows become interleaved by eight."""
    gate, up = randn(2, 16, 3), randn(2, 16, 3, seed=2)
    halves = torch.cat([gate, up], dim=1)
    expected = torch.cat([gate[:, :8], up[:, :8], gate[:, 8:], up[:, 8:]], dim=1)
    assert torch.equal(formats.interleave(halves), expected)


def test_tiles_grow_with_the_rows_planned():
    rows = (1, 8, 1024, 2048, 4096, 8192, 32768, 131072)
    assert [grouped_gemm_tiles.token_tile("dense", planned, 128) for planned in rows] == [
        16,
        16,
        16,
        32,
        64,
        128,
        128,
        256,
    ]
    assert [grouped_gemm_tiles.token_tile("fp8_block", planned, 128) for planned in rows] == [
        16,
        16,
        16,
        32,
        64,
        128,
        128,
        128,
    ]
