"""The order of routed rows, by hand."""

import torch

from expertwire.kernels.ops import permute


def test_rows_are_sorted_by_expert_then_token_then_k():
    done = permute.reference(torch.tensor([[2, 0], [-1, 2], [0, 7], [2, -1]]), 4)
    assert done.expert_offsets.tolist() == [0, 2, 2, 5, 5]
    assert done.home_N.tolist() == [1, 4, 0, 3, 6, -1, -1, -1]
    assert done.row_index_N.tolist() == [0, 2, 0, 1, 3, -1, -1, -1]


def test_no_tokens():
    done = permute.reference(torch.empty(0, 8, dtype=torch.int64), 3)
    assert done.expert_offsets.tolist() == [0, 0, 0, 0]
    assert done.home_N.numel() == done.row_index_N.numel() == 0


def test_rows_are_cut_into_tiles():
    done = permute.reference(torch.tensor([[2, 0], [-1, 2], [0, 7], [2, -1]]), 4, token_tile=2)
    assert done.tile_map.first_tile.tolist() == [0, 1, 1, 3, 3]
    assert done.tile_map.tile_expert[:3].tolist() == [0, 2, 2]
    assert done.tile_map.rows == 2 * len(done.tile_map.tile_expert) == 16


def test_the_bound_on_tiles_holds_for_the_worst_case():
    """One row too many in every expert."""
    offsets = torch.arange(0, 8 * 17, 17, dtype=torch.int32)
    assert permute.tile_reference(offsets, 7 * 17, 16).first_tile[-1] == 14 <= permute.max_tiles(7 * 17, 7, 16)
