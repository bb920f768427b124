"""Tiles of tokens, cut on the device, for experts with all sorts of rows."""

import pytest
import torch

from expertwire.kernels import permute
from expertwire.kernels.gpu import tiles


@pytest.mark.parametrize("token_tile", [16, 64])
@pytest.mark.parametrize(
    "counts",
    [[0], [1], [0, 0, 0], [16, 17, 15, 0, 64, 65, 63], [0, 300, 0], [1] * 130, [3000, 0, 1], [0] * 383 + [1]],
    ids=lambda counts: f"{len(counts)}x{max(counts)}",
)
def test_tiles(counts, token_tile):
    offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for spare in (0, 50):  # rows that the host allowed for and that did not come
        found = tiles.tile_metadata(offsets, sum(counts) + spare, token_tile)
        expected = permute.tile_reference(offsets, sum(counts) + spare, token_tile)
        num_tiles = int(expected.first_tile[-1])
        assert found.first_tile.tolist() == expected.first_tile.tolist()
        assert found.tile_expert[:num_tiles].tolist() == expected.tile_expert[:num_tiles].tolist()
        assert len(found.tile_expert) == len(expected.tile_expert)
        assert found.token_tile == token_tile
