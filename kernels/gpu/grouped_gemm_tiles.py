"""Tiles of the grouped GEMMs: how products are cut, and which tile belongs to which expert, found on the device.

Rows sorted by expert are cut, expert by expert, into tiles of at most `token_tile` rows.

e experts, R rows that a rank receives, K columns of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import REGISTERS_PER_SM, Device
from expertwire.kernels.gpu.formats import SCALED
from expertwire.kernels.gpu.quantize import scale_groups
from expertwire.kernels.ops.permute import TileMap, max_tiles
from expertwire.kernels.ops.quantize import GROUP

_BLOCK = 128  # tiles a program


@triton.jit(do_not_specialize=["bound"])
def tile_map_kernel(
    offsets_ptr,
    first_tile_ptr,
    tile_expert_ptr,
    num_experts,
    bound,
    TOKEN_TILE: tl.constexpr,
    EXPERTS: tl.constexpr,  # num_experts rounded up to a power of two
    BLOCK: tl.constexpr,
):
    wait_for_previous_kernel()
    expert = tl.arange(0, EXPERTS)
    exists = expert < num_experts
    rows = tl.load(offsets_ptr + expert + 1, mask=exists, other=0) - tl.load(offsets_ptr + expert, mask=exists, other=0)
    end_tile = tl.cumsum((rows + TOKEN_TILE - 1) // TOKEN_TILE, axis=0)
    if tl.program_id(0) == 0:
        tl.store(first_tile_ptr, 0)
        tl.store(first_tile_ptr + 1 + expert, end_tile, mask=exists)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = ((end_tile[None, :] <= tile[:, None]) & exists[None, :]).to(tl.int32)
    tl.store(tile_expert_ptr + tile, tl.sum(before, axis=1), mask=tile < bound)


def build_tile_map(expert_offsets: Tensor, num_rows: int, token_tile: int) -> TileMap:
    """Return `permute.tile_reference`'s map, where `gpu.permute` has not found the tiles already."""
    num_experts = expert_offsets.shape[0] - 1
    assert expert_offsets.dtype == torch.int32, expert_offsets.dtype
    bound = max_tiles(num_rows, num_experts, token_tile)
    first_tile = torch.empty_like(expert_offsets)
    tile_expert = expert_offsets.new_empty(bound)
    tile_map_kernel[(max(1, triton.cdiv(bound, _BLOCK)),)](
        expert_offsets,
        first_tile,
        tile_expert,
        num_experts,
        bound,
        **constexprs(num_experts, token_tile),
        num_warps=4,
        **PDL,
    )
    return TileMap(first_tile, tile_expert, token_tile)


def constexprs(num_experts: int, token_tile: int) -> dict[str, Any]:
    return {"TOKEN_TILE": token_tile, "EXPERTS": triton.next_power_of_2(num_experts), "BLOCK": _BLOCK}


