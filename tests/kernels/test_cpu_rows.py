"""Rows of any length, in vectors and number by number, against numpy."""

import numpy as np
import pytest
import torch

from expertwire.kernels.cpu._llvm import allocating_jit, as_array, decay_factor, empty, rows
from expertwire.kernels.cpu.gemm import pack_linear

LENGTHS = (1, 15, 16, 17, 64, 100)


@allocating_jit
def _compiled_address(length):
    return empty((length, 3), np.float32).ctypes.data


@pytest.mark.parametrize("length", LENGTHS)
def test_arrays_begin_where_lines_of_the_cache_do(length):
    assert empty((length, 3), np.uint16).ctypes.data % 64 == 0
    assert _compiled_address(length) % 64 == 0
    assert empty((length, 3), np.uint16).shape == (length, 3)
    assert pack_linear(torch.randn(32 * length, 32)).panels.ctypes.data % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_of_any_length(length, dtype):
    x, y = (torch.randn(length, dtype=torch.float32).to(dtype) for _ in range(2))
    found = torch.full((length + 1,), 7.0).to(dtype)  # and one number more, which stays

    def check(expected):
        torch.testing.assert_close(found[:-1], expected.to(dtype), rtol=0, atol=0)
        assert found[-1] == 7

    rows.add_row(as_array(x), as_array(y), as_array(found))
    check(x.float() + y.float())
    rows.scale_row(as_array(x), np.float32(1.7), as_array(y), as_array(found))
    check(x.float() * np.float32(1.7) * y.float())
    rows.copy_row(as_array(x), as_array(found))
    check(x)
    total = y.float().clone()
    rows.add_scaled_row(as_array(x), np.float32(-0.3), total.numpy())
    torch.testing.assert_close(total, y.float() + x.float() * np.float32(-0.3), rtol=0, atol=0)
    expected = 1 / torch.sqrt((x.float() ** 2).mean() + 1e-6)
    assert rows.rms_scale(as_array(x), 1e-6) == pytest.approx(expected.item(), rel=1e-5)


def test_what_has_decayed_is_zero():
    """And not a number whose products are subnormal."""
    x = torch.tensor([0.0, -1e-6, -1.0, -59.9, -60.1, -87.0, -1e4, -torch.inf])
    found = torch.tensor([decay_factor(np.float32(each)) for each in x])
    torch.testing.assert_close(found[:4], x[:4].exp(), rtol=1e-6, atol=0)
    assert not found[4:].any()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("length", "rotated"), [(64, 64), (64, 32), (48, 6), (32, 32), (8, 0)])
def test_rotated_rows(length, rotated, interleaved):
    half = rotated // 2
    x, angles = torch.randn(length), torch.randn(3, rotated)
    angles[:, :half] = angles[:, half:]
    found = torch.empty(length)
    cos, sin = angles.cos(), angles.sin()
    rows.rotate_row(x.numpy(), cos.numpy(), sin.numpy(), 2, interleaved, found.numpy())
    first, second = (x[:rotated:2], x[1:rotated:2]) if interleaved else (x[:half], x[half:rotated])
    turned = torch.complex(first, second) * torch.complex(cos[2, :half], sin[2, :half])
    parts = (turned.real, turned.imag)
    expected = torch.stack(parts, 1).flatten() if interleaved else torch.cat(parts)
    torch.testing.assert_close(found, torch.cat((expected, x[rotated:])))
