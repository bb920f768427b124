"""A linear layer for each head in the interpreter: values, bits that depend on a token alone, one launch and no copies."""

import pytest
import torch
from helpers.count_launches import launches

from expertwire.kernels.gpu import heads as gpu
from expertwire.kernels.gpu.device import B200, H200
from expertwire.kernels.ops import heads

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float16: {"rtol": 2e-3, "atol": 2e-3}}


def operands(num_tokens, dtype, shape=(3, 40, 24), seed=0):
    """Return tokens as parts of longer rows, and weights [H, N, K]."""
    num_heads, _, num_inputs = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_heads, num_inputs + 5, generator=generator).to(dtype)[..., :num_inputs]
    return x, (torch.randn(shape, generator=generator) / num_inputs**0.5).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 130])
@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 64, 128)], ids=str)
def test_reference(num_tokens, dtype, shape):
    x, w = operands(num_tokens, dtype, shape)
    found = gpu.prepare(w, device=H200)(x)
    torch.testing.assert_close(found, heads.reference(x, w), **TOLERANCE[dtype])


def test_outputs_are_parts_of_longer_rows():
    x, w = operands(5, torch.float32)
    rows = torch.full((5, 3, 48), float("nan"))
    out = gpu.prepare(w, device=H200)(x, out=rows[..., 4:44])
    assert out.data_ptr() == rows[..., 4:].data_ptr()
    torch.testing.assert_close(rows[..., 4:44], heads.reference(x, w), **TOLERANCE[torch.float32])
    assert rows[..., :4].isnan().all() and rows[..., 44:].isnan().all()


def test_a_prefill_takes_one_launch_and_no_copy():
    x, w = operands(200, torch.float16)
    out = x.new_empty(200, 3, 64)
    with launches() as counts:
        gpu.prepare(w, device=H200)(x, out=out[..., :40])
    assert counts == {"per_head_kernel": 1}


def test_what_makes_bits_does_not_follow_the_number_of_tokens():
    for dtype in (torch.bfloat16, torch.float32):
        assert len({gpu.tile_config(num, dtype).block_k for num in (1, 16, 17, 64, 65, 8192)}) == 1


def test_fp32_on_blackwell_is_refused():
    with pytest.raises(ValueError, match=r"dtype is float32.*allowed is bfloat16"):
        gpu.prepare(operands(1, torch.float32)[1], device=B200)
