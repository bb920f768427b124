"""Caches in fp8: what is stored, byte for byte, and attention over it, against plain formulas and the reference."""

import numpy as np
import pytest
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels import registry
from expertwire.kernels.cpu._llvm import allocating_jit, as_array, copy_row, divide_row, load, round_like, vectors
from expertwire.kernels.ops import attention, mla, rotary
from expertwire.kernels.ops.attention import AttentionOptions
from expertwire.kernels.ops.rotary import RopeInputs
from expertwire.kernels.ops.variants import Rope

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
FP8 = attention.FP8
HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 32, 4
BATCH = [(1, 8), (1, 31), (1, 300), (3, 3), (6, 30), (40, 300)]
SCALES = torch.tensor([[0.5, 0.037], [0.11, 3.0]])
SCALED = AttentionOptions(kv_scales_2G=SCALES)
# Probabilities are rounded to bf16, by up to 2**-9 of them, before they meet values of up to 9: by up to 9 * 2**-9 in all.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2**-6, "atol": 9 * 2**-9}}


@intrinsic
def _round_trip(context, x, stored, y):
    """Sixteen numbers to fp8 and back, in vectors."""

    def generate(context, b, signature, args):
        zero = ir.Constant(ir.IntType(64), 0)
        source, code, target = (
            vectors.pointer(context, b, kind, arg, zero, context.get_data_type(kind.dtype))
            for kind, arg in zip(signature.args, args, strict=True)
        )
        vectors.store_numbers(b, vectors.load_numbers(b, source, zero, bits=32), code, zero, bits=8)
        vectors.store_numbers(b, vectors.load_numbers(b, code, zero, bits=8), target, zero, bits=32)
        return context.get_dummy_value()

    return types.void(x, stored, y), generate


@allocating_jit
def _by_vectors(x_N, stored_N, y_N):
    for i in range(0, len(x_N), 16):
        _round_trip(x_N[i : i + 16], stored_N[i : i + 16], y_N[i : i + 16])


@allocating_jit
def _one_by_one(x_N, stored_N, y_N):
    for i in range(len(x_N)):
        stored_N[i] = round_like(x_N[i], stored_N[i])
        y_N[i] = load(stored_N[i])


