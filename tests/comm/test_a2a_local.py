"""One rank's all-to-all on the device gives the same rows as the reference."""

import numpy as np
import pytest
import torch

from expertwire.comm.all_to_all.base import AllToAllSpec
from expertwire.comm.all_to_all.local import LocalAllToAll
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.comm.group import SoloGroup
from expertwire.kernels.ops import permute

E, D = 5, 4


def make(top_k):
    return AllToAllSpec(
        group=SoloGroup(), rank_offsets=(0, E), max_tokens=64, hidden_size=D, top_k=top_k, dtype=torch.float32
    )


@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("choice", ["random", "one expert"])
def test_rows_are_those_of_the_reference(tokens, top_k, choice):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D, generator=generator)
    ids = torch.rand(tokens, E, generator=generator).argsort(dim=1)[:, :top_k]
    if choice == "one expert":
        ids = torch.full_like(ids, 2)
    local, reference = LocalAllToAll(make(top_k), permute.reference), ReferenceAllToAll(make(top_k))
    sent, expected = (backend.dispatch_send(x, ids, [tokens]) for backend in (local, reference))
    here, there = local.dispatch_recv(sent), reference.dispatch_recv(expected)
    assert here.expert_offsets.tolist() == there.expert_offsets.tolist()
    assert torch.equal(here.x_UD[here.row_index_R.long()], there.x_UD[there.row_index_R])
    # Each row says which expert it comes from, and whose it is.
    experts = np.repeat(np.arange(E), np.diff(there.expert_offsets))
    rows = there.x_UD[there.row_index_R] + torch.from_numpy(experts)[:, None]
    home = torch.full((tokens * top_k, D), torch.nan)
    home[here.home_R.long()] = rows
    combined = local.combine_recv(local.combine_send(sent, home))
    assert torch.equal(combined, reference.combine_recv(reference.combine_send(expected, rows)))


def test_padding_reaches_no_expert():
    ids = torch.arange(12).view(6, 2) % E
    local = LocalAllToAll(make(2), permute.reference)
    sent = local.dispatch_send(torch.zeros(6, D), ids, [6], torch.tensor([4], dtype=torch.int32))
    arrived = local.dispatch_recv(sent)
    assert int(arrived.expert_offsets[-1]) == 8
    assert sorted(arrived.home_R.tolist()) == [-1] * 4 + list(range(8))
