"""Grouped GEMMs of the experts; `kernels/ops/experts.py` defines them.

Weights are the left operand and tokens the columns of the product, so one instruction family with
one order of summation serves one row an expert as well as thousands: only the number of columns
changes, and no row's bits with it. Programs are persistent and take one tile after another; the
number of tiles is known to the device alone. Tiles that share weights follow one another.

M rows of a weight matrix, K its columns, D model width, F expert width, R rows that a rank receives, U distinct tokens of them,
N slots of the combine layout, e experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from expertwire.kernels.gpu import formats
from expertwire.kernels.gpu.block_scaled_mma import multiply_scaled_tile
from expertwire.kernels.gpu.dependent_launch import wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.formats import ExpertWeights
from expertwire.kernels.gpu.gemm_tile import activate, multiply_tile
from expertwire.kernels.gpu.grouped_gemm_tiles import GroupedGemmTileConfig, RoutedRows, locate, tile_config
from expertwire.kernels.ops.experts import Activation


@triton.jit
def _tile(
    w_desc,
    w_scale,
    w_global,
    x,
    x_stride,
    x_scale,
    x_scale_stride,
    x_row_scale,
    row_index_ptr,
    bias_ptr,
    home_ptr,
    out_ptr,
    expert,
    block,
    row,
    end,
    scale_column,
    M,
    K,
    out_width,
    alpha,
    limit,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Compute block `block` of the expert's weight rows times the tokens [row, min(row + TOKENS, end))."""
    GATHER: tl.constexpr = row_index_ptr is not None
    GATED: tl.constexpr = ACTIVATION.startswith("swiglu")
    OUT_ROWS: tl.constexpr = ROWS // 2 if GATED else ROWS
    token = row + tl.arange(0, TOKENS)
    exists = token < end
    source = tl.load(row_index_ptr + token, mask=exists, other=0) if GATHER else tl.minimum(token, end - 1)
    if SCALED:
        acc = multiply_scaled_tile(
            w_desc, w_scale, x, x_scale, source, expert, block, row, exists, M, K,
            FORMAT, NATIVE, GATHER, TOKENS, ROWS, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        acc = multiply_tile(
            w_desc, w_scale, x, x_stride, x_scale, x_scale_stride, source, expert, block, row, scale_column, exists, M, K,
            FORMAT, GATED, GATHER, TOKENS, ROWS, BLOCK_K, STAGES,
        )  # fmt: skip
    if w_global is not None:
        acc *= tl.load(w_global + expert)
    if x_row_scale is not None:
        acc *= tl.load(x_row_scale + source)[None, :]
    f = block * OUT_ROWS + tl.arange(0, OUT_ROWS)
    expert_bias = bias_ptr + expert.to(tl.int64) * M if bias_ptr is not None else None
    result = activate(acc, expert_bias, f, out_width, alpha, limit, ROWS, TOKENS, ACTIVATION)
    slot = tl.load(home_ptr + token, mask=exists, other=0) if home_ptr is not None else token
    out_ptrs = out_ptr + slot.to(tl.int64)[:, None] * out_width + f[None, :]
    tl.store(out_ptrs, tl.trans(result.to(out_ptr.dtype.element_ty)), mask=exists[:, None] & (f < out_width)[None, :])


@triton.jit
def grouped_gemm_kernel(
    w_desc,  # [e, M, K], tiles of ROWS x BLOCK_K
    w_scale,  # as `formats.ExpertWeights` has them
    w_global,
    x,  # pointer to [U, K], or without row_index a descriptor of [R, K], tiles of TOKENS x BLOCK_K
    x_tail,  # the same, tiles of TAIL x BLOCK_K
    x_stride,  # from one row to the next
    x_scale,  # a descriptor of `tile_scales` for "fp8_block", tiles of 1 x TOKENS; a pointer to [U or R], or one, for "fp8_row"
    x_scale_tail,  # the same, tiles of 1 x TAIL
    x_scale_stride,
    x_row_scale,  # pointer to fp32 [U or R] for "nvfp4_x4", or None
    row_index_ptr,
    offsets_ptr,
    first_tile_ptr,
    tile_expert_ptr,
    bias_ptr,
    home_ptr,
    out_ptr,
    M,
    K,
    out_width,
    alpha,
    limit,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,  # `Activation.kind`, or "" for w2
    TOKENS: tl.constexpr,
    TAIL: tl.constexpr,  # tokens of an expert's last tile if that is enough; 0: never
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    wait_for_previous_kernel()
    num_blocks = tl.cdiv(M, ROWS)
    num_items = tl.load(first_tile_ptr + w_desc.shape[0]) * num_blocks
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        expert, block, tile, row, end = locate(
            item, offsets_ptr, first_tile_ptr, tile_expert_ptr, num_blocks, TOKENS, GROUP
        )
        if TAIL > 0 and end - row <= TAIL:
            _tile(
                w_desc, w_scale, w_global, x_tail, x_stride, x_scale_tail, x_scale_stride, x_row_scale, row_index_ptr,
                bias_ptr, home_ptr, out_ptr,
                expert, block, row, end, tile * TOKENS, M, K, out_width, alpha, limit,
                FORMAT, ACTIVATION, TAIL, ROWS, BLOCK_K, STAGES, SCALED, NATIVE,
            )  # fmt: skip
        else:
            _tile(
                w_desc, w_scale, w_global, x, x_stride, x_scale, x_scale_stride, x_row_scale, row_index_ptr, bias_ptr, home_ptr,
                out_ptr,
                expert, block, row, end, tile * TOKENS, M, K, out_width, alpha, limit,
                FORMAT, ACTIVATION, TOKENS, ROWS, BLOCK_K, STAGES, SCALED, NATIVE,
            )  # fmt: skip


def w13(
    x_UD: Tensor,
    rows: RoutedRows,
    weights: ExpertWeights,
    activation: Activation,
    device: Device,
    *,
    bias_eF: Tensor | None = None,
    x_scales: Tensor | None = None,
    x_row_scales: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    reserved_sms: int = 0,
) -> Tensor:
    """Compute `experts.w13_reference`: gather rows and return the hidden layer [R, F]; rows after the
    last offset stay undefined.

    `weights`: rows interleaved if gated. `bias_eF`: gate before up. `x_scales`: fp32, for fp8 rows,
    which need an `out_dtype`. `x_row_scales`: fp32 [U], by which results are multiplied.
    `reserved_sms`: multiprocessors left free; no result depends on it.
    """
    M = weights.shape[1]
    width = M // 2 if activation.gated else M
    hidden_RF = x_UD.new_empty(len(rows.row_index_R), width, dtype=out_dtype or x_UD.dtype)
    x_scaled = x_UD, x_scales, x_row_scales
    _launch(x_scaled, rows, weights, bias_eF, hidden_RF, activation, device, reserved_sms)
    return hidden_RF


def w2(
    hidden_RF: Tensor,
    rows: RoutedRows,
    weights: ExpertWeights,
    out_ND: Tensor,
    device: Device,
    *,
    bias_eD: Tensor | None = None,
    x_scales: Tensor | None = None,
    x_row_scales: Tensor | None = None,
    reserved_sms: int = 0,
) -> Tensor:
    """Compute `experts.w2_reference`: write each row into its slot of `out_ND` and return that; other
    slots stay as they are.
    """
    assert len(hidden_RF) == len(rows.home_R), (hidden_RF.shape, rows.home_R.shape)
    assert out_ND.shape[1] == weights.shape[1], (out_ND.shape, weights.shape)
    x_scaled = hidden_RF, x_scales, x_row_scales
    _launch(x_scaled, rows, weights, bias_eD, out_ND, None, device, reserved_sms)
    return out_ND


def _launch(
    x_scaled: tuple[Tensor, Tensor | None, Tensor | None],
    rows: RoutedRows,
    weights: ExpertWeights,
    bias: Tensor | None,
    out: Tensor,
    activation: Activation | None,
    device: Device,
    reserved_sms: int,
) -> None:
    x = x_scaled[0]
    if x.shape[0] == 0 or len(rows.row_index_R) == 0:
        return
    if weights.format in formats.SCALED and x.is_cuda and device.arch < 100:
        allowed = [format for format in formats.FORMATS if format not in formats.SCALED]
        raise ValueError(f"format is {weights.format}, for compute capability 10.0; allowed on this GPU are {allowed}")
    config = tile_config(weights.format, rows.tile_map.token_tile, weights.shape, rows.planned, device)
    args, constexprs = arguments(config, x_scaled, rows, weights, bias, out, activation)
    grid = ((device.num_sms - reserved_sms) * config.blocks_per_sm,)
    grouped_gemm_kernel[grid](**args, **constexprs, **config.options)


def arguments(
    config: GroupedGemmTileConfig,
    x_scaled: tuple[Tensor, Tensor | None, Tensor | None],
    rows: RoutedRows,
    weights: ExpertWeights,
    bias: Tensor | None,
    out: Tensor,
    activation: Activation | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the kernel's arguments and constants."""
    num_experts, M, K = weights.shape
    x, x_scales, x_row_scales = x_scaled
    assert x_row_scales is None or x_row_scales.shape == (len(x),), (x_row_scales.shape, x.shape)
    assert x.stride(1) == 1 and out.is_contiguous(), (x.stride(), out.stride())  # noqa: PT018
    assert bias is None or bias.shape == (num_experts, M), (bias.shape, weights.shape)
    weights.check(x, x_scales, rows.tile_map.rows)
    x_tile, x_tail = x, x
    if activation is None:
        x_block = weights.block_k * weights.x_columns // K
        x_tile = TensorDescriptor.from_tensor(x, [config.tokens, x_block])
        x_tail = TensorDescriptor.from_tensor(x, [config.tail or config.tokens, x_block])
    x_scale, x_scale_tail = x_scales, x_scales
    if weights.format == "fp8_block":
        x_scale = TensorDescriptor.from_tensor(x_scales, [1, config.tokens])
        x_scale_tail = TensorDescriptor.from_tensor(x_scales, [1, config.tail or config.tokens])
    args = {
        "w_desc": TensorDescriptor.from_tensor(weights.data, [1, config.rows, weights.packed_k]),
        "w_scale": weights.scale_argument(config.rows),
        "w_global": weights.global_scales,
        "x": x_tile,
        "x_tail": x_tail,
        "x_stride": x.stride(0),
        "x_scale": x_scale,
        "x_scale_tail": x_scale_tail,
        "x_scale_stride": 0 if x_scales is not None and x_scales.numel() == 1 else 1,
        "x_row_scale": x_row_scales,
        "row_index_ptr": rows.row_index_R if activation else None,
        "offsets_ptr": rows.expert_offsets,
        "first_tile_ptr": rows.tile_map.first_tile,
        "tile_expert_ptr": rows.tile_map.tile_expert,
        "bias_ptr": bias,
        "home_ptr": None if activation else rows.home_R,
        "out_ptr": out,
        "M": M,
        "K": K,
        "out_width": out.shape[1],
        "alpha": activation.alpha if activation else 0.0,
        "limit": activation.limit if activation else 0.0,
    }
    constexprs = {
        "FORMAT": weights.format,
        "ACTIVATION": activation.kind if activation else "",
        "TOKENS": config.tokens,
        "TAIL": config.tail,
        "ROWS": config.rows,
        "BLOCK_K": weights.block_k,
        "GROUP": config.group,
        "STAGES": config.num_stages,
        "SCALED": weights.format in formats.SCALED,
        "NATIVE": config.native,
    }
    return args, constexprs
