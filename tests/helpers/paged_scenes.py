"""Sequences with paged caches, for the tests of attention kernels."""

import numpy as np
import torch

from expertwire.kernels.ops import attention

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}
BLOCK = 16

# (queries, known tokens) of each sequence; single queries first.
BATCHES = {
    "one token": [(1, 1)],
    "around a block": [(1, BLOCK - 1), (1, BLOCK), (1, BLOCK + 1)],
    "several splits": [(1, 32), (1, 33), (1, 95), (1, 97)],
    "whole prefill": [(17, 17)],
    "chunk": [(5, 70)],
    "mixed": [(1, 8), (1, 65), (3, 3), (16, 30), (21, 64)],
}


def scene(batch, dtype, *, heads=4, kv_heads=2, dim=32, block=BLOCK, seed=0, unused=0):
    """Queries, caches poisoned wherever no sequence has stored, the description for the reference and that for a GPU.

    `unused` sequences without queries, with a row each, stand last.
    """
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    counts = -(-lengths // block)
    ids = 1 + np.random.default_rng(seed).permutation(int(counts.sum()))
    tables = np.zeros((len(batch), int(counts.max())), np.int32)
    q = torch.randn(int(nums.sum()) + unused, heads, dim, generator=generator).to(dtype)
    k, v = (torch.full((len(ids) + 1, block, kv_heads, dim), float("nan"), dtype=dtype) for _ in range(2))
    for b, count in enumerate(counts):
        tables[b, :count], ids = ids[:count], ids[count:]
        for position in range(lengths[b]):
            for cache in (k, v):
                drawn = torch.randn(kv_heads, dim, generator=generator)
                cache[tables[b, position // block], position % block] = drawn.to(dtype)
    host = attention.describe(nums, lengths, torch.from_numpy(tables))
    rows, known = [*nums.tolist(), *[0] * unused], [*lengths.tolist(), *[0] * unused]
    padded = torch.from_numpy(np.pad(tables, ((0, unused), (0, 0))))
    device = attention.describe(rows, known, padded)
    return q, k, v, host, device