def hard_numbers():
    """All fp8 numbers, those halfway between two, their neighbours, and what saturates."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    sizes = codes[:127]
    halfway = (sizes[1:] + sizes[:-1]) / 2
    near = torch.cat(
        (torch.nextafter(halfway, torch.tensor(0.0)), halfway, torch.nextafter(halfway, torch.tensor(500.0)))
    )
    far = torch.tensor([448.0, 449.0, 463.9, 464.0, 465.0, 1e4, 3e38, torch.inf, torch.nan, 1e-20, 1e-40, 2**-10])
    spread = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 4096)
    x = torch.cat((codes, near, -near, far, -far, spread))
    return torch.nn.functional.pad(x, (0, -len(x) % 16))


@pytest.mark.parametrize("convert", [_by_vectors, _one_by_one], ids=["vectors", "one by one"])
def test_every_rounding_is_torchs(convert):
    x = hard_numbers()
    stored, back = torch.empty(len(x), dtype=FP8), torch.empty_like(x)
    convert(x.numpy(), as_array(stored), back.numpy())
    expected = attention.quantize(x, torch.ones(1), FP8)
    numbers = ~x.isnan()
    assert torch.equal(stored.view(torch.uint8)[numbers], expected.view(torch.uint8)[numbers])
    torch.testing.assert_close(back, expected.float(), rtol=0, atol=0, equal_nan=True)
    assert (back[numbers].abs() <= 448).all()


@pytest.mark.parametrize("size", [7, 32, 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(dtype, size):
    x = (100 * torch.randn(size, generator=torch.Generator().manual_seed(size))).to(dtype)
    stored, back = torch.empty(size, dtype=FP8), torch.empty_like(x)
    divide_row(as_array(x), np.float32(0.3), as_array(stored))
    copy_row(as_array(stored), as_array(back))
    expected = attention.quantize(x, torch.tensor([0.3]), FP8)
    assert torch.equal(stored.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(back, expected.to(dtype))


def scene(dtype, dim=DIM, heads=HEADS, num_kv=KV_HEADS, batch=BATCH, seed=0):
    """Queries, fp8 caches whose unknown rows are no numbers, and the description."""
    generator = torch.Generator().manual_seed(seed)
    nums, lengths = (np.array([s[i] for s in batch], np.int64) for i in (0, 1))
    blocks = -(-lengths // BLOCK)
    ids = 1 + np.random.default_rng(seed).permutation(int(blocks.sum()))
    tables = np.zeros((len(batch), int(blocks.max()) + 1), np.int32)
    caches = [torch.full((len(ids) + 1, BLOCK, num_kv, dim), float("nan")) for _ in range(2)]
    for b, length in enumerate(lengths):
        tables[b, : blocks[b]], ids = ids[: blocks[b]], ids[blocks[b] :]
        at = np.arange(length)
        for cache in caches:
            cache[tables[b, at // BLOCK], at % BLOCK] = 2 * torch.randn(length, num_kv, dim, generator=generator)
    q = torch.randn(int(nums.sum()), heads, dim, generator=generator).to(dtype)
    seqs = attention.describe(nums, lengths, torch.from_numpy(tables))
    return q, *(cache.to(FP8) for cache in caches), seqs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"sinks_H": torch.linspace(-2, 3, HEADS)}], ids=str)
@pytest.mark.parametrize("name", ["spec", *OPS])
def test_attend_is_that_of_the_numbers_that_the_cache_stands_for(name, options, dtype):
    q, k, v, seqs = scene(dtype)
    attend = attention.reference if name == "spec" else OPS[name].attend
    if name == "torch":  # whose masks weigh what is hidden with zero
        k, v = (cache.float().nan_to_num().to(FP8) for cache in (k, v))
    found = attend(q, k, v, seqs, AttentionOptions(kv_scales_2G=SCALES, **options))
    k, v = (cache.float() * scales[:, None] for cache, scales in zip((k, v), SCALES, strict=True))
    expected = attention.reference(q.float(), k, v, seqs, AttentionOptions(**options))
    torch.testing.assert_close(found.float(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(2, 128), (8, 24), (6, 12)])
def test_heads_of_any_size(dtype, heads, dim):
    q, k, v, seqs = scene(dtype, dim, heads)
    expected = attention.reference(q, k, v, seqs, SCALED)
    torch.testing.assert_close(OPS["cpu"].attend(q, k, v, seqs, SCALED), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_query_depend_on_what_it_sees_alone(dtype):
    q, k, v, seqs = scene(dtype)
    whole = OPS["cpu"].attend(q, k, v, seqs, SCALED)
    for b, (num, length) in enumerate(BATCH):
        row = seqs.cu_seqlens_q[b] + num // 2
        alone = attention.describe([1], [length - num + num // 2 + 1], seqs.block_table[b : b + 1])
        found = OPS["cpu"].attend(q[row : row + 1].contiguous(), k, v, alone, SCALED)
        assert torch.equal(found, whole[row : row + 1]), b


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_stored_are_the_bytes_of_the_reference(dtype):
    """Heads that are neither normed nor rotated: what is stored does not hang on how these round."""
    generator = torch.Generator().manual_seed(1)
    qkv = (30 * torch.randn(9, HEADS + 2 * KV_HEADS, DIM, generator=generator)).to(dtype)
    positions, slots = torch.arange(9), torch.randperm(5 * BLOCK, generator=generator)[:9]
    tables = rotary.tables(500, Rope(theta=1e4, size=0), "cpu")
    expected = [
        attention.quantize(qkv[:, 6:8], SCALES[0, :, None], FP8),
        attention.quantize(qkv[:, 8:], SCALES[1, :, None], FP8),
    ]
    assert (expected[0].float().abs() == 448).any(), "nothing saturates"
    for ops in OPS.values():
        caches = [torch.zeros(5, BLOCK, KV_HEADS, DIM, dtype=FP8) for _ in range(2)]
        ops.rope_and_cache(qkv, None, 1e-6, RopeInputs(tables, positions, slots), *caches, SCALES)
        for cache, rows in zip(caches, expected, strict=True):
            stored = cache.view(torch.uint8).flatten(0, 1)
            assert torch.equal(stored[slots], rows.view(torch.uint8))
            assert stored.view(-1, KV_HEADS * DIM).any(1).sum() == 9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_what_is_stored_is_what_a_cache_of_the_queries_dtype_would_hold(dtype, interleaved):
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(9, HEADS + 2 * KV_HEADS, DIM, generator=generator).to(dtype)
    norm = (1 + 0.3 * torch.randn(HEADS + KV_HEADS, DIM, generator=generator)).to(dtype)
    positions, slots = torch.randint(0, 500, (9,), generator=generator), torch.arange(9)
    tables = rotary.tables(500, Rope(theta=1e4, size=DIM), "cpu")
    for ops in OPS.values():
        plain, fp8 = ([torch.zeros(5, BLOCK, KV_HEADS, DIM, dtype=kind) for _ in range(2)] for kind in (dtype, FP8))
        arguments = qkv, norm, 1e-6, RopeInputs(tables, positions, slots, interleaved)
        before = ops.rope_and_cache(*arguments, *plain)
        after = ops.rope_and_cache(*arguments, *fp8, SCALES)
        assert torch.equal(before, after), "queries are not quantised"
        for cache, rows, scale in zip(fp8, plain, SCALES, strict=True):
            expected = attention.quantize(rows, scale[:, None], FP8)
            assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latents(dtype):
    generator, scale = torch.Generator().manual_seed(0), torch.tensor([0.21])
    q, kv = torch.randn(9, 3, 16, generator=generator).to(dtype), torch.randn(9, 48, generator=generator).to(dtype)
    norm = torch.rand(32, generator=generator).to(dtype) + 0.5
    tables = rotary.tables(200, Rope(theta=1e4, size=16), "cpu")
    positions, slots = torch.randint(0, 200, (9,), generator=generator), torch.arange(9)
    for ops in OPS.values():
        plain, fp8 = (torch.zeros(5, BLOCK, 48, dtype=kind) for kind in (dtype, FP8))
        arguments = q, kv, norm, 1e-6, RopeInputs(tables, positions, slots, interleaved=True)
        before = ops.rope_and_cache_latent(*arguments, plain)
        assert torch.equal(ops.rope_and_cache_latent(*arguments, fp8, kv_scale=scale), before)
        assert torch.equal(fp8.view(torch.uint8), attention.quantize(plain, scale, FP8).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_latent_attention(dtype, sparse):
    batch, scale = [(1, 1), (1, 90), (1, 1100), (5, 5), (30, 530)], torch.tensor([0.21])
    q, cache, _, seqs = scene(dtype, 48, 5, 1, batch)
    cache = cache[:, :, 0].contiguous()
    chosen = None
    if sparse:
        ends = np.concatenate([np.arange(length - num, length) for num, length in batch])
        chosen = torch.from_numpy(np.maximum(ends[:, None] - 3 * np.arange(20), -1))
    found = OPS["cpu"].attend_latent(q, cache, seqs, rank=32, scale=0.17, chosen=chosen, kv_scale=scale)
    expected = mla.reference(q.float(), cache.float() * scale, seqs, rank=32, scale=0.17, chosen=chosen)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2**-7 if dtype == torch.bfloat16 else 1e-5)
    spec = mla.reference(q, cache, seqs, rank=32, scale=0.17, chosen=chosen, kv_scale=scale)
    torch.testing.assert_close(found, spec, rtol=2**-7, atol=2**-7 if dtype == torch.bfloat16 else 1e-5)
