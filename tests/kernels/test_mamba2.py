"""Mamba-2's recurrence: values against the recurrence itself, and bits and states that no cut into steps changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import recurrent_steps as steps

from expertwire.kernels import registry
from expertwire.kernels.ops.mamba2 import CHUNK, Mamba2Cache, Mamba2Weights

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6}}
LENGTHS = [1, 17, 63, 64, 65, 70, 300]
EVERY = 128
SHAPES = {  # heads, head_dim, state_size, groups
    "one group": (4, 32, 16, 1),
    "groups": (6, 8, 24, 3),
    "wide": (2, 64, 128, 1),
    "odd": (3, 5, 7, 1),
}


def weights_of(heads, dim, size, groups, seed=0, **limits):
    generator = torch.Generator().manual_seed(seed)
    return Mamba2Weights(
        A_H=-torch.exp(2 * torch.randn(heads, generator=generator)),
        D_H=torch.randn(heads, generator=generator),
        dt_bias_H=torch.randn(heads, generator=generator),
        num_groups=groups,
        head_dim=dim,
        state_size=size,
        **limits,
    )


def inputs_of(lengths, weights, dtype, seed=0):
    generator = torch.Generator().manual_seed(1 + seed)
    return [
        (
            torch.randn(length, sum(weights.widths), generator=generator).to(dtype),
            (torch.randn(length, len(weights.A_H), generator=generator) - 1).to(dtype),
        )
        for length in lengths
    ]


def cache_of(blocks, weights, dtype, value=5.0):
    heads = len(weights.A_H)
    return Mamba2Cache(
        state_BHNd=torch.full((blocks.num_states, heads, weights.state_size, weights.head_dim), value),
        inputs_BsD=torch.full((blocks.num_chunks, CHUNK, weights.stored_width), value, dtype=dtype),
        dt_BsH=torch.full((blocks.num_chunks, CHUNK, heads), value),
    )


def compute(ops, plan, inputs, weights):
    """Return outputs, states and the sequences' blocks."""
    dtype = inputs[0][0].dtype
    blocks = steps.Blocks.scatter([len(x) for x, _ in inputs], EVERY)
    cache = cache_of(blocks, weights, dtype)
    y = steps.run(plan, blocks, inputs, lambda x, dt, states: ops.mamba2(x, dt, weights, cache, states))
    return y, cache.state_BHNd, blocks


