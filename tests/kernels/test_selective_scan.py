"""Mamba's selective scan: values, states, and bits that do not depend on how steps cut a sequence."""

import expertwire  # noqa: F401  # isort: skip  (first: transformers must not take our `kernels` for another package's)

import pytest
import torch
from helpers import recurrent_steps as steps
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from expertwire.kernels import registry
from expertwire.kernels.ops.selective_scan import ScanWeights

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2**-7, "atol": 2e-5}}
LENGTHS = [1, 17, 63, 64, 65, 70, 300]
EVERY, SIZE = 128, 16


def scene(lengths, dtype, width=80, size=SIZE, seed=0):
    """Decays reach from less than a token to hundreds."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = [tuple(draw(length, w).to(dtype) for w in (width, width, size, size)) for length in lengths]
    weights = ScanWeights(A_ND=-(2 * draw(size, width)).exp(), skip_D=draw(width), dt_bias_D=3 * draw(width))
    return inputs, weights


def compute(ops, plan, lengths, inputs, weights, blocks=None):
    """Return outputs and states."""
    blocks = blocks or steps.Blocks.scatter(lengths, EVERY)
    state = torch.full((blocks.num_states, *weights.A_ND.shape), 7.0)
    y = steps.run(plan, blocks, inputs, lambda *rows: ops.selective_scan(*rows[:-1], weights, state, rows[-1]))
    return y, state, blocks


def formula(inputs, weights):
    """Return outputs and the state after each token, by the recurrence in fp64."""
    x, dt, B, C = (rows.double() for rows in inputs)
    dt = torch.log1p((dt + weights.dt_bias_D).exp())
    state, outputs, states = torch.zeros(weights.A_ND.shape, dtype=torch.float64), [], []
    for t in range(len(x)):
        state = (dt[t] * weights.A_ND).exp() * state + torch.outer(B[t], dt[t] * x[t])
        states.append(state)
        outputs.append(C[t] @ state + weights.skip_D * x[t])
    return torch.stack(outputs), states


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "size"), [(80, 16), (7, 3), (600, 16)])
def test_values_and_states(ops, dtype, width, size):
    inputs, weights = scene(LENGTHS, dtype, width, size)
    y, state, blocks = compute(ops, steps.whole(LENGTHS), LENGTHS, inputs, weights)
    for b, rows in enumerate(inputs):
        expected, states = formula(rows, weights)
        assert y[b].dtype == dtype
        torch.testing.assert_close(y[b].double(), expected, **TOLERANCE[dtype])
        for j in range(-(-len(expected) // EVERY)):
            last = states[min(len(expected), (j + 1) * EVERY) - 1]
            torch.testing.assert_close(state[blocks.state_table[b, j]].double(), last, **TOLERANCE[torch.float32])
    owned = {int(blocks.state_table[b, p // EVERY]) for b, length in enumerate(LENGTHS) for p in range(length)}
    others = [block for block in range(blocks.num_states) if block not in owned]
    assert torch.equal(state[others], torch.full_like(state[others], 7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [steps.one_by_one(LENGTHS), *(steps.random_cuts(LENGTHS, seed) for seed in range(4))])
def test_bits_do_not_depend_on_the_steps(dtype, plan):
    inputs, weights = scene(LENGTHS, dtype, width=300)
    expected, expected_state, _ = compute(OPS["cpu"], steps.whole(LENGTHS), LENGTHS, inputs, weights)
    y, state, _ = compute(OPS["cpu"], plan, LENGTHS, inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_sequences_go_on_from_one_snapshot(ops):
    """Two of them in one step, which reads the block of the interval before and leaves it as it is."""
    inputs, weights = scene([300], torch.float32)
    lengths = [300, 300, 290]
    blocks = steps.Blocks.scatter(lengths, EVERY).with_first_blocks_of(0, 2)
    state = torch.zeros(blocks.num_states, *weights.A_ND.shape)

    def step(parts):
        rows = (torch.cat([x[start:end] for _, start, end in parts]) for x in inputs[0])
        return ops.selective_scan(*rows, weights, state, blocks.metadata(parts))

    whole = step([(0, 0, 300)])
    snapshot = state[blocks.state_table[0, 1]].clone()
    parts = step([(1, 256, 300), (2, 256, 290)])
    torch.testing.assert_close(parts, torch.cat((whole[256:300], whole[256:290])), rtol=0, atol=0)
    assert torch.equal(state[blocks.state_table[0, 1]], snapshot)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_rows_may_lie_apart(ops):
    [(x, dt, B, C)], weights = scene([70], torch.bfloat16)
    wide = torch.cat((x, B, C, dt), 1)
    apart = [(wide[:, :80], wide[:, -80:], wide[:, 80:96], wide[:, 96:112])]
    blocks = steps.Blocks.scatter([70], EVERY)
    state = torch.zeros(blocks.num_states, *weights.A_ND.shape)
    y = ops.selective_scan(*apart[0], weights, state, blocks.metadata([(0, 0, 70)]))
    (near,), _, _ = compute(ops, steps.whole([70]), [70], [(x, dt, B, C)], weights)
    assert torch.equal(y, near) and y.is_contiguous()


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_no_rows(ops):
    _, weights = scene([], torch.float32)
    blocks = steps.Blocks.scatter([], EVERY)
    rows = torch.empty(0, 80), torch.empty(0, 80), torch.empty(0, SIZE), torch.empty(0, SIZE)
    y = ops.selective_scan(*rows, weights, torch.zeros(3, SIZE, 80), blocks.metadata([]))
    assert y.shape == (0, 80)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_as_the_mixer_of_transformers(ops):
    """The projections are its own; convolution and scan are ours, cut in pieces."""
    torch.manual_seed(5)
    mixer = MambaMixer(MambaConfig(hidden_size=32, state_size=SIZE, expand=2, conv_kernel=4), 0)
    with torch.no_grad():
        mixer.A_log += torch.randn_like(mixer.A_log)
        mixer.dt_proj.bias.copy_(torch.randn(64))
        mixer.D.copy_(torch.randn(64))
    weights = ScanWeights(
        A_ND=-mixer.A_log.detach().exp().t().contiguous(),
        skip_D=mixer.D.detach(),
        dt_bias_D=mixer.dt_proj.bias.detach(),
    )
    blocks = steps.Blocks.scatter(LENGTHS, EVERY)
    tail, state = torch.empty(blocks.num_states, 3, 64), torch.empty(blocks.num_states, SIZE, 64)

    def ours(h, states):
        x, z = mixer.in_proj(h).chunk(2, -1)
        x = ops.causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, tail, states)
        dt, B, C = mixer.x_proj(x).split([mixer.time_step_rank, SIZE, SIZE], -1)
        y = ops.selective_scan(x, dt @ mixer.dt_proj.weight.t(), B, C, weights, state, states)
        return mixer.out_proj(y * torch.nn.functional.silu(z))

    inputs = [(torch.randn(length, 32),) for length in LENGTHS]
    with torch.no_grad():
        found = steps.run(steps.random_cuts(LENGTHS, 3), blocks, inputs, ours)
        for (h,), y in zip(inputs, found, strict=True):
            torch.testing.assert_close(y, mixer(h[None])[0], rtol=1e-4, atol=1e-5)
