"""Products of operands that both come with a scale for 16 or 32 columns: MXFP8, MXFP4 by MXFP8 (OCP Microscaling 1.0), NVFP4.

Blackwell's tensor cores take numbers and scales as they are. Elsewhere, in the interpreter too, the kernel makes fp32 numbers of
them: of at most 8 significant bits, which TF32 products leave as they are. 128 rows of weights are what the native instruction
takes, for any number of tokens.

e experts, M rows of a weight matrix, K its columns, N rows of x, S scales of a step and a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu import formats
from expertwire.kernels.gpu.formats import BLOCK, E2M1, FP8, FP8_MAX, SCALED, ExpertWeights
from expertwire.kernels.gpu.product import load_x

KINDS = {"mxfp8": ("e4m3", "e4m3"), "mxfp4_x8": ("e2m1", "e4m3"), "nvfp4_x4": ("nvfp4", "nvfp4")}  # of weights and x


@triton.jit
def _numbers(block, KIND: tl.constexpr):
    """fp32 [ROWS, COLUMNS] of fp8 numbers, or of bytes of two e2m1 numbers, the lower half first."""
    if KIND == "e4m3":
        return block.to(tl.float32)
    else:
        ROWS: tl.constexpr = block.shape[0]
        COLUMNS: tl.constexpr = 2 * block.shape[1]
        codes = tl.join(block & 15, block >> 4).reshape(ROWS, COLUMNS).to(tl.int32)
        # Exponent and mantissa where fp32 has its own: 2^126 times too small.
        magnitudes = ((codes & 7) << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37
        return tl.where(codes > 7, -magnitudes, magnitudes)


@triton.jit
def _scaled(block, scale, KIND: tl.constexpr, GROUP: tl.constexpr):
    """fp32 [ROWS, COLUMNS]: numbers times their scales [ROWS, S], exponents if GROUP is 32, else fp8."""
    ROWS: tl.constexpr = scale.shape[0]
    S: tl.constexpr = scale.shape[1]
    factor = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) if GROUP == 32 else scale.to(tl.float32)
    numbers = _numbers(block, KIND).reshape(ROWS, S, GROUP) * factor[:, :, None]
    return numbers.reshape(ROWS, S * GROUP)


@triton.jit
def scaled_product(
    w_desc,
    w_scale,
    x,
    x_scale,
    source,
    expert,
    block,
    row,
    exists,
    M,
    K,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
    GATHER: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `product.product`, for the formats of `formats.SCALED`."""
    W_KIND: tl.constexpr = "e4m3" if FORMAT == "mxfp8" else "e2m1"
    X_KIND: tl.constexpr = "e2m1" if FORMAT == "nvfp4_x4" else "e4m3"
    GROUP: tl.constexpr = 16 if FORMAT == "nvfp4_x4" else 32
    S: tl.constexpr = BLOCK_K // GROUP
    W_BYTES: tl.constexpr = BLOCK_K if W_KIND == "e4m3" else BLOCK_K // 2
    X_BYTES: tl.constexpr = BLOCK_K if X_KIND == "e4m3" else BLOCK_K // 2
    m, s = block * ROWS + tl.arange(0, ROWS), tl.arange(0, S)
    w_scale += expert.to(tl.int64) * tl.cdiv(K, BLOCK_K) * M * S + (m[:, None] * S + s[None, :])
    x_scale += source.to(tl.int64)[:, None] * (K // GROUP) + s[None, :]
    x_columns = tl.multiple_of(K * X_BYTES // BLOCK_K, 16)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        step = k // BLOCK_K
        w_block = w_desc.load([expert, block * ROWS, step * W_BYTES]).reshape(ROWS, W_BYTES)
        x_block = load_x(x, x_columns, source, row, step * X_BYTES, exists, x_columns, GATHER, X_BYTES)
        scale_w = tl.load(w_scale + step * M * S, mask=(m < M)[:, None], other=0.0)
        inside = exists[:, None] & (step * S + s < K // GROUP)[None, :]
        scale_x = tl.load(x_scale + step * S, mask=inside, other=0.0)
        if NATIVE:
            acc = tl.dot_scaled(w_block, scale_w, W_KIND, tl.trans(x_block), scale_x, X_KIND, acc)
        else:
            w_block, x_block = _scaled(w_block, scale_w, W_KIND, GROUP), _scaled(x_block, scale_x, X_KIND, GROUP)
            acc = tl.dot(w_block, tl.trans(x_block), acc, input_precision="tf32")
    return acc


def pack(
    format: str, numbers: Tensor, scales: Tensor, global_scales: Tensor | None = None, *, gated: bool = False
) -> ExpertWeights:
    """fp8 [e, M, K], or e2m1 codes u8, and their scales [e, M, K / group] -> weights of a format of `formats.SCALED`.

    `global_scales`: fp32 [e], of weights and x together. `gated`: gate rows over up rows.
    """
    e, M, K = numbers.shape
    group = SCALED[format]
    assert scales.shape == (e, M, K // group), (format, numbers.shape, scales.shape)
    assert K % group == 0 and scales.itemsize == numbers.itemsize == 1, (K, scales.dtype, numbers.dtype)  # noqa: PT018
    dtypes = numbers.dtype, scales.dtype
    data, scales = numbers.view(torch.uint8), scales.view(torch.uint8)
    if gated:
        data, scales = formats.interleave(data), formats.interleave(scales)
    data, scales = (torch.nn.functional.pad(t, (0, -K % BLOCK // (K // t.shape[2]))) for t in (data, scales))
    data = data if format == "mxfp8" else data[..., 0::2] | data[..., 1::2] << 4
    steps = scales.view(e, M, -1, BLOCK // group).transpose(1, 2).contiguous()
    return ExpertWeights(
        format=format,
        data=data.contiguous().view(dtypes[0]),
        scales=steps.view(dtypes[1]),
        global_scales=global_scales,
        columns=K,
    )


def quantise(kind: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> fp8 [..., K] ("e4m3") or e2m1 codes u8 [..., K] ("e2m1") by exponents, or e2m1 codes by fp8 scales ("nvfp4"),
    and the scales [..., K / group]; a reference."""
    group = 16 if kind == "nvfp4" else 32
    groups = values.float().unflatten(-1, (-1, group))
    largest, most = groups.abs().amax(-1), FP8_MAX if kind == "e4m3" else 6.0
    if kind == "nvfp4":
        scales = (largest / most).to(FP8)
    else:
        scales = (torch.log2(largest.clamp(min=2.0**-100) / most).ceil() + 127).to(torch.uint8)
    scaled = groups / scale_values(scales).clamp(min=1e-30)[..., None]
    if kind == "e4m3":
        return scaled.flatten(-2).to(FP8), scales
    magnitudes = torch.tensor(E2M1, device=values.device)
    codes = (scaled.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    return codes.to(torch.uint8).flatten(-2), scales


def dequantise(numbers: Tensor, scales: Tensor) -> Tensor:
    """fp32 of what `quantise` returned."""
    values = numbers.float()
    if numbers.dtype == torch.uint8:
        magnitudes = torch.tensor(E2M1, device=numbers.device)[(numbers & 7).long()]
        values = torch.where(numbers > 7, -magnitudes, magnitudes)
    return values * scale_values(scales).repeat_interleave(numbers.shape[-1] // scales.shape[-1], -1)


def scale_values(scales: Tensor) -> Tensor:
    """fp32 of exponents u8, or fp8."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def rows(numbers: Tensor) -> Tensor:
    """fp8 rows, or e2m1 codes u8 [N, K], as the kernels take them."""
    return numbers if numbers.dtype == FP8 else numbers[:, 0::2] | numbers[:, 1::2] << 4