def recurrence(x, dt, weights):
    """Return y and the state after each token, one by one in fp64."""
    heads, (width, read, _) = len(weights.A_H), weights.widths
    each = heads // weights.num_groups
    dt = F.softplus(dt.double() + weights.dt_bias_H.double()).clamp(weights.dt_min, weights.dt_max)
    h = torch.zeros(heads, weights.state_size, weights.head_dim, dtype=torch.float64)
    y, states = [], []
    for row, step in zip(x.double(), dt, strict=True):
        own = row[:width].view(heads, -1)
        B, C = (part.view(-1, weights.state_size).repeat_interleave(each, 0) for part in row[width:].split(read))
        h = (step * weights.A_H.double()).exp()[:, None, None] * h
        h = h + step[:, None, None] * B[:, :, None] * own[:, None, :]
        y.append(((h * C[:, :, None]).sum(1) + weights.D_H.double()[:, None] * own).flatten())
        states.append(h)
    return torch.stack(y), states


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", [{}, {"dt_min": 0.3, "dt_max": 0.4}], ids=["free", "limits"])
def test_values_and_states(ops, dtype, shape, limits):
    weights = weights_of(*SHAPES[shape], **limits)
    inputs = inputs_of(LENGTHS, weights, dtype)
    y, state, blocks = compute(ops, steps.whole(LENGTHS), inputs, weights)
    for b, (x, dt) in enumerate(inputs):
        expected, states = recurrence(x, dt, weights)
        assert y[b].dtype == dtype
        torch.testing.assert_close(y[b].double(), expected, **TOLERANCE[dtype])
        for j in range(-(-len(x) // EVERY)):
            known = min(len(x), (j + 1) * EVERY) // CHUNK * CHUNK
            wanted = states[known - 1] if known else torch.zeros_like(states[0])
            torch.testing.assert_close(state[blocks.state_table[b, j]].double(), wanted, rtol=1e-4, atol=1e-4)
    owned = {int(blocks.state_table[b, p // EVERY]) for b, length in enumerate(LENGTHS) for p in range(length)}
    others = [block for block in range(blocks.num_states) if block not in owned]
    assert torch.equal(state[others], torch.full_like(state[others], 5.0))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("plan", [steps.one_by_one(LENGTHS), steps.random_cuts(LENGTHS, 1)], ids=["decodes", "cuts"])
def test_values_of_several_steps(ops, plan):
    weights = weights_of(*SHAPES["groups"])
    inputs = inputs_of(LENGTHS, weights, torch.float32)
    y, _, _ = compute(ops, plan, inputs, weights)
    for b, (x, dt) in enumerate(inputs):
        torch.testing.assert_close(y[b].double(), recurrence(x, dt, weights)[0], **TOLERANCE[torch.float32])


PLANS = {
    "one by one": steps.one_by_one(LENGTHS),
    "prompt, then one by one": steps.one_by_one(LENGTHS, 61),
    **{f"cuts {seed}": steps.random_cuts(LENGTHS, seed) for seed in range(3)},
    "long cuts": steps.random_cuts(LENGTHS, 9, most=300),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", PLANS)
def test_bits_and_states_do_not_depend_on_the_steps(dtype, shape, plan):
    weights = weights_of(*SHAPES[shape])
    inputs = inputs_of(LENGTHS, weights, dtype)
    expected, expected_state, _ = compute(OPS["cpu"], steps.whole(LENGTHS), inputs, weights)
    y, state, _ = compute(OPS["cpu"], PLANS[plan], inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_other_sequences(dtype):
    weights = weights_of(*SHAPES["groups"])
    inputs = inputs_of(LENGTHS, weights, dtype)
    together, _, _ = compute(OPS["cpu"], steps.whole(LENGTHS), inputs, weights)
    for b, length in enumerate(LENGTHS):
        alone, _, _ = compute(OPS["cpu"], steps.whole([length]), inputs[b : b + 1], weights)
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_sequences_go_on_from_one_snapshot(ops):
    """Two of them in one step, which reads the block of the interval before and leaves it as it is."""
    weights = weights_of(*SHAPES["groups"])
    [(x, dt)] = inputs_of([300], weights, torch.float32)
    blocks = steps.Blocks.scatter([300, 300, 257], EVERY).with_first_blocks_of(0, 2)
    cache = cache_of(blocks, weights, x.dtype)

    def step(*parts):
        rows = (torch.cat([tensor[start:end] for _, start, end in parts]) for tensor in (x, dt))
        return ops.mamba2(*rows, weights, cache, blocks.metadata(list(parts)))

    whole = step((0, 0, 300))
    snapshot = cache.state_BHNd[blocks.state_table[0, 1]].clone()
    y = step((2, 256, 257), (1, 256, 300))
    torch.testing.assert_close(y, torch.cat((whole[256:257], whole[256:300])))
    assert torch.equal(cache.state_BHNd[blocks.state_table[0, 1]], snapshot)
    assert torch.equal(cache.state_BHNd[blocks.state_table[2, 2]], snapshot)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_extreme_steps(ops):
    """Decays that vanish within a chunk, or hardly change over one: no exponent may overflow, nothing may be NaN."""
    weights = weights_of(*SHAPES["one group"])
    [(x, _)] = inputs_of([130], weights, torch.float32)
    dt = torch.where(torch.arange(130)[:, None] % 3 == 0, 40.0, -30.0).expand(130, 4).contiguous()
    (y,), state, _ = compute(ops, steps.whole([130]), [(x, dt)], weights)
    expected, _ = recurrence(x, dt, weights)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-3)
    assert math.isfinite(float(state.abs().max()))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_dt_may_be_a_column_slice(ops):
    weights = weights_of(*SHAPES["groups"])
    [(x, dt)] = inputs_of([70], weights, torch.bfloat16)
    wide = torch.cat((torch.randn(70, 5).bfloat16(), dt), 1)
    blocks = steps.Blocks.scatter([70], EVERY)
    found = [
        ops.mamba2(x, step, weights, cache_of(blocks, weights, x.dtype), blocks.metadata([(0, 0, 70)]))
        for step in (dt, wide[:, 5:])
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_no_rows(ops):
    weights = weights_of(*SHAPES["groups"])
    blocks = steps.Blocks.scatter([], EVERY)
    cache = cache_of(blocks, weights, torch.float32)
    y = ops.mamba2(torch.empty(0, sum(weights.widths)), torch.empty(0, 6), weights, cache, blocks.metadata([]))
    assert y.shape == (0, weights.widths[0])
