"""A layer's attention in one call has the bits of the ops called one by one. (The experts': tests/moe/test_layer.py.)"""

import dataclasses

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import attention, rotary
from expertwire.kernels.ops.attention import AttentionOptions
from expertwire.kernels.ops.attention_block import AttentionInputs, AttentionWeights, ComposedAttention
from expertwire.kernels.ops.rotary import RopeInputs
from expertwire.kernels.ops.variants import Rope

OPS = registry.choose("cpu")
HEADS, KV_HEADS, DIM, WIDTH, BLOCK, LONGEST = 6, 2, 32, 96, 16, 100
EPS = 1e-5


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape, seed, dtype, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def scene(batch, dtype, size=DIM):
    """Tables, positions, metadata and caches of the last tokens of sequences: (queries, known tokens) of each."""
    nums, lengths = (np.array([sequence[i] for sequence in batch]) for i in (0, 1))
    blocks = np.arange(1, 1 + len(batch) * 7, dtype=np.int32).reshape(len(batch), 7)
    positions = np.concatenate([np.arange(length - num, length) for num, length in batch])
    owners = np.repeat(np.arange(len(batch)), nums)
    slots = blocks[owners, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    seqs = attention.describe(nums, lengths, torch.from_numpy(blocks), slot_mapping=torch.from_numpy(slots))
    shape = (blocks.size + 1, BLOCK, KV_HEADS, DIM)
    caches = [random(*shape, seed=seed, dtype=dtype) for seed in (1, 2)]
    tables = rotary.tables(LONGEST, Rope(theta=1e4, size=size), "cpu")
    return tables, torch.from_numpy(positions), seqs, caches


BATCHES = {
    "one": [(1, 14)],
    "decode": [(1, 1 + 13 * i % LONGEST) for i in range(24)],
    "prefill": [(70, 70)],
    "mixed": [(1, 9), (1, 100), (5, 5), (33, 90)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_attention(dtype, with_norm, with_bias, name):
    check(dtype, with_norm, with_bias, name, False, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [DIM, 8, 0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"window": 20}, {"chunk": 24}, {"sinks_H": torch.linspace(-2, 2, HEADS), "window": 33}],
    ids=["scale", "window", "chunk", "sinks and window"],
)
def test_variants(dtype, size, interleaved, options):
    check(dtype, True, False, "mixed", interleaved, options, size)


def check(dtype, with_norm, with_bias, name, interleaved, options, size=DIM):
    tables, positions, seqs, (k, v) = scene(BATCHES[name], dtype, size)
    num = len(positions)
    heads = HEADS + 2 * KV_HEADS
    bias = random(heads * DIM, seed=7, dtype=dtype) if with_bias else None
    qkv = OPS.linear(random(heads * DIM, WIDTH, seed=3, dtype=dtype, scale=WIDTH**-0.5), bias)
    output = OPS.linear(random(WIDTH, HEADS * DIM, seed=4, dtype=dtype, scale=0.1))
    qk_norm = random(HEADS + KV_HEADS, DIM, seed=5, dtype=dtype) if with_norm else None
    norm, x, normed = (random(*shape, seed=6, dtype=dtype) for shape in ((WIDTH,), (num, WIDTH), (num, WIDTH)))

    expected_k, expected_v = k.clone(), v.clone()
    weights = make_weights(qkv, output, norm, head_norms_hd=qk_norm, options=AttentionOptions(**options))
    inputs = AttentionInputs(rope=RopeInputs(tables, positions, seqs.slot_mapping, interleaved), metadata=seqs)
    composed = dataclasses.replace(OPS, fuse_attention=None).attention_block(weights)
    assert isinstance(composed, ComposedAttention)
    expected = composed(x, normed, expected_k, expected_v, inputs)
    fused = OPS.attention_block(weights)
    assert not isinstance(fused, ComposedAttention)
    found = fused(x, normed, k, v, inputs)
    for one, other in zip((*found, k, v), (*expected, expected_k, expected_v), strict=True):
        assert torch.equal(one, other)


def test_layers_that_are_not_packed_are_not_fused():
    weights = random(320, WIDTH, seed=3, dtype=torch.float32), random(WIDTH, 192, seed=4, dtype=torch.float32)
    packed = [OPS.linear(weight) for weight in weights]
    torch.set_num_threads(3)
    mixed = [packed[0], OPS.linear(weights[1])]
    norm = torch.ones(WIDTH)
    assert not isinstance(OPS.attention_block(make_weights(*packed, norm)), ComposedAttention)
    assert isinstance(OPS.attention_block(make_weights(*mixed, norm)), ComposedAttention)
    assert isinstance(OPS.attention_block(make_weights(*packed, norm), scales_queries=True), ComposedAttention)


def make_weights(qkv, output, norm, **options):
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    return AttentionWeights(qkv=qkv, output=output, norm_D=norm, eps=EPS, **sizes, **options)
