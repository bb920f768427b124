"""How grouped GEMMs are cut into tiles, and which tile belongs to which expert; the latter found on the device, without the host.

Rows sorted by expert are cut, expert by expert, into tiles of at most `token_tile` rows. e experts, R rows at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import REGISTERS_PER_SM, Case
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.formats import SCALED
from expertwire.kernels.gpu.quantize import scale_groups
from expertwire.kernels.ops.permute import TileMap, max_tiles
from expertwire.kernels.ops.quantize import GROUP

_BLOCK = 128  # tiles a program


@triton.jit(do_not_specialize=["bound"])
def _tile_metadata(
    offsets_ptr,
    first_tile_ptr,
    tile_expert_ptr,
    num_experts,
    bound,
    TOKEN_TILE: tl.constexpr,
    EXPERTS: tl.constexpr,  # num_experts rounded up to a power of two
    BLOCK: tl.constexpr,
):
    wait_for_previous()
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


def tile_metadata(expert_offsets: Tensor, num_rows: int, token_tile: int) -> TileMap:
    """`permute.tile_reference`, where `gpu.permute` has not found the tiles already."""
    num_experts = expert_offsets.shape[0] - 1
    assert expert_offsets.dtype == torch.int32, expert_offsets.dtype
    bound = max_tiles(num_rows, num_experts, token_tile)
    first_tile = torch.empty_like(expert_offsets)
    tile_expert = expert_offsets.new_empty(bound)
    _tile_metadata[(max(1, triton.cdiv(bound, _BLOCK)),)](
        expert_offsets,
        first_tile,
        tile_expert,
        num_experts,
        bound,
        **_constexprs(num_experts, token_tile),
        num_warps=4,
        **EARLY,
    )
    return TileMap(first_tile, tile_expert, token_tile)


def _constexprs(num_experts: int, token_tile: int) -> dict[str, Any]:
    return {"TOKEN_TILE": token_tile, "EXPERTS": triton.next_power_of_2(num_experts), "BLOCK": _BLOCK}


@triton.jit
def locate(item, offsets_ptr, first_tile_ptr, tile_expert_ptr, num_blocks, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """A work item's expert, block of weight rows, tile, first row, and the end of the expert's rows.

    Expert after expert; within one, up to GROUP tiles of tokens share each block of weights before the next block comes.
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
def _tile_scales(
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
    wait_for_previous()
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


def tile_scales(scales_NG: Tensor, row_index_R: Tensor | None, expert_offsets: Tensor, tile_map: TileMap) -> Tensor:
    """Scales of rows for a grouped GEMM's tiles, group by group: fp32 [G, `tile_map.rows`], padding undefined.

    Without an index the rows are routed rows already.
    """
    groups = scales_NG.shape[1]
    assert scales_NG.stride(1) == 1 or groups == 1, scales_NG.stride()
    out = scales_NG.new_empty(groups, tile_map.rows)
    if tile_map.rows:
        args = _scale_arguments(scales_NG, row_index_R, expert_offsets, tile_map, out)
        grid = (len(tile_map.tile_expert), triton.cdiv(groups, 8))
        _tile_scales[grid](**args, TOKENS=tile_map.token_tile, GROUPS=8, num_warps=4, **EARLY)
    return out


@triton.jit(do_not_specialize=["stride"])
def _quantize_tiles(
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
    wait_for_previous()
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
    """Return routed rows as `quantize.quantize` in groups of 128 columns, and the scales as `tile_scales`, in one launch."""
    num_rows, width = x_RK.shape
    assert width % GROUP == 0 and x_RK.is_contiguous(), (x_RK.shape, x_RK.stride())  # noqa: PT018
    values = x_RK.new_empty(num_rows, width, dtype=dtype)
    scales = x_RK.new_empty(width // GROUP, tile_map.rows, dtype=torch.float32)
    if tile_map.rows:
        args = _quantize_arguments(x_RK, values, scales, expert_offsets, tile_map)
        grid = (len(tile_map.tile_expert), width // GROUP)
        _quantize_tiles[grid](
            **args, TOKENS=tile_map.token_tile, GROUP=GROUP, num_warps=_quantize_warps(tile_map.token_tile), **EARLY
        )
    return values, scales


def _quantize_warps(token_tile: int) -> int:
    """32 numbers a thread at most."""
    return max(4, token_tile // 8)


def _quantize_arguments(
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


def _scale_arguments(
    scales_NG: Tensor, row_index_R: Tensor | None, expert_offsets: Tensor, tile_map: TileMap, out: Tensor
) -> dict[str, Any]:
    return {
        "scales_ptr": scales_NG,
        "row_index_ptr": row_index_R,
        "offsets_ptr": expert_offsets,
        "first_tile_ptr": tile_map.first_tile,
        "tile_expert_ptr": tile_map.tile_expert,
        "out_ptr": out,
        "num_experts": len(expert_offsets) - 1,
        "groups": scales_NG.shape[1],
        "row_stride": scales_NG.stride(0),
        "stride": out.shape[1],
    }


@dataclass(frozen=True, kw_only=True)
class GemmTiles:
    """How a grouped GEMM is cut: weight rows x tokens a tile, stages of the pipeline, resident blocks an SM."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int
    group: int = 8  # tiles of tokens that share a block of weights
    native: bool = False  # scales of both operands are applied by the tensor cores

    @property
    def tail(self) -> int:
        """Tokens of a smaller tile for an expert's last rows; 0 where the weights' bytes count for more than padding."""
        return self.tokens // 2 if self.tokens >= 128 else 0

    @property
    def options(self) -> dict[str, Any]:
        """For the launch. Told how many registers there are, ptxas does not spill to save some for further blocks."""
        registers = min(255, REGISTERS_PER_SM // (32 * self.num_warps * self.blocks_per_sm))
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": registers, **EARLY}


def token_tile(format: str, planned_rows: int, num_experts: int) -> int:
    """Tokens a tile, from the rows that the host has planned for these experts: a little more than the mean expert's.

    A second tile of an expert reads its weights again, from the L2 cache at best; a tile too large computes padding.
    """
    mean = planned_rows / num_experts
    tokens = next((tokens for tokens, most in ((16, 10), (32, 24), (64, 50), (128, 512)) if mean <= most), 256)
    if format == "nvfp4_x4":  # scales of 128 rows do not fit into a thread's registers beside its sums
        return min(tokens, 64)
    return tokens if format == "dense" else min(tokens, 128)


def gemm_tiles(format: str, tokens: int, weights: tuple[int, int, int], planned_rows: int, device: Device) -> GemmTiles:
    """For weights [e, M, K] and `tokens` a tile. The order of summation does not depend on any of it."""
    num_experts, M, _ = weights
    if format in SCALED:
        # e2m1 numbers that meet fp8 ones take as much room. Two blocks an SM, with 100 KB each.
        bytes_a_stage = (128 + tokens) * (64 if format == "nvfp4_x4" else 128)
        stages = 1 + min(8, 100 * 1024 // bytes_a_stage)
        native = device.arch >= 100
        return GemmTiles(rows=128, tokens=tokens, num_warps=4, num_stages=stages, blocks_per_sm=2, native=native)
    if tokens == 128 and format != "dense":
        # Sums of a step and of all before it need twice the registers.
        return GemmTiles(rows=128, tokens=128, num_warps=8, num_stages=5, blocks_per_sm=1)
    if tokens == 256:
        return GemmTiles(rows=128, tokens=256, num_warps=8, num_stages=4, blocks_per_sm=1)
    if tokens >= 64:
        # Two blocks an SM: one computes while the other starts or ends a tile.
        stages = 3 if tokens == 128 else 4
        return GemmTiles(rows=128, tokens=tokens, num_warps=4, num_stages=stages, blocks_per_sm=2)
    # Few rows: every SM needs enough of the weights in flight. Half as high if there are too few blocks for all SMs.
    if min(planned_rows, num_experts) * triton.cdiv(M, 128) >= 2 * device.num_sms:
        return GemmTiles(rows=128, tokens=tokens, num_warps=4, num_stages=5, blocks_per_sm=2)
    return GemmTiles(rows=64, tokens=tokens, num_warps=4, num_stages=6, blocks_per_sm=2)


@dataclass(frozen=True, kw_only=True)
class Rows:
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
    ) -> Rows:
        """With the tiles that suit both products with weights of this format; if they are not given, by a small launch."""
        assert row_index_R.shape == home_R.shape, (row_index_R.shape, home_R.shape)
        tokens = token_tile(format, planned, len(expert_offsets) - 1)
        tile_map = tile_map or tile_metadata(expert_offsets, len(row_index_R), tokens)
        assert tile_map.token_tile == tokens, f"rows in tiles of {tile_map.token_tile}, not {tokens}"
        return cls(
            row_index_R=row_index_R, home_R=home_R, expert_offsets=expert_offsets, planned=planned, tile_map=tile_map
        )


def cases() -> list[Case]:
    metadata = [
        Case(
            name=f"tiles.tile_metadata experts{num_experts} tokens{tokens}",
            kernel=_tile_metadata,
            args={
                "offsets_ptr": torch.int32,
                "first_tile_ptr": torch.int32,
                "tile_expert_ptr": torch.int32,
                "num_experts": num_experts,
                "bound": max_tiles(32768, num_experts, tokens),
            },
            constexprs=_constexprs(num_experts, tokens),
            options=EARLY,
            expect={90: "", 100: ""},
            wide=False,
        )
        for num_experts, tokens in ((8, 256), (384, 128))
    ]
    offsets, index = (torch.empty(size, dtype=torch.int32, device="meta") for size in (33, 2048))
    scales = [
        Case(
            name=f"tiles.tile_scales tokens{tokens}",
            kernel=_tile_scales,
            args=_scale_arguments(
                torch.empty(256, 56, device="meta"),
                row_index,
                offsets,
                TileMap(offsets, index, tokens),
                torch.empty(56, 2048 * tokens, device="meta"),
            ),
            constexprs={"TOKENS": tokens, "GROUPS": 8},
            options=EARLY,
            expect={90: "", 100: ""},
            wide=False,
        )
        for tokens, row_index in ((16, index), (128, None))
    ]
    meta = {"device": "meta"}
    quantised = [
        Case(
            name=f"tiles.quantize_tiles tokens{tokens}",
            kernel=_quantize_tiles,
            args=_quantize_arguments(
                torch.empty(4096, 2048, dtype=torch.bfloat16, **meta),
                torch.empty(4096, 2048, dtype=torch.float8_e4m3fn, **meta),
                torch.empty(16, 288 * tokens, **meta),
                offsets,
                TileMap(offsets, index, tokens),
            ),
            constexprs={"TOKENS": tokens, "GROUP": GROUP},
            num_warps=_quantize_warps(tokens),
            options=EARLY,
            expect={90: "", 100: ""},
        )
        for tokens in (16, 128)
    ]
    return metadata + scales + quantised
