"""Caches in fp8 in the interpreter: what is stored, attention over it against the reference, and the same bits in any batch.

The interpreter reads fp8 rightly, but rounds ties, small numbers and what goes up to a power of two otherwise than the hardware:
so what is stored here is rounded nowhere.
"""

import numpy as np
import pytest
import torch

from expertwire.kernels.gpu import attention as gpu_attention
from expertwire.kernels.gpu import mla as gpu_mla
from expertwire.kernels.gpu import mla_rope_and_cache
from expertwire.kernels.gpu import prefill as gpu_prefill
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.rope_and_cache import rope_and_cache
from expertwire.kernels.ops import attention, mla, rotary
from expertwire.kernels.ops.attention import FP8
from expertwire.kernels.ops.variants import Rope

DEVICE = Device(arch=90, num_sms=1)
CONFIG = gpu_attention.AttentionTileConfig(decode_rows=16, rows=16, keys=16, split=32, least_warps=4, num_stages=2)
LATENT_CONFIG = gpu_mla.MlaTileConfig(rows=16, keys=16, split=32, column_splits=1, num_warps=4, num_stages=2)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}
HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 32, 16
SCALES, SCALE = torch.tensor([[0.5, 0.037], [0.11, 3.0]]), torch.tensor([0.21])
ROPE = Rope(theta=1e4, size=16)
BATCH = [(1, 8), (1, 65), (3, 3), (16, 30)]  # (queries, known tokens) of each sequence


def scene(batch, dtype, *shape, heads=HEADS, width=DIM):
    """Queries, a cache of tokens of `shape` that is no number wherever no sequence has stored, and the description."""
    generator = torch.Generator().manual_seed(0)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    blocks = -(-lengths // BLOCK)
    ids = 1 + np.random.default_rng(0).permutation(int(blocks.sum()))
    tables = np.zeros((len(batch), int(blocks.max())), np.int32)
    cache = torch.full((len(ids) + 1, BLOCK, *shape), float("nan"))
    for b, length in enumerate(lengths):
        tables[b, : blocks[b]], ids = ids[: blocks[b]], ids[blocks[b] :]
        at = np.arange(length)
        cache[tables[b, at // BLOCK], at % BLOCK] = 2 * torch.randn(length, *shape, generator=generator)
    q = torch.randn(int(nums.sum()), heads, width, generator=generator).to(dtype)
    return q, cache.to(FP8), attention.describe(nums, lengths, torch.from_numpy(tables))


def representable(*shape, scale=1.0):
    """Return normal fp8 numbers times a power of two, and some that saturate."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(8, 127, shape, generator=generator) + 128 * torch.randint(0, 2, shape, generator=generator)
    numbers = codes.to(torch.uint8).view(FP8).float() * scale
    return torch.where(numbers.abs() > 350 * scale, 4 * numbers, numbers)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks_H": torch.linspace(-2, 3, HEADS)}], ids=str)
def test_attention(dtype, options):
    q, kv, seqs = scene(BATCH, dtype, 2 * KV_HEADS, DIM)
    k, v = (part.contiguous() for part in kv.split(KV_HEADS, 2))
    options = attention.AttentionOptions(kv_scales_2G=SCALES, **options)
    expected = attention.reference(q, k, v, seqs, options)
    run = {"options": options, "device": DEVICE, "config": CONFIG}
    found = gpu_attention.attend(q, k, v, seqs, **run)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    fast = gpu_prefill.attend(q, k, v, seqs, options, device=DEVICE)
    torch.testing.assert_close(fast, expected, **TOLERANCE[dtype])
    if dtype == torch.float32:
        return  # numpy's products of fp32 hang on where a row stands
    for b, length in enumerate(seqs.seq_lens):  # the last query of each sequence alone
        row = seqs.cu_seqlens_q[b + 1] - 1
        alone = attention.describe([1], [length], seqs.block_table[b : b + 1])
        assert torch.equal(gpu_attention.attend(q[row : row + 1], k, v, alone, **run)[0], found[row]), b


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_latent_attention(dtype):
    q, cache, seqs = scene(BATCH, dtype, 48, width=48)
    run = {"rank": 32, "scale": 0.2, "kv_scale": SCALE}
    expected = mla.reference(q, cache, seqs, **run)
    found = gpu_mla.attend(q, cache, seqs, DEVICE, config=LATENT_CONFIG, **run)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("size", "interleaved"), [(DIM, False), (DIM, True), (16, False), (0, False)])
def test_stored_keys_and_values(dtype, size, interleaved):
    scales = torch.tensor([[0.5, 4.0], [0.25, 2.0]])
    queries = torch.randn(5, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    qkv = torch.cat((queries, representable(5, 2 * KV_HEADS, DIM, scale=scales.view(-1, 1))), 1).to(dtype)
    tables = rotary.tables(50, Rope(theta=1e4, size=size), "cpu")
    positions, slots = torch.zeros(5, dtype=torch.int64), torch.tensor([17, 3, 30, 0, 9])  # at position 0 nothing turns
    arguments = qkv, None, 1e-6, rotary.RopeInputs(tables, positions, slots, interleaved)
    expected, found = ([torch.zeros(2, BLOCK, KV_HEADS, DIM, dtype=FP8) for _ in range(2)] for _ in range(2))
    q = attention.rope_and_cache(*arguments, *expected, scales)
    actual = rope_and_cache(*arguments, *found, scales)
    assert torch.equal(actual, q)
    for cache, right in zip(found, expected, strict=True):
        assert (right.float().abs() == 448).any(), "nothing saturates"
        assert torch.equal(cache.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("interleaved", [False, True])
def test_stored_latents(interleaved):
    generator, scale = torch.Generator().manual_seed(0), torch.tensor([0.5])
    q, positions = torch.randn(3, 9, 16, generator=generator), torch.zeros(3, dtype=torch.int64)
    signs = 2.0 * torch.randint(0, 2, (3, 32), generator=generator) - 1  # of mean square 1
    kv = torch.cat((signs, representable(3, 16, scale=0.5)), 1)
    norm, slots, tables = representable(32, scale=0.5), torch.tensor([17, 3, -1]), rotary.tables(50, ROPE, "cpu")
    expected, found = (torch.zeros(2, BLOCK, 48, dtype=FP8) for _ in range(2))
    two, three = (rotary.RopeInputs(tables, positions[:num], slots[:num], interleaved) for num in (2, 3))
    mla.rope_and_cache(q[:2], kv[:2], norm, 0.0, two, expected, kv_scale=scale)
    mla_rope_and_cache.rope_and_cache(q, kv, norm, 0.0, three, found, kv_scale=scale)
    assert (expected.float().abs().sum(-1) > 0).sum() == 2
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
