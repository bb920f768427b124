"""Sequences that begin with the same blocks, such as the branches of a prompt, have the bits that each has alone, on a CPU."""

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import attention
from expertwire.kernels.ops.attention import AttentionOptions

ATTEND, BLOCK, KV_HEADS = registry.choose("cpu").attend, 4, 2
# (queries, known tokens, blocks shared with the sequence before) of each sequence; single queries first.
BATCHES = {
    "branches": [(1, 200, 0), (1, 200, 40), (1, 196, 40), (1, 230, 32), (1, 129, 32)],
    "two prompts and a stranger": [(1, 150, 0), (1, 170, 30), (1, 90, 0), (1, 180, 0), (1, 181, 45)],
    "less than a panel": [(1, 40, 0), (1, 40, 5), (1, 33, 8)],
    "all but the last token": [(1, 65, 0), (1, 65, 16), (1, 64, 16)],
    "prompts behind a prefix": [(1, 130, 0), (30, 160, 32), (70, 210, 24), (9, 9, 2)],
    "windows over pieces": [(90, 400, 0), (90, 400, 60), (200, 400, 75)],
}
OPTIONS = {
    "plain": AttentionOptions(),
    "window": AttentionOptions(window=70),
    "chunk": AttentionOptions(chunk=96),
    "sinks": AttentionOptions(window=40, sinks_H=torch.linspace(-1, 1, 6)),
}


def scene(batch, dtype, dim):
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    counts = [-(-length // BLOCK) for _, length, _ in batch]
    ids, tables = 1 + rng.permutation(sum(counts)).astype(np.int32), np.zeros((len(batch), max(counts)), np.int32)
    for b, (count, (_, _, shared)) in enumerate(zip(counts, batch, strict=True)):
        tables[b, :count], ids = ids[:count], ids[count:]
        if shared:
            tables[b, :shared] = tables[b - 1, :shared]
    q = torch.randn(sum(num for num, _, _ in batch), 6, dim, generator=generator).to(dtype)
    k, v = (torch.randn(1 + sum(counts), BLOCK, KV_HEADS, dim, generator=generator).to(dtype) for _ in range(2))
    return q, k, v, torch.from_numpy(tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [32, 24])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_bits_are_those_of_each_sequence_alone(batch, options, dim, dtype):
    q, k, v, tables = scene(batch, dtype, dim)
    nums, lengths = [num for num, _, _ in batch], [length for _, length, _ in batch]
    together = ATTEND(q, k, v, attention.describe(nums, lengths, tables), options)
    row = 0
    for b, (num, length) in enumerate(zip(nums, lengths, strict=True)):
        alone = attention.describe([num], [length], tables[b : b + 1])
        assert torch.equal(together[row : row + num], ATTEND(q[row : row + num], k, v, alone, options)), b
        row += num


def test_bits_are_those_of_each_sequence_alone_with_keys_in_fp8():
    batch = BATCHES["branches"]
    q, k, v, tables = scene(batch, torch.bfloat16, 32)
    scales = torch.full((2, KV_HEADS), 0.5)
    k, v = (attention.quantize(cache, torch.tensor(0.5), attention.FP8) for cache in (k, v))
    options, nums, lengths = AttentionOptions(kv_scales_2G=scales), [1] * len(batch), [length for _, length, _ in batch]
    together = ATTEND(q, k, v, attention.describe(nums, lengths, tables), options)
    for b, length in enumerate(lengths):
        alone = attention.describe([1], [length], tables[b : b + 1])
        assert torch.equal(together[b : b + 1], ATTEND(q[b : b + 1], k, v, alone, options)), b
