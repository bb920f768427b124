"""The indexer chooses the positions that score best, of equals the first, from those that a query may see, in ascending order."""

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import attention, index

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
# (queries, known tokens) of each sequence; single queries first.
BATCH = [(1, 1), (1, 16), (1, 90), (5, 5), (40, 64), (9, 130)]


def scene(batch, dtype, *, heads=4, dim=16, block=4, seed=0):
    """Queries and weights, a cache that is NaN wherever no sequence has stored, and the description."""
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    blocks = -(-lengths // block)
    ids = 1 + np.random.default_rng(seed).permutation(int(blocks.sum()))
    tables = np.zeros((len(batch), int(blocks.max()) + 1), np.int32)
    cache = torch.full((len(ids) + 1, block, dim), float("nan"), dtype=dtype)
    for b, length in enumerate(lengths):
        tables[b, : blocks[b]], ids = ids[: blocks[b]], ids[blocks[b] :]
        at = np.arange(length)
        # Whole numbers: all sums are exact, in any order.
        cache[tables[b, at // block], at % block] = torch.randint(-3, 4, (length, dim), generator=generator).to(dtype)
    q = torch.randint(-3, 4, (int(nums.sum()), heads, dim), generator=generator).to(dtype)
    weights = torch.randint(-2, 5, (len(q), heads), generator=generator).float()
    seqs = attention.describe(nums, lengths, torch.from_numpy(tables))
    return q, weights, cache, seqs


def by_hand(q, weights, cache, seqs, top_k):
    """Scores in fp64, sorted as (score, position) pairs."""
    rows = []
    for b, length in enumerate(seqs.seq_lens):
        keys = cache[seqs.block_table[b]].flatten(0, 1).double()
        for row in range(seqs.cu_seqlens_q[b], seqs.cu_seqlens_q[b + 1]):
            position = length - seqs.cu_seqlens_q[b + 1] + row
            scores = [
                sum(
                    float(w) * max(0.0, float(head.double() @ keys[p]))
                    for w, head in zip(weights[row], q[row], strict=True)
                )
                for p in range(position + 1)
            ]
            best = sorted(sorted(range(position + 1), key=lambda p: (-scores[p], p))[:top_k])
            rows.append(best + [-1] * (top_k - len(best)))
    return torch.tensor(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 7, 64, 200])
def test_the_best_of_equals_the_first(dtype, top_k):
    q, weights, cache, seqs = scene(BATCH, dtype)
    expected = by_hand(q, weights, cache, seqs, top_k)
    assert torch.equal(index.reference(q, weights, cache, seqs, top_k), expected)
    for name, ops in OPS.items():
        assert torch.equal(ops.choose_positions(q, weights, cache, seqs, top_k), expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim", "block"), [(1, 8, 1), (64, 32, 16), (33, 24, 3), (13, 64, 16)])
def test_shapes(dtype, heads, dim, block):
    batch = [(1, 70), (3, 40)]
    q, weights, cache, seqs = scene(batch, dtype, heads=heads, dim=dim, block=block)
    assert torch.equal(OPS["cpu"].choose_positions(q, weights, cache, seqs, 20), by_hand(q, weights, cache, seqs, 20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_choice_depends_on_a_querys_own_sequence_alone(dtype):
    """With numbers that round: nearly equal scores would change places if their sums did."""
    q, _, cache, seqs = scene(BATCH, dtype, heads=40)
    generator = torch.Generator().manual_seed(1)
    q, cache = (1e-3 * torch.randn(x.shape, generator=generator).to(dtype) + 1 for x in (q, cache))
    weights = torch.rand(len(q), 40, generator=generator) - 0.5
    whole = OPS["cpu"].choose_positions(q, weights, cache, seqs, 50)
    for b, (num, length) in enumerate(BATCH):
        for start, end in {(0, num), (0, 1), (num - 1, num), (num // 3, num)}:
            rows = slice(seqs.cu_seqlens_q[b] + start, seqs.cu_seqlens_q[b] + end)
            one = attention.describe([end - start], [length - num + end], seqs.block_table[b : b + 1])
            found = OPS["cpu"].choose_positions(q[rows].contiguous(), weights[rows], cache, one, 50)
            assert torch.equal(found, whole[rows]), (b, start, end)
