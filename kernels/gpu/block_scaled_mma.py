"""Block-scaled MMA: operands with a scale for 16 or 32 columns, MXFP4 by MXFP8 (OCP Microscaling 1.0)
and NVFP4 by NVFP4.

Also the quantisation of rows that meet such weights. Blackwell's tensor cores take numbers and
scales as they are. Elsewhere, and in the interpreter, the kernel converts them to fp32 numbers of
at most 8 significant bits, which TF32 products do not round. The native instruction takes 128 rows
of weights, for any number of tokens.

NVFP4 rows have a second scale each, fp32, as weights have one a matrix: an fp8 scale alone cannot
be as small as some rows are. A row's numbers depend on nothing but the row.

e experts, M rows of a weight matrix, K its columns, N rows of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu import formats
from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.formats import BLOCK, FP8, FP8_MAX, SCALED, ExpertWeights
from expertwire.kernels.gpu.gemm_tile import load_x
from expertwire.kernels.gpu.quantize import MAX_PROGRAMS

_LEAST, _FP8_MAX = tl.constexpr(2.0**-100), tl.constexpr(FP8_MAX)
FORMATS = {"mxfp4": "mxfp4_x8", "nvfp4": "nvfp4_x4"}  # of a checkpoint -> of the product
NVFP4_COLUMNS = 64  # their scales are stored as one word, so widths are multiples
KINDS = {"mxfp4_x8": ("e2m1", "e4m3"), "nvfp4_x4": ("nvfp4", "nvfp4")}  # of weights and x


@triton.jit
def _numbers(block, KIND: tl.constexpr):
    """Return fp32 [ROWS, COLUMNS] of fp8 numbers, or of bytes of two e2m1 numbers, the lower half first."""
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
    """Return fp32 [ROWS, COLUMNS]: numbers times their scales [ROWS, SCALES], exponents if GROUP is 32, else fp8."""
    ROWS: tl.constexpr = scale.shape[0]
    SCALES: tl.constexpr = scale.shape[1]
    factor = (scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) if GROUP == 32 else scale.to(tl.float32)
    numbers = _numbers(block, KIND).reshape(ROWS, SCALES, GROUP) * factor[:, :, None]
    return numbers.reshape(ROWS, SCALES * GROUP)


@triton.jit
def multiply_scaled_tile(
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
    """Compute `gemm_tile.multiply_tile` for the formats of `formats.SCALED`."""
    W_KIND: tl.constexpr = "e2m1"
    X_KIND: tl.constexpr = "e2m1" if FORMAT == "nvfp4_x4" else "e4m3"
    GROUP: tl.constexpr = 16 if FORMAT == "nvfp4_x4" else 32
    SCALES: tl.constexpr = BLOCK_K // GROUP
    W_BYTES: tl.constexpr = BLOCK_K // 2
    X_BYTES: tl.constexpr = BLOCK_K if X_KIND == "e4m3" else BLOCK_K // 2
    m, s = block * ROWS + tl.arange(0, ROWS), tl.arange(0, SCALES)
    w_scale += expert.to(tl.int64) * tl.cdiv(K, BLOCK_K) * M * SCALES + (m[:, None] * SCALES + s[None, :])
    x_scale += source.to(tl.int64)[:, None] * (K // GROUP) + s[None, :]
    x_columns = tl.multiple_of(K * X_BYTES // BLOCK_K, 16)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        step = k // BLOCK_K
        w_block = w_desc.load([expert, block * ROWS, step * W_BYTES]).reshape(ROWS, W_BYTES)
        x_block = load_x(x, x_columns, source, row, step * X_BYTES, exists, x_columns, GATHER, X_BYTES)
        scale_w = tl.load(w_scale + step * M * SCALES, mask=(m < M)[:, None], other=0.0)
        inside = exists[:, None] & (step * SCALES + s < K // GROUP)[None, :]
        scale_x = tl.load(x_scale + step * SCALES, mask=inside, other=0.0)
        if NATIVE:
            acc = tl.dot_scaled(w_block, scale_w, W_KIND, tl.trans(x_block), scale_x, X_KIND, acc)
        else:
            w_block, x_block = _scaled(w_block, scale_w, W_KIND, GROUP), _scaled(x_block, scale_x, X_KIND, GROUP)
            acc = tl.dot(w_block, tl.trans(x_block), acc, input_precision="tf32")
    return acc


@triton.jit
def _magnitudes_to_codes(magnitudes):
    """Return the three bits of the nearest of e2m1's 0, 0.5, 1, 1.5, 2, 3, 4, 6; ties go to the smaller."""
    codes = (magnitudes > 0.25).to(tl.int32) + (magnitudes > 0.75).to(tl.int32) + (magnitudes > 1.25).to(tl.int32)
    codes += (magnitudes > 1.75).to(tl.int32) + (magnitudes > 2.5).to(tl.int32)
    return codes + (magnitudes > 3.5).to(tl.int32) + (magnitudes > 5.0).to(tl.int32)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    values_ptr,  # words of eight for "nvfp4"
    scales_ptr,  # words of four for "nvfp4"
    row_scales_ptr,  # None for "e4m3"
    index_ptr,
    num_rows_ptr,
    width,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid (programs,): quantise `num_rows` rows, or one for each program; those of `index`, else the first ones."""
    wait_for_previous_kernel()
    num_rows = tl.num_programs(0) if num_rows_ptr is None else tl.load(num_rows_ptr)
    GROUPS: tl.constexpr = COLUMNS // GROUP
    d, group = tl.arange(0, COLUMNS), tl.arange(0, GROUPS)
    for r in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64) if index_ptr is None else tl.load(index_ptr + r).to(tl.int64)
        x = tl.reshape(tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32), GROUPS, GROUP)
        largest = tl.max(tl.abs(x), axis=1)
        if KIND == "e4m3":
            # The smallest power of two that brings the largest number into e4m3's range.
            bits = tl.div_rn(tl.maximum(largest, _LEAST), _FP8_MAX).to(tl.int32, bitcast=True)
            scale = (bits + 0x7FFFFF) >> 23
            values = x * ((254 - scale) << 23).to(tl.float32, bitcast=True)[:, None]
            values = tl.reshape(values, COLUMNS).to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + row * width + d, values, mask=d < width)
            at = scales_ptr + row * (width // GROUP) + group
            tl.store(at, scale.to(tl.uint8), mask=group < width // GROUP)
        else:
            row_scale = tl.div_rn(tl.maximum(tl.max(largest, axis=0), _LEAST), _FP8_MAX * 6.0)
            tl.store(row_scales_ptr + row, row_scale)
            # e4m3 has the upper bits of fp32 numbers that are 2^120 times too small, here rounded to the nearest, ties to even.
            bits = (largest / (row_scale * 6.0) * 7.52316384526264e-37).to(tl.int32, bitcast=True)
            scale = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
            unit = (scale << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36 * row_scale
            inverse = 1.0 / tl.where(unit > 0, unit, float("inf"))
            magnitudes = tl.abs(x) * inverse[:, None]
            codes = tl.reshape(_magnitudes_to_codes(magnitudes) + tl.where(x < 0, 8, 0), COLUMNS // 8, 8)
            words = tl.sum(codes << 4 * tl.arange(0, 8)[None, :], axis=1)
            w = tl.arange(0, COLUMNS // 8)
            tl.store(values_ptr + row * (width // 8) + w, words, mask=w < width // 8)
            words = tl.sum(tl.reshape(scale, GROUPS // 4, 4) << 8 * tl.arange(0, 4)[None, :], axis=1)
            w = tl.arange(0, GROUPS // 4)
            tl.store(scales_ptr + row * (width // (4 * GROUP)) + w, words, mask=w < width // (4 * GROUP))


def quantize_rows(
    format: str,
    x_NK: Tensor,
    num_rows: Tensor | None = None,
    index: Tensor | None = None,
    *,
    value_dtype: torch.dtype = FP8,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return rows as weights of a format of `formats.SCALED` take them, their scales and, for
    "nvfp4_x4", the rows' own scales fp32 [N].

    `bench.kernels.reference_formats.quantize_scaled_rows` is the reference. `num_rows`: i32 [1],
    rows from there on stay undefined. `index`: i32, the rows to quantise, of which the first `num_rows`
    count. `value_dtype`: of "mxfp4_x8"; fp32 leaves values unrounded.
    """
    num, width = x_NK.shape
    kind, group = KINDS[format][1], SCALED[format]
    nvfp4 = kind == "nvfp4"
    assert width % (NVFP4_COLUMNS if nvfp4 else group) == 0, x_NK.shape
    assert x_NK.is_contiguous(), x_NK.stride()
    values = x_NK.new_empty(num, width // 2 if nvfp4 else width, dtype=torch.uint8 if nvfp4 else value_dtype)
    scales = x_NK.new_empty(num, width // group, dtype=FP8 if nvfp4 else torch.uint8)
    row_scales = x_NK.new_empty(num, dtype=torch.float32) if nvfp4 else None
    if num:
        columns = triton.next_power_of_2(width)
        most = num if index is None else len(index)
        programs = most if num_rows is None else min(most, MAX_PROGRAMS)
        quantize_rows_kernel[(programs,)](
            x_NK,
            values.view(torch.int32) if nvfp4 else values,
            scales.view(torch.int32 if nvfp4 else torch.uint8),
            row_scales,
            index,
            num_rows,
            width,
            KIND=kind,
            GROUP=group,
            COLUMNS=columns,
            num_warps=warps_of(columns),
            **PDL,
        )
    return values, scales, row_scales


def warps_of(columns: int) -> int:
    return min(16, max(1, columns // 1024))


def pack_weight(
    format: str, codes: Tensor, scales: Tensor, global_scales: Tensor | None = None, *, gated: bool = False
) -> ExpertWeights:
    """Do what `formats.pack4` does, in the format of `FORMATS` whose products take quantised rows."""
    return pack(FORMATS[format], codes, scales, global_scales, gated=gated)


def pack(
    format: str, numbers: Tensor, scales: Tensor, global_scales: Tensor | None = None, *, gated: bool = False
) -> ExpertWeights:
    """Return weights of a format of `formats.SCALED` from e2m1 codes u8 [e, M, K] and their scales [e,
    M, K / group].

    `global_scales`: fp32 [e]. `gated`: gate rows over up rows.
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
    data = data[..., 0::2] | data[..., 1::2] << 4
    steps = scales.view(e, M, -1, BLOCK // group).transpose(1, 2).contiguous()
    return ExpertWeights(
        format=format,
        data=data.contiguous().view(dtypes[0]),
        scales=steps.view(dtypes[1]),
        global_scales=global_scales,
        columns=K,
    )
