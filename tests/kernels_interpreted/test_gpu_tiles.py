"""Tiles of tokens, cut on the device, for experts with all sorts of rows."""

import pytest
import torch

from expertwire.kernels.gpu import tiles


def expected(counts, token_tile):
    """The specification: first tile of each expert, and each tile's expert."""
    per_expert = [-(-count // token_tile) for count in counts]
    return [sum(per_expert[:e]) for e in range(len(counts) + 1)], [
        e for e, number in enumerate(per_expert) for _ in range(number)
    ]


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
        first_tile, tile_expert = expected(counts, token_tile)
        assert found.first_tile.tolist() == first_tile
        assert found.tile_expert[: len(tile_expert)].tolist() == tile_expert
        assert found.token_tile == token_tile


def test_bound_holds_for_the_worst_case():
    """One row too many in every expert."""
    counts = [17] * 7
    assert len(expected(counts, 16)[1]) == 14 <= tiles.max_tiles(sum(counts), len(counts), 16)
