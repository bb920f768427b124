"""Quantisation to fp8: its error, and its corners."""

import pytest
import torch

from expertwire.kernels.ops import quantize


@pytest.mark.parametrize("group", [32, 128, 512])
def test_the_error_is_half_a_step_of_fp8(group):
    x = torch.randn(20, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 20)[:, None]
    done = quantize.reference(x, group)
    assert (done.values_TD.dtype, done.scales_TJ.shape) == (torch.float8_e4m3fn, (20, 512 // group))
    # Three bits of mantissa; below 2^-6 steps are 2^-9, of the scale.
    bound = torch.maximum(x.abs() * 2.0**-4, done.scales_TJ.repeat_interleave(group, 1) * 2.0**-10) * 1.0001
    assert ((quantize.dequantize(done) - x).abs() <= bound).all()


def test_the_largest_of_a_group_is_exact_and_zeros_stay_zeros():
    x = torch.zeros(2, 256)
    x[0, 3], x[0, 200] = -5.0, 3e38
    done = quantize.dequantize(quantize.reference(x))
    torch.testing.assert_close(done, x, rtol=1e-6, atol=0)


def test_groups_do_not_see_each_other():
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1))
    alone = quantize.reference(x[1:2, 128:].contiguous())
    whole = quantize.reference(x)
    assert torch.equal(alone.scales_TJ, whole.scales_TJ[1:2, 1:])
    assert torch.equal(alone.values_TD.float(), whole.values_TD[1:2, 128:].float())


def test_no_rows():
    assert quantize.dequantize(quantize.reference(torch.empty(0, 256))).shape == (0, 256)