@triton.jit
def locate(item, offsets_ptr, first_tile_ptr, tile_expert_ptr, num_blocks, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """Return a work item's expert, block of weight rows, tile, first row, and the end of the expert's rows.

    Experts follow one another; within one, up to GROUP tiles of tokens share each block of weights
    before the next block.
    """
    expert = tl.load(tile_expert_ptr + item // num_blocks)
    first_tile = tl.load(first_tile_ptr + expert)
    num_tiles = tl.load(first_tile_ptr + expert + 1) - first_tile
    inside = item - first_tile * num_blocks
    group_tile = inside // (GROUP * num_blocks) * GROUP
    group_size = tl.minimum(num_tiles - group_tile, GROUP)
    inside = inside % (GROUP * num_blocks)
    tile = group_tile + inside % group_size
    row = tl.load(offsets_ptr + expert) + tile * TOKENS
    return expert, inside // group_size, first_tile + tile, row, tl.load(offsets_ptr + expert + 1)


@triton.jit(do_not_specialize=["stride"])
def tile_scales_kernel(
    scales_ptr,
    row_index_ptr,
    offsets_ptr,
    first_tile_ptr,
    tile_expert_ptr,
    out_ptr,
    num_experts,
    groups,
    row_stride,
    stride,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    wait_for_previous_kernel()
    tile = tl.program_id(0)
    if tile < tl.load(first_tile_ptr + num_experts):
        expert = tl.load(tile_expert_ptr + tile)
        token = tl.arange(0, TOKENS)
        row = tl.load(offsets_ptr + expert) + (tile - tl.load(first_tile_ptr + expert)) * TOKENS + token
        exists = row < tl.load(offsets_ptr + expert + 1)
        source = tl.load(row_index_ptr + row, mask=exists, other=0) if row_index_ptr is not None else row
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        mask = exists[:, None] & (group < groups)[None, :]
        scales = tl.load(scales_ptr + source.to(tl.int64)[:, None] * row_stride + group[None, :], mask=mask, other=0.0)
        column = tile.to(tl.int64) * TOKENS + token
        tl.store(out_ptr + group.to(tl.int64)[None, :] * stride + column[:, None], scales, mask=mask)


def tile_scales(scales: Tensor, row_index_R: Tensor | None, expert_offsets: Tensor, tile_map: TileMap) -> Tensor:
    """Return scales of rows in the order of a grouped GEMM's tiles: fp32 [groups, `tile_map.rows`],
    padding undefined.

    Without an index, the rows are routed rows already.
    """
    groups = scales.shape[1]
    assert scales.stride(1) == 1 or groups == 1, scales.stride()
    out = scales.new_empty(groups, tile_map.rows)
    if tile_map.rows:
        args = scale_arguments(scales, row_index_R, expert_offsets, tile_map, out)
        grid = (len(tile_map.tile_expert), triton.cdiv(groups, 8))
        tile_scales_kernel[grid](**args, TOKENS=tile_map.token_tile, GROUPS=8, num_warps=4, **PDL)
    return out


@triton.jit(do_not_specialize=["stride"])
def quantize_tiles_kernel(
    x_ptr,
    offsets_ptr,
    first_tile_ptr,
    tile_expert_ptr,
    values_ptr,
    scales_ptr,
    num_experts,
    width,
    stride,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid (tiles, groups of columns)."""
    wait_for_previous_kernel()
    tile, group = tl.program_id(0), tl.program_id(1)
    if tile < tl.load(first_tile_ptr + num_experts):
        expert = tl.load(tile_expert_ptr + tile)
        token = tl.arange(0, TOKENS)
        row = tl.load(offsets_ptr + expert) + (tile - tl.load(first_tile_ptr + expert)) * TOKENS + token
        exists = row < tl.load(offsets_ptr + expert + 1)
        at = row.to(tl.int64)[:, None] * width + (group * GROUP + tl.arange(0, GROUP))[None, :]
        x = tl.load(x_ptr + at, mask=exists[:, None], other=0.0).to(tl.float32)
        values, scales = scale_groups(tl.reshape(x, TOKENS * GROUP), GROUP)
        values = tl.reshape(values, TOKENS, GROUP).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + at, values, mask=exists[:, None])
        column = tile.to(tl.int64) * TOKENS + token
        tl.store(scales_ptr + tl.cast(group, tl.int64) * stride + column, scales, mask=exists)


def quantize_tiles(
    x_RK: Tensor, expert_offsets: Tensor, tile_map: TileMap, *, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """Return routed rows as `quantize.quantize` in groups of 128 columns, and the scales as
    `tile_scales`, in one launch.
    """
    num_rows, width = x_RK.shape
    assert width % GROUP == 0 and x_RK.is_contiguous(), (x_RK.shape, x_RK.stride())  # noqa: PT018
    values = x_RK.new_empty(num_rows, width, dtype=dtype)
    scales = x_RK.new_empty(width // GROUP, tile_map.rows, dtype=torch.float32)
    if tile_map.rows:
        args = quantize_arguments(x_RK, values, scales, expert_offsets, tile_map)
        grid = (len(tile_map.tile_expert), width // GROUP)
        quantize_tiles_kernel[grid](
            **args, TOKENS=tile_map.token_tile, GROUP=GROUP, num_warps=quantize_warps(tile_map.token_tile), **PDL
        )
    return values, scales


def quantize_warps(token_tile: int) -> int:
    """Return the warps of a tile: at most 32 numbers a thread."""
    return max(4, token_tile // 8)


def quantize_arguments(
    x: Tensor, values: Tensor, scales: Tensor, expert_offsets: Tensor, tile_map: TileMap
) -> dict[str, Any]:
    return {
        "x_ptr": x,
        "offsets_ptr": expert_offsets,
        "first_tile_ptr": tile_map.first_tile,
        "tile_expert_ptr": tile_map.tile_expert,
        "values_ptr": values,
        "scales_ptr": scales,
        "num_experts": len(expert_offsets) - 1,
        "width": x.shape[1],
        "stride": scales.shape[1],
    }


def scale_arguments(
    scales: Tensor, row_index_R: Tensor | None, expert_offsets: Tensor, tile_map: TileMap, out: Tensor
) -> dict[str, Any]:
    return {
        "scales_ptr": scales,
        "row_index_ptr": row_index_R,
        "offsets_ptr": expert_offsets,
        "first_tile_ptr": tile_map.first_tile,
        "tile_expert_ptr": tile_map.tile_expert,
        "out_ptr": out,
        "num_experts": len(expert_offsets) - 1,
        "groups": scales.shape[1],
        "row_stride": scales.stride(0),
        "stride": out.shape[1],
    }


@dataclass(frozen=True, kw_only=True)
class GroupedGemmTileConfig:
    """Tile sizes and launch options: weight rows x tokens a tile, pipeline stages, resident blocks an SM."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int
    group: int = 8  # tiles of tokens that share a block of weights
    native: bool = False  # scales of both operands are applied by the tensor cores

    @property
    def tail(self) -> int:
        """Return the tokens of a smaller tile for an expert's last rows; 0 where weight bytes count
        more than padding.
        """
        return self.tokens // 2 if self.tokens >= 128 else 0

    @property
    def options(self) -> dict[str, Any]:
        """Return launch options. Without the number of registers, ptxas spills to leave some for further blocks."""
        registers = min(255, REGISTERS_PER_SM // (32 * self.num_warps * self.blocks_per_sm))
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": registers, **PDL}


def token_tile(format: str, planned_rows: int, num_experts: int) -> int:
    """Return the tokens of a tile, from the rows that the host expects for these experts: a little
    more than the mean expert's.

    A second tile of an expert reads its weights again, at best from the L2 cache; a tile too large
    computes padding.
    """
    mean = planned_rows / num_experts
    tokens = next((tokens for tokens, most in ((16, 10), (32, 24), (64, 50), (128, 512)) if mean <= most), 256)
    if format == "nvfp4_x4":  # scales of 128 rows do not fit into a thread's registers beside its sums
        return min(tokens, 64)
    return tokens if format == "dense" else min(tokens, 128)


def tile_config(
    format: str, tokens: int, weights: tuple[int, int, int], planned_rows: int, device: Device
) -> GroupedGemmTileConfig:
    """Return the configuration for weights [e, M, K] and `tokens` a tile. The order of summation does
    not depend on it.
    """
    num_experts, M, _ = weights
    if format in SCALED:
        # e2m1 numbers that meet fp8 ones take as much space. Two blocks an SM, with 100 KB each.
        bytes_per_stage = (128 + tokens) * (64 if format == "nvfp4_x4" else 128)
        stages = 1 + min(8, 100 * 1024 // bytes_per_stage)
        native = device.arch >= 100
        return GroupedGemmTileConfig(
            rows=128, tokens=tokens, num_warps=4, num_stages=stages, blocks_per_sm=2, native=native
        )
    if tokens == 128 and format != "dense":
        # Sums of a step and of all before it need twice the registers.
        return GroupedGemmTileConfig(rows=128, tokens=128, num_warps=8, num_stages=5, blocks_per_sm=1)
    if tokens == 256:
        return GroupedGemmTileConfig(rows=128, tokens=256, num_warps=8, num_stages=4, blocks_per_sm=1)
    if tokens >= 64:
        # Two blocks an SM: one computes while the other starts or ends a tile.
        stages = 3 if tokens == 128 else 4
        return GroupedGemmTileConfig(rows=128, tokens=tokens, num_warps=4, num_stages=stages, blocks_per_sm=2)
    # Few rows: every SM needs enough weights in flight. Tiles are half as high if there are too few blocks for all SMs.
    if min(planned_rows, num_experts) * triton.cdiv(M, 128) >= 2 * device.num_sms:
        return GroupedGemmTileConfig(rows=128, tokens=tokens, num_warps=4, num_stages=5, blocks_per_sm=2)
    return GroupedGemmTileConfig(rows=64, tokens=tokens, num_warps=4, num_stages=6, blocks_per_sm=2)


@dataclass(frozen=True, kw_only=True)
class RoutedRows:
    """Routed rows, sorted by expert. The host knows how many there can be and how many it expects, no more."""

    row_index_R: Tensor  # i32: row of x
    home_R: Tensor  # i32: slot of the output
    expert_offsets: Tensor  # i32 [e + 1]
    planned: int  # rows expected; only the choice of tiles depends on it
    tile_map: TileMap

    @classmethod
    def of(
        cls,
        row_index_R: Tensor,
        home_R: Tensor,
        expert_offsets: Tensor,
        planned: int,
        format: str,
        tile_map: TileMap | None = None,
    ) -> RoutedRows:
        """Return rows with the tiles that suit both products with weights of this format, found by a
        launch if not given.
        """
        assert row_index_R.shape == home_R.shape, (row_index_R.shape, home_R.shape)
        tokens = token_tile(format, planned, len(expert_offsets) - 1)
        tile_map = tile_map or build_tile_map(expert_offsets, len(row_index_R), tokens)
        assert tile_map.token_tile == tokens, f"rows in tiles of {tile_map.token_tile}, not {tokens}"
        return cls(
            row_index_R=row_index_R, home_R=home_R, expert_offsets=expert_offsets, planned=planned, tile_map=tile_map
        )
