"""The causal convolution's kernels in the interpreter: the reference's values and tails, the same bits for any steps."""

import pytest
import torch
from helpers import recurrent_steps as steps

from expertwire.kernels.gpu import causal_conv1d as gpu
from expertwire.kernels.ops import causal_conv1d

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float16: {"rtol": 2e-3, "atol": 1e-4}}
LENGTHS = [1, 2, 17, 64, 65, 140]
EVERY = 64


def scene(dtype, width=40, taps=4, with_bias=True):
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(length, width, generator=generator).to(dtype),) for length in LENGTHS]
    weight = torch.randn(width, taps, generator=generator).to(dtype)
    return inputs, weight, torch.randn(width, generator=generator).to(dtype) if with_bias else None


def compute(op, plan, inputs, weight, bias, unused=None):
    """Return outputs and tails, which hold NaN first."""
    blocks = steps.Blocks.scatter(LENGTHS, EVERY)
    tail = torch.full((blocks.num_states, weight.shape[1] - 1, len(weight)), float("nan"), dtype=inputs[0][0].dtype)
    return steps.run(plan, blocks, inputs, lambda x, states: op(x, weight, bias, tail, states), unused), tail


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("width", "taps", "with_bias"), [(40, 4, True), (600, 2, False), (7, 3, True)])
def test_values_and_tails(dtype, width, taps, with_bias):
    scenery = scene(dtype, width, taps, with_bias)
    for plan in (steps.whole(LENGTHS), steps.random_cuts(LENGTHS, 1)):
        expected, expected_tail = compute(causal_conv1d.reference, plan, *scenery)
        y, tail = compute(gpu.causal_conv1d, plan, *scenery)
        for a, b in zip(y, expected, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])
        torch.testing.assert_close(tail, expected_tail, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("plan", "unused"),
    [
        (steps.one_by_one(LENGTHS, 60, 8), None),
        (steps.one_by_one(LENGTHS, 125, 6), 3),
        (steps.random_cuts(LENGTHS, 2, 20), 0),
        (steps.random_cuts(LENGTHS, 3, 8), None),
    ],
)
def test_bits_depend_neither_on_steps_nor_on_bounds(plan, unused):
    scenery = scene(torch.float32)
    expected, expected_tail = compute(gpu.causal_conv1d, steps.whole(LENGTHS), *scenery)
    y, tail = compute(gpu.causal_conv1d, plan, *scenery, unused=unused)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    torch.testing.assert_close(tail, expected_tail, rtol=0, atol=0, equal_nan=True)


def test_rows_and_weights_may_lie_apart():
    inputs, weight, bias = scene(torch.float16)
    expected, _ = compute(gpu.causal_conv1d, steps.whole(LENGTHS), inputs, weight, bias)
    turned = weight.t().contiguous().t()

    def apart(x, *rest):
        wide = torch.cat((torch.full_like(x, float("nan")), x), 1)
        return gpu.causal_conv1d(wide[:, x.shape[1] :], *rest)

    y, _ = compute(apart, steps.whole(LENGTHS), inputs, turned, bias)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
