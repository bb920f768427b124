"""Norm, rotation and storing of keys and values, then causal attention over the paged cache, against plain formulas."""

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import attention, rms_norm, rotary
from expertwire.kernels.ops.variants import Rope

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2**-6, "atol": 2**-7}}
HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 32, 4

# (queries, known tokens) of each sequence; single queries first.
BATCHES = {
    "nothing": [],
    "one token": [(1, 1)],
    "decode": [(1, 9), (1, 1), (1, 40), (1, 4)],
    "whole prefill": [(7, 7)],
    "a block exactly": [(BLOCK, BLOCK)],
    "chunk": [(5, 17)],
    "two last tokens": [(2, 33)],
    "mixed": [(1, 8), (1, 31), (3, 3), (6, 30), (16, 16)],
    "long": [(1, 300), (40, 300)],
}


def scene(batch, dtype, seed=0, dim=DIM, heads=HEADS):
    """Queries, caches full of other sequences' values, and the description of `batch`."""
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    blocks = [-(-length // BLOCK) for _, length in batch]
    num_blocks = 3 + sum(blocks)
    ids = 1 + np.random.default_rng(seed).permutation(num_blocks - 1)
    tables = np.zeros((len(batch), max(blocks, default=1) + 2), np.int32)
    for b, count in enumerate(blocks):
        tables[b, :count], ids = ids[:count], ids[count:]
    q = torch.randn(int(nums.sum()), heads, dim, generator=generator).to(dtype)
    k, v = (2 * torch.randn(num_blocks, BLOCK, KV_HEADS, dim, generator=generator).to(dtype) for _ in range(2))
    seqs = attention.describe(nums, lengths, torch.from_numpy(tables))
    return q, k, v, seqs, tables


def formula(q, k, v, batch, tables):
    """Softmax over the visible positions, a query and a head at a time, in fp64."""
    out, row = torch.empty(q.shape, dtype=torch.float64), 0
    for b, (num, length) in enumerate(batch):
        positions = np.arange(length)
        keys, values = (c[tables[b, positions // BLOCK], positions % BLOCK].double() for c in (k, v))
        for position in range(length - num, length):
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // KV_HEADS)
                logits = keys[: position + 1, group] @ q[row, head].double() / q.shape[2] ** 0.5
                out[row, head] = logits.softmax(0) @ values[: position + 1, group]
            row += 1
    return out


@pytest.mark.parametrize("attend", [attention.reference, *(ops.attend for ops in OPS.values())], ids=["spec", *OPS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_attend(attend, dtype, name):
    q, k, v, seqs, tables = scene(BATCHES[name], dtype)
    out = attend(q, k, v, seqs)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    expected = formula(q, k, v, BATCHES[name], tables)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize(("heads", "dim"), [(2, 16), (2, 128), (8, 24), (10, 32), (4, 1), (6, 12)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_heads(ops, dtype, heads, dim):
    batch = [(1, 13), (4, 9)]
    q, k, v, seqs, tables = scene(batch, dtype, dim=dim, heads=heads)
    expected = formula(q, k, v, batch, tables)
    tolerance = {"rtol": 1e-5, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-5}
    torch.testing.assert_close(ops.attend(q, k, v, seqs).double(), expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "garbage"), [("cpu", (float("nan"), float("nan"))), ("torch", (1e4, -1e4))])
def test_what_is_not_visible_has_no_influence(dtype, name, garbage):
    ops, batch = OPS[name], BATCHES["mixed"]
    q, k, v, seqs, tables = scene(batch, dtype)
    before = ops.attend(q, k, v, seqs)
    known = {(tables[b, p // BLOCK], p % BLOCK) for b, (_, length) in enumerate(batch) for p in range(length)}
    for block in range(k.shape[0]):
        for offset in range(BLOCK):
            if (block, offset) not in known:
                k[block, offset], v[block, offset] = garbage
    assert torch.equal(ops.attend(q, k, v, seqs), before)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_large_scores_do_not_overflow(ops):
    q, k, v, seqs, tables = scene(BATCHES["mixed"], torch.float32)
    out = ops.attend(100 * q, k, v, seqs)
    expected = formula(100 * q, k, v, BATCHES["mixed"], tables)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(HEADS, DIM), (2, 64), (14, 24)])
def test_bits_of_a_query_depend_on_what_it_sees_alone(dtype, heads, dim):
    batch = [(1, 9), (1, 40), (5, 17), (60, 100), (16, 16)]
    q, k, v, seqs, _ = scene(batch, dtype, dim=dim, heads=heads)
    whole = OPS["cpu"].attend(q, k, v, seqs)
    for b, (num, length) in enumerate(batch):
        for skip, left in {(0, num), (0, 1), (num - 1, 1), (num // 2, num - num // 2), (num // 3, num // 2)}:
            if left:
                # Fewer queries, and nothing behind the last of them.
                alone = attention.describe([left], [length - num + skip + left], seqs.block_table[b : b + 1])
                first = seqs.cu_seqlens_q[b] + skip
                found = OPS["cpu"].attend(q[first : first + left].contiguous(), k, v, alone)
                assert torch.equal(found, whole[first : first + left]), (b, skip, left)


def test_single_queries_come_first():
    with pytest.raises(AssertionError, match="come first"):
        attention.describe([3, 1], [3, 9], torch.zeros(2, 3, dtype=torch.int32))


def rotated(x, positions, interleaved):
    """The reference, which knows halves only."""
    if not interleaved or x.shape[-1] == 0:
        return x if x.shape[-1] == 0 else rotary.reference(x, positions, 1e4)
    halves = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    return rotary.reference(halves, positions, 1e4).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("size", [DIM, 8, 6, 0])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_and_cache(ops, dtype, with_norm, num_tokens, size, interleaved):
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(num_tokens, HEADS + 2 * KV_HEADS, DIM, generator=generator).to(dtype)
    norm = (1 + 0.3 * torch.randn(HEADS + KV_HEADS, DIM, generator=generator)).to(dtype) if with_norm else None
    positions = torch.randint(0, 500, (num_tokens,), generator=generator)
    slots = torch.randperm(5 * BLOCK, generator=generator)[:num_tokens]
    k, v = (torch.randn(5, BLOCK, KV_HEADS, DIM, generator=generator).to(dtype) for _ in range(2))
    caches = k.clone(), v.clone()
    tables = rotary.tables(500, Rope(theta=1e4, size=size), "cpu")
    inputs = rotary.RopeInputs(tables, positions, slots, interleaved)
    q = ops.rope_and_cache(qkv, norm, 1e-6, inputs, *caches)

    heads = qkv[:, : HEADS + KV_HEADS].float()
    if with_norm:
        heads = rms_norm.reference(heads, torch.ones(DIM), 1e-6) * norm.float()
    turned = torch.cat((rotated(heads[..., :size], positions, interleaved), heads[..., size:]), -1)
    tolerance = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-10}}[dtype]
    torch.testing.assert_close(q.float(), turned[:, :HEADS], **tolerance)
    stored_k, stored_v = (c.flatten(0, 1) for c in caches)
    torch.testing.assert_close(stored_k[slots].float(), turned[:, HEADS:], **tolerance)
    assert torch.equal(stored_v[slots], qkv[:, HEADS + KV_HEADS :])
    others = torch.ones(5 * BLOCK, dtype=torch.bool)
    others[slots] = False
    assert torch.equal(stored_k[others], k.flatten(0, 1)[others])
    assert torch.equal(stored_v[others], v.flatten(0, 1)[others])
