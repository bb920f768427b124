"""The order of routed rows, by hand."""

import torch

from expertwire.kernels import permute


def test_rows_are_sorted_by_expert_then_token_then_k():
    done = permute.reference(torch.tensor([[2, 0], [-1, 2], [0, 7], [2, -1]]), 4)
    assert done.expert_offsets.tolist() == [0, 2, 2, 5, 5]
    assert done.home_N.tolist() == [1, 4, 0, 3, 6, -1, -1, -1]
    assert done.row_index_N.tolist() == [0, 2, 0, 1, 3, -1, -1, -1]


def test_no_tokens():
    done = permute.reference(torch.empty(0, 8, dtype=torch.int64), 3)
    assert done.expert_offsets.tolist() == [0, 0, 0, 0]
    assert done.home_N.numel() == done.row_index_N.numel() == 0
