"""Mamba-2's kernels in the interpreter: the reference's values, and bits and states that no cut into steps changes."""

import pytest
import torch
from helpers import recurrent_steps as steps

from expertwire.kernels.gpu import mamba2 as gpu
from expertwire.kernels.ops import mamba2
from expertwire.kernels.ops.mamba2 import CHUNK, Mamba2Cache, Mamba2Weights

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float16: {"rtol": 2e-3, "atol": 4e-3}}
LENGTHS = [1, 17, 64, 65, 140]
EVERY = 64
SHAPES = {"groups": (4, 16, 16, 2), "parts": (1, 48, 32, 1), "odd": (2, 5, 7, 1)}  # heads, head_dim, state_size, groups


def weights_of(heads, dim, size, groups, **limits):
    generator = torch.Generator().manual_seed(0)
    A, D, bias = (torch.randn(heads, generator=generator) for _ in range(3))
    shape = {"num_groups": groups, "head_dim": dim, "state_size": size}
    return Mamba2Weights(A_H=-A.exp(), D_H=D, dt_bias_H=bias - 1, **shape, **limits)


def inputs_of(lengths, weights, dtype):
    generator = torch.Generator().manual_seed(1)
    widths = sum(weights.widths), len(weights.A_H)
    return [tuple(torch.randn(length, width, generator=generator).to(dtype) for width in widths) for length in lengths]


def compute(op, plan, inputs, weights, unused=None):
    """Return outputs, states, stored inputs and blocks; caches hold NaN first."""
    dtype, heads = inputs[0][0].dtype, len(weights.A_H)
    blocks = steps.Blocks.scatter([len(x) for x, _ in inputs], EVERY)
    cache = Mamba2Cache(
        torch.full((blocks.num_states, heads, weights.state_size, weights.head_dim), float("nan")),
        torch.full((blocks.num_chunks, CHUNK, weights.stored_width), float("nan"), dtype=dtype),
        torch.full((blocks.num_chunks, CHUNK, heads), float("nan")),
    )
    y = steps.run(plan, blocks, inputs, lambda x, dt, states: op(x, dt, weights, cache, states), unused)
    return y, cache.state_BHNd, blocks


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_states(dtype, shape):
    weights = weights_of(*SHAPES[shape], dt_max=0.7)
    inputs = inputs_of(LENGTHS, weights, dtype)
    for plan in (steps.whole(LENGTHS), steps.random_cuts(LENGTHS, 1)):
        expected, expected_state, _ = compute(mamba2.reference, plan, inputs, weights)
        y, state, _ = compute(gpu.mamba2, plan, inputs, weights)
        for a, b in zip(y, expected, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])
        torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-4, equal_nan=True)


PLANS = {
    "one by one": steps.one_by_one(LENGTHS, 60, 8),
    "longer, one by one": steps.one_by_one(LENGTHS, 125, 6),
    **{f"cuts {seed}": steps.random_cuts(LENGTHS, seed) for seed in range(3)},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_bits_and_states_do_not_depend_on_the_steps(dtype, plan):
    weights = weights_of(*SHAPES["groups"])
    inputs = inputs_of(LENGTHS, weights, dtype)
    expected, expected_state, _ = compute(gpu.mamba2, steps.whole(LENGTHS), inputs, weights)
    y, state, _ = compute(gpu.mamba2, PLANS[plan], inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("unused", [0, 3])
def test_bounds_change_no_bit(unused):
    """Those of a captured step: upper limits, whatever the step has, and sequences without queries."""
    weights = weights_of(*SHAPES["groups"])
    inputs = inputs_of(LENGTHS, weights, torch.float16)
    plan = steps.random_cuts(LENGTHS, 4)
    expected, expected_state, _ = compute(gpu.mamba2, plan, inputs, weights)
    y, state, _ = compute(gpu.mamba2, plan, inputs, weights, unused=unused)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0, equal_nan=True)


def test_small_steps_are_exact():
    """A dt of softplus far below zero, whose 1 + e^x is 1 in fp32."""
    weights = weights_of(*SHAPES["odd"])
    [(x, dt)] = inputs_of([64], weights, torch.float32)
    dt = torch.linspace(-25, -10, 64)[:, None].expand(64, 2).contiguous()
    (y,), state, blocks = compute(gpu.mamba2, [[(0, 0, 64)]], [(x, dt)], weights)
    (expected,), expected_state, _ = compute(mamba2.reference, [[(0, 0, 64)]], [(x, dt)], weights)
    held = blocks.state_table[0, 0]
    torch.testing.assert_close(state[held], expected_state[held], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


def test_dt_may_be_a_column_slice():
    weights = weights_of(*SHAPES["groups"])
    [(x, dt)] = inputs_of([70], weights, torch.float16)
    wide = torch.cat((torch.full((70, 3), float("nan")).half(), dt), 1)
    whole = [[(0, 0, 70)]]
    (expected,), _, _ = compute(gpu.mamba2, whole, [(x, dt)], weights)

    def apart(x, dt, *rest):
        return gpu.mamba2(x, wide[:, 3:], *rest)

    assert torch.equal(compute(apart, whole, [(x, dt)], weights)[0][0], expected)
