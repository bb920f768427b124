"""A linear layer for each head: values, and bits that depend on a token alone, packed and by the library."""

import pytest
import torch

from expertwire.kernels.cpu.gemm import prepare_per_head
from expertwire.kernels.ops import heads

SHAPES = {"packed": (3, 64, 40), "wide": (2, 96, 256), "library": (3, 24, 64)}  # H, K, N


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def operands(shape, dtype, num_tokens):
    num_heads, num_inputs, num_outputs = shape
    generator = torch.Generator().manual_seed(0)
    w_HNK = torch.randn(num_heads, num_outputs, num_inputs, generator=generator) / num_inputs**0.5
    return torch.randn(num_tokens, num_heads, num_inputs, generator=generator).to(dtype), w_HNK.to(dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 65, 300])
def test_reference(shape, dtype, num_tokens):
    x_THK, w_HNK = operands(shape, dtype, num_tokens)
    found, expected = prepare_per_head(w_HNK)(x_THK), heads.reference(x_THK, w_HNK)
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_of_a_token_do_not_depend_on_others(shape, dtype):
    x_THK, w_HNK = operands(shape, dtype, 300)
    apply = prepare_per_head(w_HNK)
    whole_THN = apply(x_THK)
    for size in (1, 7, 50):
        assert torch.equal(torch.cat([apply(part) for part in x_THK.split(size)]), whole_THN)
