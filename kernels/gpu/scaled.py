"""Products of operands that both come with a scale for 16 or 32 columns: MXFP4 by MXFP8 (OCP Microscaling 1.0), NVFP4; and the
quantisation of rows that meet such weights.

Blackwell's tensor cores take numbers and scales as they are. Elsewhere, in the interpreter too, the kernel makes fp32 numbers of
them: of at most 8 significant bits, which TF32 products leave as they are. 128 rows of weights are what the native instruction
takes, for any number of tokens.

NVFP4 rows have a second scale each, fp32, as weights have one a matrix: an fp8 scale alone cannot be as small as some rows are. A
row's numbers depend on nothing but the row.

e experts, M rows of a weight matrix, K its columns, N rows of x, S scales of a step and a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu import formats
from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.formats import BLOCK, E2M1, FP8, FP8_MAX, SCALED, ExpertWeights
from expertwire.kernels.gpu.product import load_x
from expertwire.kernels.gpu.quantize import MOST_PROGRAMS

_LEAST, _FP8_MAX = tl.constexpr(2.0**-100), tl.constexpr(FP8_MAX)
FORMATS = {"mxfp4": "mxfp4_x8", "nvfp4": "nvfp4_x4"}  # of a checkpoint's weights, where rows are quantised for them
NVFP4_COLUMNS = 64  # whose scales are stored as a word: rows have a multiple of them
KINDS = {"mxfp4_x8": ("e2m1", "e4m3"), "nvfp4_x4": ("nvfp4", "nvfp4")}  # of weights and x


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
    W_KIND: tl.constexpr = "e2m1"
    X_KIND: tl.constexpr = "e2m1" if FORMAT == "nvfp4_x4" else "e4m3"
    GROUP: tl.constexpr = 16 if FORMAT == "nvfp4_x4" else 32
    S: tl.constexpr = BLOCK_K // GROUP
    W_BYTES: tl.constexpr = BLOCK_K // 2
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


@triton.jit
def _magnitudes_to_codes(magnitudes):
    """The nearest of e2m1's 0, 0.5, 1, 1.5, 2, 3, 4, 6, the smaller of two that are as near: its three bits."""
    codes = (magnitudes > 0.25).to(tl.int32) + (magnitudes > 0.75).to(tl.int32) + (magnitudes > 1.25).to(tl.int32)
    codes += (magnitudes > 1.75).to(tl.int32) + (magnitudes > 2.5).to(tl.int32)
    return codes + (magnitudes > 3.5).to(tl.int32) + (magnitudes > 5.0).to(tl.int32)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    values_ptr,  # words of eight for "nvfp4"
    scales_ptr,  # words of four for "nvfp4"
    row_scales_ptr,  # None for "e4m3"
    num_rows_ptr,
    width,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`num_rows`: how many there are, else a row for each program."""
    wait_for_previous()
    num_rows = tl.num_programs(0) if num_rows_ptr is None else tl.load(num_rows_ptr)
    GROUPS: tl.constexpr = COLUMNS // GROUP
    d, group = tl.arange(0, COLUMNS), tl.arange(0, GROUPS)
    for r in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        x = tl.reshape(tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32), GROUPS, GROUP)
        largest = tl.max(tl.abs(x), axis=1)
        if KIND == "e4m3":
            # The least power of two that brings the largest number within e4m3's range.
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
    *,
    value_dtype: torch.dtype = FP8,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return rows as weights of a format of `formats.SCALED` take them, their scales and, for "nvfp4_x4", the rows' own fp32 [N].

    As `quantise_rows`. `num_rows`: i32 [1], rows from there on stay undefined. `value_dtype`: of "mxfp4_x8"; fp32 leaves
    values unrounded.
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
        programs = num if num_rows is None else min(num, MOST_PROGRAMS)
        quantize_rows_kernel[(programs,)](
            x_NK,
            values.view(torch.int32) if nvfp4 else values,
            scales.view(torch.int32 if nvfp4 else torch.uint8),
            row_scales,
            num_rows,
            width,
            KIND=kind,
            GROUP=group,
            COLUMNS=columns,
            num_warps=_warps(columns),
            **EARLY,
        )
    return values, scales, row_scales


def _warps(columns: int) -> int:
    return min(16, max(1, columns // 512))


def quantise_rows(format: str, x_NK: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference of `quantize_rows`."""
    kind = KINDS[format][1]
    if kind == "e4m3":
        return *quantise(kind, x_NK), None
    row_scales = x_NK.float().abs().amax(1).clamp(min=2.0**-100) / (FP8_MAX * 6.0)
    numbers, scales = quantise(kind, x_NK.float() / row_scales[:, None])
    return rows(numbers), scales, row_scales


def pack_weight(
    format: str, codes: Tensor, scales: Tensor, global_scales: Tensor | None = None, *, gated: bool = False
) -> ExpertWeights:
    """As `formats.pack4`, for rows that are quantised, too: in the format of `FORMATS`."""
    return pack(FORMATS[format], codes, scales, global_scales, gated=gated)


def pack(
    format: str, numbers: Tensor, scales: Tensor, global_scales: Tensor | None = None, *, gated: bool = False
) -> ExpertWeights:
    """e2m1 codes u8 [e, M, K] and their scales [e, M, K / group] -> weights of a format of `formats.SCALED`.

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


def quantise(kind: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> fp8 [..., K] ("e4m3") or e2m1 codes u8 [..., K] ("e2m1") by exponents, or e2m1 codes by fp8 scales ("nvfp4"),
    and the scales [..., K / group]; a reference."""
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


def cases() -> list[Case]:
    """The products are `grouped_gemm`'s."""
    return [
        Case(
            name=f"scaled.quantize_rows {format} D{width}",
            kernel=quantize_rows_kernel,
            args={
                "x_ptr": torch.bfloat16,
                "values_ptr": FP8 if format == "mxfp4_x8" else torch.int32,
                "scales_ptr": torch.uint8 if format == "mxfp4_x8" else torch.int32,
                "row_scales_ptr": None if format == "mxfp4_x8" else torch.float32,
                "num_rows_ptr": num_rows,
                "width": width,
            },
            constexprs={"KIND": KINDS[format][1], "GROUP": SCALED[format], "COLUMNS": triton.next_power_of_2(width)},
            num_warps=_warps(triton.next_power_of_2(width)),
            options=EARLY,
            expect={100: ""},
            store_bytes=8,
        )
        for format in SCALED
        for width, num_rows in ((2880, None), (7168, None), (2048, torch.int32))
    ]
