"""A decoding step's attention in one call has the bits of the ops called one by one. (The experts': tests/moe/test_layer.py.)"""

import numpy as np
import pytest
import torch

from expertwire.kernels import attention, linear, registry, rotary

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


def scene(lengths, dtype):
    """Tables, positions, slots, sequences and caches of single queries at the ends of sequences of these lengths."""
    blocks = np.arange(1, 1 + len(lengths) * 7, dtype=np.int32).reshape(len(lengths), 7)
    positions = np.array(lengths) - 1
    slots = blocks[np.arange(len(lengths)), positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    seqs = attention.describe(np.arange(len(lengths) + 1), np.array(lengths), blocks, BLOCK, "cpu")
    shape = (blocks.size + 1, BLOCK, KV_HEADS, DIM)
    caches = [random(*shape, seed=seed, dtype=dtype) for seed in (1, 2)]
    tables = rotary.tables(LONGEST, DIM, 1e4, "cpu")
    return tables, torch.from_numpy(positions), torch.from_numpy(slots), seqs, caches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("num", [1, 2, 7, 24])
def test_attention(dtype, with_norm, num):
    tables, positions, slots, seqs, (k, v) = scene([1 + 13 * i % LONGEST for i in range(num)], dtype)
    w_qkv = random((HEADS + 2 * KV_HEADS) * DIM, WIDTH, seed=3, dtype=dtype, scale=WIDTH**-0.5)
    w_o = random(WIDTH, HEADS * DIM, seed=4, dtype=dtype, scale=0.1)
    qk_norm = random(HEADS + KV_HEADS, DIM, seed=5, dtype=dtype) if with_norm else None
    norm, x, normed = (random(*shape, seed=6, dtype=dtype) for shape in ((WIDTH,), (num, WIDTH), (num, WIDTH)))

    expected_k, expected_v = k.clone(), v.clone()
    qkv = linear.prepare(w_qkv)(normed).unflatten(1, (-1, DIM))
    q = OPS.rotate_and_store(qkv, qk_norm, EPS, tables, positions, slots, expected_k, expected_v)
    attended = OPS.attend(q, expected_k, expected_v, seqs).flatten(1)
    expected = OPS.add_rms_norm(x, linear.prepare(w_o)(attended), norm, EPS)

    few = attention.prepare_few(w_qkv, w_o, qk_norm, norm, EPS, DIM)
    step = few.step(tables, positions, slots, seqs, k)
    found = few(x, normed, k, v, step)
    for one, other in zip((*found, k, v), (*expected, expected_k, expected_v), strict=True):
        assert torch.equal(one, other)


def test_steps_that_are_not_its_own():
    tables, positions, slots, seqs, (k, _) = scene([5, 9], torch.float32)
    weights = random(320, WIDTH, seed=3, dtype=torch.float32), random(WIDTH, 192, seed=4, dtype=torch.float32)
    few = attention.prepare_few(*weights, None, torch.ones(WIDTH), EPS, DIM)
    assert few.step(tables, positions, slots, seqs, k) is not None
    assert few.step(tables, positions, slots, seqs, k[..., :24]) is None  # heads that the tile does not cover
    prompt = attention.describe(np.array([0, 1, 3]), np.array([5, 9]), np.ones((2, 7), np.int32), BLOCK, "cpu")
    assert few.step(tables, torch.arange(3), torch.arange(3), prompt, k) is None
    many = scene([8] * 60, torch.float32)
    assert few.step(*many[:4], many[4][0]) is None
    torch.set_num_threads(4)
    assert attention.prepare_few(*weights, None, torch.ones(WIDTH), EPS, DIM) is None
