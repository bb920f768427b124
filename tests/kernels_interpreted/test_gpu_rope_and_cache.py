"""Norms, rope and cache write in one kernel, in the interpreter, against the reference."""

import pytest
import torch

from expertwire.kernels.gpu.rope_and_cache import rope_and_cache
from expertwire.kernels.ops import attention, rotary
from expertwire.kernels.ops.rotary import RopeInputs
from expertwire.kernels.ops.variants import Rope

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}
BLOCKS, EPS = 3, 1e-6


def scene(dtype, *, tokens=5, heads=6, kv_heads=2, dim=32, rotated=None, block=4, norm=True, interleaved=False, seed=0):
    """Return the arguments of both, with poisoned caches; the tokens' slots are spread over the blocks."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
    weights = torch.rand(heads + kv_heads, dim, generator=generator).to(dtype) + 0.5 if norm else None
    tables = rotary.tables(50, Rope(theta=1e4, size=dim if rotated is None else rotated), "cpu")
    positions = torch.randint(0, 50, (tokens,), generator=generator)
    slots = torch.randperm(BLOCKS * block, generator=generator)[:tokens]
    caches = [torch.full((BLOCKS, block, kv_heads, dim), float("nan"), dtype=dtype) for _ in range(2)]
    return qkv, weights, EPS, RopeInputs(tables, positions, slots, interleaved), *caches


def check(dtype, **shapes):
    expected, actual = scene(dtype, **shapes), scene(dtype, **shapes)
    q_expected = attention.rope_and_cache(*expected)
    q_actual = rope_and_cache(*actual, out=torch.full_like(q_expected, float("nan")))
    torch.testing.assert_close(q_actual, q_expected, **TOLERANCE[dtype])
    for ours, theirs in zip(actual[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype], equal_nan=True)
    assert torch.equal(actual[-1].nan_to_num(), expected[-1].nan_to_num())


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_reference(dtype, norm, interleaved):
    check(dtype, norm=norm, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("dim", "rotated"), [(64, 16), (80, 80), (96, 24), (48, 32), (48, 0), (64, 0)])
def test_part_of_the_head(dim, rotated, interleaved):
    check(torch.float32, dim=dim, rotated=rotated, interleaved=interleaved)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (16, 1), (12, 2)])
def test_heads(heads, kv_heads):
    check(torch.float32, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("tokens", [0, 1, BLOCKS * 16])
def test_tokens(tokens):
    check(torch.float32, tokens=tokens, block=16)


def test_interleaved_is_complex_multiplication():
    qkv, *others = scene(torch.float32, norm=False, interleaved=True)
    q, positions = rope_and_cache(qkv, *others), others[2].positions_T
    angles = positions[:, None, None].double() * 1e4 ** (-torch.arange(16).double() / 16)
    expected = torch.view_as_complex(qkv[:, :6].double().unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angles)
    torch.testing.assert_close(q, torch.view_as_real(expected).flatten(-2).float())


def test_negative_slots_are_not_stored():
    *others, inputs, k_cache, v_cache = scene(torch.float32)
    inputs.slot_mapping_T[1:] = -1
    q = rope_and_cache(*others, inputs, k_cache, v_cache)
    assert not q.isnan().any()
    for cache in (k_cache, v_cache):
        stored = ~cache.flatten(0, 1).isnan().any(-1).any(-1)
        assert stored.nonzero().flatten().tolist() == [int(inputs.slot_mapping_T[0])]
