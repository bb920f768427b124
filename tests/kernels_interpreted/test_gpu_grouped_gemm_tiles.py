"""Tiles of tokens, cut on the device, for experts with any number of rows."""

import pytest
import torch

from expertwire.kernels.gpu import grouped_gemm_tiles
from expertwire.kernels.ops import permute, quantize


@pytest.mark.parametrize("token_tile", [16, 64])
@pytest.mark.parametrize(
    "counts",
    [[0], [1], [0, 0, 0], [16, 17, 15, 0, 64, 65, 63], [0, 300, 0], [1] * 130, [3000, 0, 1], [0] * 383 + [1]],
    ids=lambda counts: f"{len(counts)}x{max(counts)}",
)
def test_tiles(counts, token_tile):
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for spare in (0, 50):  # rows that the host allowed for and that did not come
        found = grouped_gemm_tiles.build_tile_map(offsets, sum(counts) + spare, token_tile)
        expected = permute.tile_reference(offsets, sum(counts) + spare, token_tile)
        num_tiles = int(expected.first_tile[-1])
        assert found.first_tile.tolist() == expected.first_tile.tolist()
        assert found.tile_expert[:num_tiles].tolist() == expected.tile_expert[:num_tiles].tolist()
        assert len(found.tile_expert) == len(expected.tile_expert)
        assert found.token_tile == token_tile


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("token_tile", [16, 32])
def test_rows_are_quantised_tile_by_tile(token_tile):
    """Compare with quantising row by row, with the scales in the order of tiles; missing rows are not read."""
    offsets = torch.tensor([0, 5, 5, 40, 41], dtype=torch.int32)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    x[3, :128], x[7] = 0.0, 1e-3 * x[7]
    x[41:] = torch.nan
    tile_map = grouped_gemm_tiles.build_tile_map(offsets, 50, token_tile)
    values, scales = grouped_gemm_tiles.quantize_tiles(x, offsets, tile_map, dtype=torch.float32)
    expected = quantize.scaled(x[:41], 128)
    assert torch.equal(values[:41], expected.values_TD)
    placed = grouped_gemm_tiles.tile_scales(expected.scales_TJ, None, offsets, tile_map)
    for tile in range(int(tile_map.first_tile[-1])):
        expert = int(tile_map.tile_expert[tile])
        first = int(offsets[expert]) + (tile - int(tile_map.first_tile[expert])) * token_tile
        columns = slice(tile * token_tile, tile * token_tile + min(token_tile, int(offsets[expert + 1]) - first))
        assert torch.equal(scales[:, columns], placed[:, columns])
