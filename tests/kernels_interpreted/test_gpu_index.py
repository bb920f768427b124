"""The indexer in the interpreter: its choice against the reference's, launches and workspace, and the writing of its cache."""

import numpy as np
import pytest
import torch
from helpers.count_launches import launches

from expertwire.kernels.gpu import index as gpu
from expertwire.kernels.gpu import index_rope_and_cache, top_k_positions
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops import attention, index, rotary
from expertwire.kernels.ops.variants import Rope

DEVICE = Device(arch=90, num_sms=1)
CONFIG = gpu.IndexerTileConfig(queries=2, keys=32, num_warps=4, num_stages=2)
# (queries, known tokens) of each sequence; single queries first.
BATCH = [(1, 1), (1, 16), (1, 90), (5, 5), (3, 64), (2, 130)]


def scene(batch, dtype, *, heads=4, dim=16, block=4, unused=0, seed=0):
    """Queries and weights, a cache that is NaN wherever no sequence has stored, the description and that for a GPU."""
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    blocks = -(-lengths // block)
    ids = 1 + np.random.default_rng(seed).permutation(int(blocks.sum()))
    tables = np.zeros((len(batch), int(blocks.max()) + 1), np.int32)
    cache = torch.full((len(ids) + 1, block, dim), float("nan"), dtype=dtype)
    for b, length in enumerate(lengths):
        tables[b, : blocks[b]], ids = ids[: blocks[b]], ids[blocks[b] :]
        at = np.arange(length)
        # Whole numbers: all sums are exact, in any order, and many scores are equal.
        cache[tables[b, at // block], at % block] = torch.randint(-3, 4, (length, dim), generator=generator).to(dtype)
    q = torch.randint(-3, 4, (int(nums.sum()) + unused, heads, dim), generator=generator).to(dtype)
    weights = torch.randint(-2, 5, (len(q), heads), generator=generator).float()
    host = attention.describe(nums, lengths, torch.from_numpy(tables))
    device = attention.describe(
        np.pad(nums, (0, unused)),
        np.pad(lengths, (0, unused)),
        torch.from_numpy(np.pad(tables, ((0, unused), (0, 0)))),
        int(lengths.max()) + 5,
    )
    return q, weights, cache, host, device


def choose(q, weights, cache, seqs, top_k, **options):
    return gpu.choose_positions(q, weights, cache, seqs, top_k, DEVICE, **{"config": CONFIG, **options})


@pytest.mark.parametrize("top_k", [1, 7, 20, 64, 200])
def test_reference(top_k):
    """Tokens that belong to no sequence choose nothing."""
    q, weights, cache, host, device = scene(BATCH, torch.float16, unused=3)
    rows = int(host.cu_seqlens_q[-1])
    found = choose(q, weights, cache, device, top_k)
    assert torch.equal(found[:rows], index.reference(q[:rows], weights[:rows], cache, host, top_k))
    assert (found[rows:] == -1).all()


@pytest.mark.parametrize(("heads", "dim", "block"), [(1, 8, 1), (5, 24, 3), (64, 128, 16)])
def test_shapes(heads, dim, block):
    q, weights, cache, host, device = scene([(1, 70), (3, 40)], torch.float32, heads=heads, dim=dim, block=block)
    found = choose(q, weights, cache, device, 20, config=gpu.CONFIG)
    assert torch.equal(found, index.reference(q, weights, cache, host, 20))


def test_a_small_workspace():
    q, weights, cache, host, device = scene(BATCH, torch.float32)
    with launches() as counts:
        found = choose(q, weights, cache, device, 9, workspace_scores=5 * 160)
    assert torch.equal(found, index.reference(q, weights, cache, host, 9))
    assert counts == {"score_kernel": 3, "top_k_kernel": 3}


def test_two_launches_a_step():
    q, weights, cache, _, device = scene(BATCH, torch.float32)
    for top_k, expected in ((9, {"score_kernel": 1, "top_k_kernel": 1}), (200, {"top_k_kernel": 1})):
        with launches() as counts:
            choose(q, weights, cache, device, top_k)
        assert counts == expected


def test_a_choice_depends_on_a_querys_own_sequence_alone():
    """Use numbers that round: nearly equal scores would swap if their sums changed."""
    q, weights, cache, _, device = scene([(1, 100)] * 3 + [(6, 100)], torch.float32)
    generator = torch.Generator().manual_seed(1)
    q, cache = (1e-3 * torch.randn(x.shape, generator=generator) + 1 for x in (q, cache))
    weights = torch.rand(weights.shape, generator=generator) - 0.5
    device.block_table[:] = device.block_table[-1]
    q[:3], weights[:3] = q[-1], weights[-1]  # decodes of the prompt's last token
    chosen = choose(q, weights, cache, device, 30)
    assert all(torch.equal(chosen[row], chosen[-1]) for row in range(3))
    alone = attention.describe([3], [100], device.block_table[-1:], 4000)
    assert torch.equal(choose(q[-3:].contiguous(), weights[-3:].contiguous(), cache, alone, 30), chosen[-3:])


SCORES = {
    "ascending": torch.arange(300.0),
    "descending": -torch.arange(300.0),
    "equal": torch.zeros(300),
    "zeros of both signs": torch.tensor([-0.0, 0.0] * 150),
    "random": torch.randn(300, generator=torch.Generator().manual_seed(0)),
    "few values": torch.randint(-2, 3, (300,), generator=torch.Generator().manual_seed(0)).float(),
    "infinite": torch.tensor([1.0, float("inf"), float("-inf")] * 100),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("top_k", [1, 5, 33, 299])
def test_top_k_positions(name, top_k):
    """Fill and empty buffers of 64 entries and more several times."""
    scores = torch.full((1, 304), float("nan"))
    scores[0, :300] = SCORES[name]
    seqs = attention.describe([1], [300], torch.zeros(1, 1, dtype=torch.int32), 304)
    chosen = torch.empty(1, top_k, dtype=torch.int64)
    top_k_positions.select_top_k(scores, seqs, 0, chosen)
    expected = SCORES[name].sort(descending=True, stable=True).indices[:top_k].sort().values
    assert torch.equal(chosen[0], expected)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "heads", "rotated"), [(0, 3, 8), (1, 1, 8), (5, 9, 16), (3, 2, 4)])
def test_rope_and_cache(tokens, heads, rotated, dtype, interleaved):
    """Use keys that are parts of longer rows, and a token that is not stored."""
    dim = 24
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(tokens, heads, dim, generator=generator).to(dtype)
    k = torch.randn(tokens, dim + 8, generator=generator).to(dtype)[:, 8:]
    norm = tuple(torch.rand(dim, generator=generator).to(dtype) for _ in range(2))
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    slots = torch.randperm(12, generator=generator)[:tokens]
    slots[1:2] = -1
    tables = rotary.tables(50, Rope(theta=1e4, size=rotated), "cpu")
    caches = [torch.full((3, 4, dim), float("nan"), dtype=dtype) for _ in range(2)]
    outputs = [
        op(q, k, norm, 1e-6, rotary.RopeInputs(tables, positions, slots, interleaved), cache)
        for op, cache in zip((index.rope_and_cache, index_rope_and_cache.rope_and_cache), caches, strict=True)
    ]
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outputs[1], outputs[0], **tolerance)
    torch.testing.assert_close(caches[1], caches[0], **tolerance, equal_nan=True)
