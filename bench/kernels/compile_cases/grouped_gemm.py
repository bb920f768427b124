"""Compile cases of the experts' grouped GEMMs, their tile maps, and quantisation of their rows."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from expertwire.bench.kernels import reference_formats
from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import block_scaled_mma, formats, grouped_gemm, grouped_gemm_tiles, quantize
from expertwire.kernels.gpu.dependent_launch import PDL
from expertwire.kernels.gpu.device import B200, H200
from expertwire.kernels.ops.experts import Activation
from expertwire.kernels.ops.permute import TileMap, max_tiles
from expertwire.kernels.ops.quantize import GROUP

SHAPES = {  # experts on a rank, D, F
    "qwen3-30b": (128, 2048, 768),
    "mixtral-8x7b": (8, 4096, 14336),
    "deepseek-v3-ep8": (32, 7168, 2048),
    "gpt-oss-120b": (128, 2880, 2880),
    "kimi-k2-ep8": (48, 7168, 2048),
}


def _grouped_gemm_case(format: str, shape: str, planned: int, activation: Activation | None) -> Case:
    num_experts, D, F = SHAPES[shape]
    M, K = (2 * F if activation.gated else F, D) if activation else (D, F)
    weights = reference_formats.meta_weights(format, num_experts, M, K)
    tokens = grouped_gemm_tiles.token_tile(format, planned, num_experts)
    config = grouped_gemm_tiles.tile_config(
        format, tokens, (num_experts, M, K), planned, B200 if format in formats.SCALED else H200
    )

    def meta(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    rows = grouped_gemm_tiles.RoutedRows(
        row_index_R=meta(planned),
        home_R=meta(planned),
        expert_offsets=meta(num_experts + 1),
        planned=planned,
        tile_map=TileMap(meta(num_experts + 1), meta(planned), tokens),
    )
    x, x_scales = reference_formats.meta_rows(format, planned, K, rows.tile_map.rows)
    out = meta(planned, F if activation else D, dtype=torch.bfloat16)
    bias = meta(num_experts, M, dtype=torch.bfloat16) if shape.startswith("gpt-oss") else None
    row_scales = torch.empty(planned, device="meta") if format == "nvfp4_x4" else None
    args, constexprs = grouped_gemm.arguments(config, (x, x_scales, row_scales), rows, weights, bias, out, activation)
    which = f"w13 {activation.kind}" if activation else "w2"
    expect = {90: "QGMMA" if format.startswith("fp8") else "HGMMA", 100: "UTC"}
    name = f"grouped_gemm.{which} {format} {shape} {tokens}x{config.rows}"
    if format in formats.SCALED:
        expect = {100: "UTCOMMA" if format == "nvfp4_x4" else "UTCQMMA"}
    return Case(
        name=name,
        kernel=grouped_gemm.grouped_gemm_kernel,
        args=args,
        constexprs=constexprs,
        expect=expect,
        options=config.options,
        blocks_per_sm=config.blocks_per_sm,
        store_bytes=16 if config.rows == 128 else 8,
        narrow_copies=format == "fp8_block" or format in formats.SCALED,
    )


def grouped_gemm_cases() -> list[Case]:
    """Return formats where they are used, with every tile of each."""
    swiglu, clamped, relu2 = Activation(), Activation("swiglu_clamped"), Activation("relu2")
    found = []
    for format, shape, activation in (
        ("dense", "qwen3-30b", swiglu),
        ("fp8_block", "deepseek-v3-ep8", swiglu),
        ("fp8_row", "mixtral-8x7b", swiglu),
        ("int4", "kimi-k2-ep8", swiglu),
        ("mxfp4", "gpt-oss-120b", clamped),
        ("nvfp4", "qwen3-30b", swiglu),
    ):
        num_experts = SHAPES[shape][0]
        for mean in (1 / 32, 8, 16, 32, 256, 1024)[: 6 if format == "dense" else 5]:
            planned = max(1, int(mean * num_experts))
            found.append(_grouped_gemm_case(format, shape, planned, activation))
            found.append(_grouped_gemm_case(format, shape, planned, None))
    for format, shape, activation in (
        ("mxfp4_x8", "gpt-oss-120b", clamped),
        ("nvfp4_x4", "deepseek-v3-ep8", swiglu),
    ):
        for planned in (mean * SHAPES[shape][0] for mean in (1, 16, 32, 256)):
            found.append(_grouped_gemm_case(format, shape, planned, activation))
            found.append(_grouped_gemm_case(format, shape, planned, None))
    found += [_grouped_gemm_case("dense", "gpt-oss-120b", planned, clamped) for planned in (128, 16384)]
    found += [_grouped_gemm_case("dense", "deepseek-v3-ep8", planned, relu2) for planned in (32, 4096)]
    return list({case.name: case for case in found}.values())


def grouped_gemm_tiles_cases() -> list[Case]:
    metadata = [
        Case(
            name=f"grouped_gemm_tiles.build_tile_map experts{num_experts} tokens{tokens}",
            kernel=grouped_gemm_tiles.tile_map_kernel,
            args={
                "offsets_ptr": torch.int32,
                "first_tile_ptr": torch.int32,
                "tile_expert_ptr": torch.int32,
                "num_experts": num_experts,
                "bound": max_tiles(32768, num_experts, tokens),
            },
            constexprs=grouped_gemm_tiles.constexprs(num_experts, tokens),
            options=PDL,
            wide=False,
        )
        for num_experts, tokens in ((8, 256), (384, 128))
    ]
    offsets, index = (torch.empty(size, dtype=torch.int32, device="meta") for size in (33, 2048))
    scales = [
        Case(
            name=f"grouped_gemm_tiles.tile_scales tokens{tokens}",
            kernel=grouped_gemm_tiles.tile_scales_kernel,
            args=grouped_gemm_tiles.scale_arguments(
                torch.empty(256, 56, device="meta"),
                row_index,
                offsets,
                TileMap(offsets, index, tokens),
                torch.empty(56, 2048 * tokens, device="meta"),
            ),
            constexprs={"TOKENS": tokens, "GROUPS": 8},
            options=PDL,
            wide=False,
        )
        for tokens, row_index in ((16, index), (128, None))
    ]
    quantised = [
        Case(
            name=f"grouped_gemm_tiles.quantize_tiles tokens{tokens}",
            kernel=grouped_gemm_tiles.quantize_tiles_kernel,
            args=grouped_gemm_tiles.quantize_arguments(
                torch.empty(4096, 2048, dtype=torch.bfloat16, device="meta"),
                torch.empty(4096, 2048, dtype=torch.float8_e4m3fn, device="meta"),
                torch.empty(16, 288 * tokens, device="meta"),
                offsets,
                TileMap(offsets, index, tokens),
            ),
            constexprs={"TOKENS": tokens, "GROUP": GROUP},
            num_warps=grouped_gemm_tiles.quantize_warps(tokens),
            options=PDL,
        )
        for tokens in (16, 128)
    ]
    return metadata + scales + quantised


def quantize_cases() -> list[Case]:
    forms = {"quantize": (False, GROUP), "quantize rows": (False, 0), "silu_mul": (True, 1)}  # gated, group
    found = []
    for form, (gated, group) in forms.items():
        for width in (2048, 768) if gated else (7168, 2048):
            columns = quantize.columns_of(width, group)
            found.append(
                Case(
                    name=f"quantize.{form} D{width}",
                    kernel=quantize.quantize_kernel,
                    args={
                        "x_ptr": torch.bfloat16,
                        "values_ptr": torch.bfloat16 if gated else torch.float8_e4m3fn,
                        "scales_ptr": torch.float32,
                        **dict.fromkeys(
                            ("index_ptr", "num_rows_ptr"),
                            torch.int32 if form.startswith("quantize") and width == 2048 else None,
                        ),
                        "width": width,
                    },
                    constexprs={"GATED": gated, "GROUP": group, "COLUMNS": columns},
                    num_warps=quantize.warps_of(columns),
                    options=PDL,
                    blocks_per_sm=2,
                )
            )
    return found


def block_scaled_mma_cases() -> list[Case]:
    """Return the quantisation of rows; the products are cases of `grouped_gemm`."""
    return [
        Case(
            name=f"block_scaled_mma.quantize_rows {format} D{width}",
            kernel=block_scaled_mma.quantize_rows_kernel,
            args={
                "x_ptr": torch.bfloat16,
                "values_ptr": formats.FP8 if format == "mxfp4_x8" else torch.int32,
                "scales_ptr": torch.uint8 if format == "mxfp4_x8" else torch.int32,
                "row_scales_ptr": None if format == "mxfp4_x8" else torch.float32,
                "index_ptr": num_rows,
                "num_rows_ptr": num_rows,
                "width": width,
            },
            constexprs={
                "KIND": block_scaled_mma.KINDS[format][1],
                "GROUP": formats.SCALED[format],
                "COLUMNS": triton.next_power_of_2(width),
            },
            num_warps=block_scaled_mma.warps_of(triton.next_power_of_2(width)),
            options=PDL,
            expect={100: ""},
            store_bytes=8,
        )
        for format in formats.SCALED
        for width, num_rows in ((2880, None), (7168, None), (2048, torch.int32))
    ]


def cases() -> list[Case]:
    return [*grouped_gemm_cases(), *grouped_gemm_tiles_cases(), *quantize_cases(), *block_scaled_mma_cases()]
