"""Dispatch in fp8: each row is rounded once, on whatever rank its experts are, and combined rows are not rounded."""

from dataclasses import replace

import pytest
import torch
from helpers.exchanges import Exchange
from helpers.ranks import Ranks

from expertwire.comm.all_to_all import backends
from expertwire.comm.all_to_all.fp8 import packed
from expertwire.comm.group import SoloGroup
from expertwire.kernels import registry
from expertwire.kernels.ops import quantize

D = 384  # three groups: a packed row is filled up to a multiple of 16 bytes


def rounded(x):
    """Return x rounded to fp8 with a scale a group, in the dtype of x."""
    values, scales = quantize.reference(x)
    return (values.float() * scales.repeat_interleave(128, dim=1)).to(x.dtype)


def rows_of(rank, tokens, dtype):
    """Return values of many magnitudes, with a group of zeros."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, D, generator=generator) * torch.logspace(-3, 3, D)
    x[:, 128:256] *= torch.arange(tokens)[:, None] % 2
    return x.to(dtype)


def spec_of(case, group, dtype):
    return replace(case.spec(group), hidden_size=D, dtype=dtype)


def run(group, name, case, dtype):
    """Run a rank's steps, which must dispatch rounded rows of all ranks."""
    [all_to_all] = backends.make(name, spec_of(case, group, dtype), "cpu", fp8=True)
    for step in range(3):
        sent = [case.sent(rank, step, group.size)[1] for rank in range(group.size)]
        x = [rows_of(rank, len(ids), dtype) for rank, ids in enumerate(sent)]
        mine = torch.from_numpy(sent[group.rank])
        handle = all_to_all.dispatch_send(x[group.rank], mine, case.tokens_of(step, group.size))
        arrived = all_to_all.dispatch_recv(handle)
        first, last = case.placed(group.size).rank_offsets[group.rank :][:2]
        expected = [
            rounded(x[rank])[torch.from_numpy(ids == expert).any(dim=1)]
            for expert in range(first, last)
            for rank, ids in enumerate(sent)
        ]
        found = arrived.x_UD[arrived.row_index_R]
        assert found.dtype == dtype
        assert torch.equal(found, torch.cat(expected)), f"rank {group.rank}, step {step}"
        home = all_to_all.combine_recv(all_to_all.combine_send(handle, found))
        there = torch.where((mine >= 0)[..., None], rounded(x[group.rank])[:, None], 0)
        assert home.dtype == dtype
        assert torch.equal(home, there.to(dtype)), f"rank {group.rank}, step {step}"


CASES = [
    Exchange(tokens=(5, 3), max_tokens=6, num_experts=6, top_k=3, ids="holes"),
    Exchange(tokens=(4, 0), max_tokens=4, num_experts=4, redundant=2),
]


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2) as ranks:
        yield ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", "nccl", "nvlink"])
def test_rows_are_rounded_once_wherever_their_experts_are(two_ranks, name, dtype):
    for case in CASES:
        two_ranks.run(run, name, case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_single_rank_are_rounded_too(case):
    run(SoloGroup(), "reference", case, torch.bfloat16)


def test_a_single_rank_on_a_device_sends_numbers():
    """Its experts quantise them themselves."""
    case = CASES[1]
    x, ids = rows_of(0, 4, torch.bfloat16), torch.from_numpy(case.sent(0, 0, 1)[1])
    for on_device, arrives in ((True, x), (False, rounded(x))):
        ops = replace(registry.plain(), on_device=on_device)
        (all_to_all,), _ = backends.build("auto", spec_of(case, SoloGroup(), x.dtype), ops, "a", "cpu", fp8=True)
        arrived = all_to_all.dispatch_recv(all_to_all.dispatch_send(x, ids, [4]))
        assert torch.equal(arrived.x_UD, arrives)


def test_packed_rows_are_what_was_packed():
    given = quantize.reference(rows_of(1, 3, torch.bfloat16))
    rows = quantize.pack(given)
    assert rows.shape == (3, 400)  # 384 values, 3 scales, 4 bytes of nothing
    assert all(torch.equal(found, was) for found, was in zip(quantize.unpack(rows, D), given, strict=True))


def test_half_the_bytes_leave():
    spec = spec_of(CASES[0], SoloGroup(), torch.bfloat16)
    row = packed(replace(spec, hidden_size=7168))
    assert row.hidden_size * row.dtype.itemsize == 7168 + 56 * 4
    assert (row.combine_size, row.combine_dtype) == (7168, torch.bfloat16)
