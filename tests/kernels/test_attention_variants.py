"""Windows, chunks, sinks and scales: what a query sees, and that nothing else moves a bit of it."""

import itertools

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import attention
from expertwire.kernels.ops.attention import AttentionOptions

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
ATTEND = {"spec": attention.reference, **{name: ops.attend for name, ops in OPS.items()}}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 3e-5}, torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6}}
SINKS = torch.tensor([-3.0, 0.0, 2.0, 30.0, -30.0, 1.0])
VARIANTS = {
    "window 1": {"window": 1},
    "window 5": {"window": 5},
    "window 16": {"window": 16},
    "window 33": {"window": 33},
    "window 1000": {"window": 1000},
    "chunk 1": {"chunk": 1},
    "chunk 16": {"chunk": 16},
    "chunk 24": {"chunk": 24},
    "window 20 chunk 30": {"window": 20, "chunk": 30},
    "sinks": {"sinks_H": SINKS},
    "gpt-oss": {"sinks_H": SINKS, "window": 20, "scale": 0.1},
}
# (queries, known tokens) of each sequence; single queries first.
BATCH = [(1, 1), (1, 16), (1, 17), (1, 90), (5, 5), (40, 64), (100, 260)]


def first_seen(position, window=0, chunk=0, **_):
    return (
        max(
            [
                p
                for p in range(position + 1)
                if (window and p <= position - window) or (chunk and p // chunk < position // chunk)
            ],
            default=-1,
        )
        + 1
    )


def scene(batch, dtype, options, *, heads=6, kv_heads=2, dim=32, block=4, seed=0, others=float("nan")):
    """Queries, caches that hold `others` wherever no query of its sequence sees them, the description, and keys and values [L].

    Blocks that a window has left are the null block.
    """
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    blocks = -(-lengths // block)
    ids = 1 + np.random.default_rng(seed).permutation(int(blocks.sum()))
    tables = np.zeros((len(batch), int(blocks.max()) + 1), np.int32)
    caches = [torch.full((len(ids) + 1, block, kv_heads, dim), others, dtype=dtype) for _ in range(2)]
    known = []
    for b, (num, length) in enumerate(batch):
        tables[b, : blocks[b]], ids = ids[: blocks[b]], ids[blocks[b] :]
        rows = [2 * torch.randn(length, kv_heads, dim, generator=generator).to(dtype) for _ in caches]
        first = first_seen(length - num, **options)
        tables[b, : first // block] = 0
        at = np.arange(first, length)
        for cache, row in zip(caches, rows, strict=True):
            cache[tables[b, at // block], at % block] = row[first:]
        known.append(rows)
    q = torch.randn(int(nums.sum()), heads, dim, generator=generator).to(dtype)
    return q, *caches, attention.describe(nums, lengths, torch.from_numpy(tables)), known


def formula(q, known, batch, *, scale=None, sinks_H=None, **options):
    """Softmax over the visible positions, a query and a head at a time, in fp64."""
    out, row = torch.empty(q.shape, dtype=torch.float64), 0
    scale = q.shape[2] ** -0.5 if scale is None else scale
    for (num, length), (keys, values) in zip(batch, known, strict=True):
        for position in range(length - num, length):
            seen = slice(first_seen(position, **options), position + 1)
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // keys.shape[1])
                logits = keys[seen, group].double() @ q[row, head].double() * scale
                if sinks_H is not None:
                    logits = torch.cat((logits, sinks_H[head : head + 1].double()))
                out[row, head] = logits.softmax(0)[: seen.stop - seen.start] @ values[seen, group].double()
            row += 1
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ATTEND)
def test_variants(name, variant, dtype):
    """Whatever else is in the cache is NaN, in the null block too."""
    options = VARIANTS[variant]
    q, k, v, seqs, known = scene(BATCH, dtype, options)
    found = ATTEND[name](q, k, v, seqs, AttentionOptions(**options))
    assert (found.shape, found.dtype) == (q.shape, dtype)
    torch.testing.assert_close(found.double(), formula(q, known, BATCH, **options), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block"), [(5, 1, 24, 3), (40, 1, 16, 16), (2, 2, 64, 16), (3, 3, 1, 1)]
)
def test_shapes(dtype, heads, kv_heads, dim, block):
    batch, options = [(1, 50), (9, 40), (70, 130)], {"window": 18, "sinks_H": torch.linspace(-2, 2, heads)}
    q, k, v, seqs, known = scene(batch, dtype, options, heads=heads, kv_heads=kv_heads, dim=dim, block=block)
    found = OPS["cpu"].attend(q, k, v, seqs, AttentionOptions(**options))
    torch.testing.assert_close(found.double(), formula(q, known, batch, **options), **TOLERANCE[dtype])


def alone(q, caches, seqs, b, start, end, length, options):
    """The queries [start, end) of sequence b, which then knows `length` tokens; blocks that they do not see are taken away."""
    table = seqs.block_table[b : b + 1].clone()
    table[:, : first_seen(length - (end - start), **options) // caches[0].shape[1]] = 0
    one = attention.describe([end - start], [length], table)
    return OPS["cpu"].attend(q[start:end].contiguous(), *caches, one, AttentionOptions(**options))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("variant", ["window 5", "window 33", "chunk 24", "window 20 chunk 30", "gpt-oss"])
@pytest.mark.parametrize(("heads", "dim"), [(6, 32), (2, 24)])
def test_bits_do_not_depend_on_how_queries_are_cut(dtype, variant, heads, dim):
    options = VARIANTS[variant]
    q, k, v, seqs, _ = scene(BATCH, dtype, options, heads=heads, dim=dim)
    whole = OPS["cpu"].attend(q, k, v, seqs, AttentionOptions(**options))
    for b, (num, length) in enumerate(BATCH):
        first = int(seqs.cu_seqlens_q[b])
        for size in {1, 7, 32, num}:
            for start in {0, num // 2, max(0, num - size)}:
                end = min(num, start + size)
                at = first + start, first + end
                found = alone(q, (k, v), seqs, b, *at, length - num + end, options)
                assert torch.equal(found, whole[slice(*at)]), (b, start, end)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_window_that_hides_nothing_and_no_window_have_the_same_bits(dtype):
    q, k, v, seqs, _ = scene(BATCH, dtype, {})
    plain = OPS["cpu"].attend(q, k, v, seqs)
    for options in ({"window": 260}, {"chunk": 260}, {"scale": 32**-0.5}, {"sinks_H": torch.full((6,), -float("inf"))}):
        assert torch.equal(OPS["cpu"].attend(q, k, v, seqs, AttentionOptions(**options)), plain), options


def test_a_sink_takes_weight_and_gives_no_value():
    q, k, v, seqs, _ = scene([(1, 7)], torch.float32, {}, heads=2)
    plain = OPS["cpu"].attend(q, k, v, seqs)
    # Equal to the sum of all weights: half of it is left.
    logits = torch.stack([k[seqs.block_table[0]].flatten(0, 1)[:7, g] @ q[0, g] * 32**-0.5 for g in range(2)])
    found = OPS["cpu"].attend(q, k, v, seqs, AttentionOptions(sinks_H=logits.logsumexp(1)))
    torch.testing.assert_close(found, plain / 2, rtol=1e-5, atol=1e-6)


def test_first_visible():
    for position, window, chunk in itertools.product(range(40), (0, 1, 2, 7, 16), (0, 1, 3, 16)):
        options = AttentionOptions(window=window, chunk=chunk)
        assert attention.first_visible(position, options) == first_seen(position, window, chunk)
