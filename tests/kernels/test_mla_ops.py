"""Latent attention, of all positions and of chosen ones, against the reference; bits that what a query sees decides alone."""

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import attention, index, mla, rotary
from expertwire.kernels.ops.variants import Rope

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}
SCALE, EPS = 0.17, 1e-6
# (queries, known tokens) of each sequence; single queries first.
BATCH = [(1, 1), (1, 16), (1, 90), (5, 5), (40, 64), (30, 130)]
# Keys of several splits, and with 20 heads more rows than are computed at once.
LONG = [(1, 512), (1, 513), (1, 1100), (40, 530)]


def scene(batch, dtype, *, heads=5, width=48, block=4, seed=0):
    """Queries, a cache that is NaN wherever no sequence has stored, and the description."""
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    blocks = -(-lengths // block)
    ids = 1 + np.random.default_rng(seed).permutation(int(blocks.sum()))
    tables = np.zeros((len(batch), int(blocks.max()) + 1), np.int32)
    cache = torch.full((len(ids) + 1, block, width), float("nan"), dtype=dtype)
    for b, length in enumerate(lengths):
        tables[b, : blocks[b]], ids = ids[: blocks[b]], ids[blocks[b] :]
        at = np.arange(length)
        cache[tables[b, at // block], at % block] = torch.randn(length, width, generator=generator).to(dtype)
    q = torch.randn(int(nums.sum()), heads, width, generator=generator).to(dtype)
    seqs = attention.describe(nums, lengths, torch.from_numpy(tables))
    return q, cache, seqs


def choice(batch, top_k, seed=0):
    """Random positions that each query may see, itself among them, in any order; -1 behind them."""
    generator = np.random.default_rng(seed)
    rows = []
    for num, length in batch:
        for position in range(length - num, length):
            few = generator.permutation(position)[: min(top_k, position + 1) - 1]
            row = generator.permutation(np.append(few, position))
            rows.append(np.pad(row, (0, top_k - len(row)), constant_values=-1))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("heads", "rank", "width", "block"),
    [(5, 32, 48, 4), (3, 24, 32, 16), (16, 32, 64, 1), (50, 64, 96, 16), (2, 7, 9, 3)],
)
@pytest.mark.parametrize("top_k", [None, 1, 20, 130])
@pytest.mark.parametrize("name", OPS)
def test_reference(name, dtype, heads, rank, width, block, top_k):
    q, cache, seqs = scene(BATCH, dtype, heads=heads, width=width, block=block)
    options = {"rank": rank, "scale": SCALE, "chosen": None if top_k is None else choice(BATCH, top_k)}
    found = OPS[name].attend_latent(q, cache, seqs, **options)
    expected = mla.reference(q, cache, seqs, **options)
    assert (found.shape, found.dtype) == ((len(q), heads, rank), dtype)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_size_of_deepseek(dtype):
    batch = [(1, 70), (2, 40)]
    q, cache, seqs = scene(batch, dtype, heads=128, width=576, block=16)
    for chosen in (None, choice(batch, 33)):
        found = OPS["cpu"].attend_latent(q, cache, seqs, rank=512, scale=0.05, chosen=chosen)
        expected = mla.reference(q, cache, seqs, rank=512, scale=0.05, chosen=chosen)
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("top_k", [None, 600])
def test_several_splits(dtype, top_k):
    q, cache, seqs = scene(LONG, dtype, heads=20)
    options = {"rank": 32, "scale": SCALE, "chosen": None if top_k is None else choice(LONG, top_k)}
    found = OPS["cpu"].attend_latent(3 * q, cache, seqs, **options)
    torch.testing.assert_close(found, mla.reference(3 * q, cache, seqs, **options), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("top_k", [None, 24, 130])
@pytest.mark.parametrize(("batch", "heads"), [(BATCH, 3), (BATCH, 20), (LONG, 20)], ids=["few heads", "heads", "long"])
def test_bits_of_a_query_depend_on_what_it_sees_alone(dtype, top_k, batch, heads):
    q, cache, seqs = scene(batch, dtype, heads=heads)
    chosen = None if top_k is None else choice(batch, top_k)
    attend = OPS["cpu"].attend_latent
    whole = attend(q, cache, seqs, rank=32, scale=SCALE, chosen=chosen)
    for b, (num, length) in enumerate(batch):
        for start, end in {(0, num), (0, 1), (num - 1, num), (num // 3, num)}:
            rows = slice(seqs.cu_seqlens_q[b] + start, seqs.cu_seqlens_q[b] + end)
            one = attention.describe([end - start], [length - num + end], seqs.block_table[b : b + 1])
            some = None if chosen is None else chosen[rows]
            found = attend(q[rows].contiguous(), cache, one, rank=32, scale=SCALE, chosen=some)
            assert torch.equal(found, whole[rows]), (b, start, end)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_choosing_all_positions_or_the_same_in_another_order_changes_no_bit(dtype):
    q, cache, seqs = scene(BATCH, dtype)
    attend = OPS["cpu"].attend_latent
    dense = attend(q, cache, seqs, rank=32, scale=SCALE)
    assert torch.equal(attend(q, cache, seqs, rank=32, scale=SCALE, chosen=choice(BATCH, 130)), dense)
    few = [choice(BATCH, 24), choice(BATCH, 24).flip(1)]
    found = [attend(q, cache, seqs, rank=32, scale=SCALE, chosen=chosen) for chosen in few]
    assert torch.equal(*found)
    assert not torch.equal(found[0], dense)


def test_no_queries():
    q, cache, _ = scene([(1, 3)], torch.float32)
    nothing = attention.describe([], [], torch.zeros(0, 1, dtype=torch.int32))
    none = torch.zeros(0, 7, dtype=torch.int64)
    for ops in OPS.values():
        for chosen in (None, none):
            assert ops.attend_latent(q[:0], cache, nothing, rank=32, scale=1.0, chosen=chosen).shape == (0, 5, 32)
        assert torch.equal(ops.choose_positions(q[:0], torch.zeros(0, 5), cache, nothing, 7), none)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("rank", "size"), [(32, 16), (24, 8), (7, 2)])
def test_rope_and_cache_latent(dtype, interleaved, rank, size):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 3, 11 + size, generator=generator).to(dtype)[:, :, 11:]
    kv = torch.randn(9, rank + size, generator=generator).to(dtype)
    norm = torch.rand(rank, generator=generator).to(dtype) + 0.5
    tables = rotary.tables(200, Rope(theta=1e4, size=size), "cpu")
    positions, slots = torch.randint(0, 200, (9,), generator=generator), torch.randperm(20, generator=generator)[:9]
    caches = [torch.full((5, 4, rank + size), 7.0, dtype=dtype) for _ in OPS]
    found = [
        ops.rope_and_cache_latent(q, kv, norm, EPS, rotary.RopeInputs(tables, positions, slots, interleaved), cache)
        for ops, cache in zip(OPS.values(), caches, strict=True)
    ]
    close = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-9}}[dtype]
    torch.testing.assert_close(*found, **close)
    torch.testing.assert_close(*caches, **close)
    assert (caches[0].flatten(0, 1) == 7).all(1).sum() == 11


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "size"), [(16, 8), (24, 24), (9, 2), (8, 0)])
def test_rope_and_cache_index(dtype, interleaved, dim, size):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(shape, generator=generator).to(dtype) for shape in ((9, 3, dim), (9, dim)))
    norm = [torch.randn(dim, generator=generator).to(dtype) for _ in range(2)]
    tables = rotary.tables(200, Rope(theta=1e4, size=size), "cpu")
    positions, slots = torch.randint(0, 200, (9,), generator=generator), torch.randperm(20, generator=generator)[:9]
    caches = [torch.full((5, 4, dim), 7.0, dtype=dtype) for _ in OPS]
    found = [
        ops.rope_and_cache_index(q, k, norm, EPS, rotary.RopeInputs(tables, positions, slots, interleaved), cache)
        for ops, cache in zip(OPS.values(), caches, strict=True)
    ]
    close = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-8}}[dtype]
    torch.testing.assert_close(*found, **close)
    torch.testing.assert_close(*caches, **close)
    assert found[0].dtype == dtype
    # By hand, of one key: layer norm in fp64, then the first numbers turned as complex numbers.
    row = k[4].double()
    row = (row - row.mean()) / (row.var(correction=0) + EPS).sqrt() * norm[0].double() + norm[1].double()
    pairs = row[:size].unflatten(0, (-1, 2)) if interleaved else row[:size].unflatten(0, (2, -1)).T
    angles = positions[4] * 1e4 ** (-torch.arange(size // 2).double() / max(size // 2, 1))
    pairs = torch.view_as_real(torch.complex(pairs[:, 0], pairs[:, 1]) * torch.exp(1j * angles))
    row[:size] = pairs.flatten() if interleaved else pairs.T.flatten()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(caches[0].flatten(0, 1)[slots[4]].double(), row, **close)


def test_an_index_key_with_a_negative_slot_is_not_stored():
    cache, norm = torch.zeros(3, 4, 8), (torch.ones(8), torch.zeros(8))
    q, k, tables = torch.ones(3, 2, 8), torch.randn(3, 8), rotary.tables(9, Rope(theta=1e4, size=4), "cpu")
    slots = torch.tensor([5, -1, -1])
    inputs = rotary.RopeInputs(tables, torch.tensor([1, 2, 3]), slots)
    index.rope_and_cache(q, k, norm, EPS, inputs, cache)
    assert cache.flatten(0, 1).any(1).nonzero().flatten().tolist() == [5]
