"""Reference quantisation of weights and rows, in torch, for tests and benchmarks of the GPU's formats.

e experts, M rows of a weight matrix, K its columns, N rows of x, J groups of columns that
share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertwire.kernels.formats import BLOCK, E2M1, FP8, GROUPS
from expertwire.kernels.gpu.block_scaled_mma import KINDS
from expertwire.kernels.gpu.formats import FP8_MAX, SCALED, SCALES, ExpertWeights


def quantize_4bit(format: str, weights: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise [e, M, K] to codes, scales and global scales as `pack4` takes them.

    Each number gets the nearest code, each group the smallest scale that fits.
    """
    e, M, K = weights.shape
    groups = weights.float().view(e, M, -1, GROUPS[format])
    largest = groups.abs().amax(-1)
    if format == "int4":
        scales = (largest / 7).clamp(min=1e-12).to(torch.bfloat16)
        codes = (groups / scales.float()[..., None]).round().clamp(-8, 7) + 8
        return codes.to(torch.uint8).view(e, M, K), scales, None
    global_scales = None
    if format == "mxfp4":
        scales = (torch.log2(largest.clamp(min=2.0**-100) / 6).ceil() + 127).to(torch.uint8)
    else:
        global_scales = largest.amax((1, 2)) / (6 * FP8_MAX)
        scales = (largest / 6 / global_scales[:, None, None]).to(FP8)
    values = groups / _scale_values(format, scales, global_scales).clamp(min=1e-30)[..., None]
    magnitudes = torch.tensor(E2M1, device=weights.device)
    codes = (values.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (values < 0)
    return codes.to(torch.uint8).view(e, M, K), scales, global_scales


def dequantize_4bit(format: str, codes: Tensor, scales: Tensor, global_scales: Tensor | None) -> Tensor:
    """Return fp32 [e, M, K] from the arguments of `pack4`."""
    magnitudes = torch.tensor(E2M1, device=codes.device)[(codes & 7).long()]
    values = codes.float() - 8 if format == "int4" else torch.where(codes > 7, -magnitudes, magnitudes)
    return values * _scale_values(format, scales, global_scales).repeat_interleave(GROUPS[format], 2)


def _scale_values(format: str, scales: Tensor, global_scales: Tensor | None) -> Tensor:
    if format == "mxfp4":
        return torch.exp2(scales.float() - 127)
    return scales.float() if global_scales is None else scales.float() * global_scales[:, None, None]


def quantize_rows(x_NK: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantise [N, K] to fp8 e4m3 with one scale for each `group` columns, fp32 [N, K / group]."""
    N, K = x_NK.shape
    padded = torch.nn.functional.pad(x_NK.float(), (0, -K % group)).view(N, -1, group)
    scales = (padded.abs().amax(-1) / FP8_MAX).clamp(min=1e-12)
    return (padded / scales[..., None]).view(N, -1)[:, :K].to(FP8), scales


def dequantize_rows(x_NK: Tensor, scales_NJ: Tensor, group: int) -> Tensor:
    """Return fp32 from the results of `quantize_rows`."""
    return x_NK.float() * scales_NJ.repeat_interleave(group, 1)[:, : x_NK.shape[1]]


def quantize_blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [e, M, K] to fp8 e4m3 with one scale for each block of 128 x 128, fp32 [e, M / 128, K / 128]."""
    e, M, K = weights.shape
    padded = torch.nn.functional.pad(weights.float(), (0, -K % BLOCK, 0, -M % BLOCK))
    blocks = padded.view(e, -(-M // BLOCK), BLOCK, -(-K // BLOCK), BLOCK)
    scales = (blocks.abs().amax((2, 4)) / FP8_MAX).clamp(min=1e-12)
    quantized = (blocks / scales[:, :, None, :, None]).reshape(padded.shape)[:, :M, :K]
    return quantized.to(FP8), scales


def dequantize_blocks(data: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 from the results of `quantize_blocks`."""
    _, M, K = data.shape
    return data.float() * scales.repeat_interleave(BLOCK, 1)[:, :M].repeat_interleave(BLOCK, 2)[:, :, :K]


def meta_weights(format: str, e: int, M: int, K: int) -> ExpertWeights:
    """Return weights without storage, to compile for."""
    if format == "dense":
        return ExpertWeights(format=format, data=torch.empty(e, M, K, dtype=torch.bfloat16, device="meta"))
    if format in GROUPS:
        padded = K + -K % BLOCK
        return ExpertWeights(
            format=format,
            data=torch.empty(e, M, padded // 8, dtype=torch.int32, device="meta"),
            scales=torch.empty(e, padded // GROUPS[format], M, dtype=SCALES[format], device="meta"),
            global_scales=torch.empty(e, device="meta"),
            columns=K,
        )
    if format in SCALED:
        padded = K + -K % BLOCK
        sizes = (e, M, padded // 2), (e, padded // BLOCK, M, BLOCK // SCALED[format])
        dtypes = torch.uint8, FP8 if format == "nvfp4_x4" else torch.uint8
        data, scales = (
            torch.empty(size, dtype=dtype, device="meta") for size, dtype in zip(sizes, dtypes, strict=True)
        )
        return ExpertWeights(format=format, data=data, scales=scales, columns=K)
    data = torch.empty(e, M, K, dtype=FP8, device="meta")
    shape = (e, M) if format == "fp8_row" else (e, -(-M // BLOCK), -(-K // BLOCK))
    return ExpertWeights(format=format, data=data, scales=torch.empty(shape, device="meta"))


def meta_rows(format: str, N: int, K: int, tiled_rows: int) -> tuple[Tensor, Tensor | None]:
    """Return rows of x and their scales, without storage."""
    if format in SCALED:
        sizes = (N, K // 2 if format == "nvfp4_x4" else K), (N, K // SCALED[format])
        dtypes = (torch.uint8, FP8) if format == "nvfp4_x4" else (FP8, torch.uint8)
        x, scales = (torch.empty(size, dtype=dtype, device="meta") for size, dtype in zip(sizes, dtypes, strict=True))
        return x, scales
    if not format.startswith("fp8"):
        return torch.empty(N, K, dtype=torch.bfloat16, device="meta"), None
    shape = (N,) if format == "fp8_row" else (-(-K // BLOCK), tiled_rows)
    return torch.empty(N, K, dtype=FP8, device="meta"), torch.empty(shape, device="meta")


def quantize_scaled_rows(format: str, x_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what `block_scaled_mma.quantize_rows` must return."""
    kind = KINDS[format][1]
    if kind == "e4m3":
        return *quantize_scaled(kind, x_NK), None
    row_scales = x_NK.float().abs().amax(1).clamp(min=2.0**-100) / (FP8_MAX * 6.0)
    numbers, scales = quantize_scaled(kind, x_NK.float() / row_scales[:, None])
    return pack_rows(numbers), scales, row_scales


def quantize_scaled(kind: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise [..., K] to numbers and scales [..., K / group].

    Numbers are fp8 [..., K] ("e4m3") or e2m1 codes u8 [..., K] ("e2m1") with exponents as scales,
    or e2m1 codes with fp8 scales ("nvfp4").
    """
    group = 16 if kind == "nvfp4" else 32
    groups = values.float().unflatten(-1, (-1, group))
    largest, most = groups.abs().amax(-1), FP8_MAX if kind == "e4m3" else 6.0
    if kind == "nvfp4":
        scales = (largest / most).to(FP8)
    else:
        mantissa, exponent = torch.frexp(largest.clamp(min=2.0**-100) / most)
        scales = (exponent - (mantissa == 0.5).int() + 127).to(torch.uint8)
    scaled = groups / scale_values(scales).clamp(min=1e-30)[..., None]
    if kind == "e4m3":
        return scaled.flatten(-2).to(FP8), scales
    magnitudes = torch.tensor(E2M1, device=values.device)
    codes = (scaled.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    return codes.to(torch.uint8).flatten(-2), scales


def dequantize_scaled(numbers: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 from the results of `quantize_scaled`."""
    values = numbers.float()
    if numbers.dtype == torch.uint8:
        magnitudes = torch.tensor(E2M1, device=numbers.device)[(numbers & 7).long()]
        values = torch.where(numbers > 7, -magnitudes, magnitudes)
    return values * scale_values(scales).repeat_interleave(numbers.shape[-1] // scales.shape[-1], -1)


def scale_values(scales: Tensor) -> Tensor:
    """Return fp32 from exponents u8 or fp8."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def pack_rows(numbers: Tensor) -> Tensor:
    """Return fp8 rows, or e2m1 codes u8 [N, K], as the kernels take them."""
    return numbers if numbers.dtype == FP8 else numbers[:, 0::2] | numbers[:, 1::2] << 4
