"""The causal convolution of recurrent mixers: values, tails, and bits that do not depend on how steps cut a sequence."""

import pytest
import torch
import torch.nn.functional as F
from helpers import recurrent_steps as steps

from expertwire.kernels import registry

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6}}
LENGTHS = [1, 17, 63, 64, 65, 70, 300]
EVERY = 128


def scene(lengths, dtype, width=80, taps=4, with_bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [(torch.randn(length, width, generator=generator).to(dtype),) for length in lengths]
    weight = torch.randn(width, taps, generator=generator).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype) if with_bias else None
    return inputs, weight, bias


def compute(ops, plan, lengths, inputs, weight, bias, blocks=None):
    """Return outputs and tails."""
    blocks = blocks or steps.Blocks.scatter(lengths, EVERY)
    tail = torch.full((blocks.num_states, weight.shape[1] - 1, len(weight)), 7.0).to(inputs[0][0].dtype)
    y = steps.run(plan, blocks, inputs, lambda x, states: ops.causal_conv1d(x, weight, bias, tail, states))
    return y, tail, blocks


def formula(x, weight, bias):
    """By torch's convolution, in fp64."""
    x, taps = x.double().T[None], weight.shape[1]
    y = F.conv1d(
        F.pad(x, (taps - 1, 0)), weight.double()[:, None], bias if bias is None else bias.double(), groups=len(weight)
    )
    return F.silu(y)[0].T


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("width", "taps", "with_bias"), [(80, 4, True), (64, 4, False), (7, 3, True), (33, 2, True), (600, 4, True)]
)
def test_values_and_tails(ops, dtype, width, taps, with_bias):
    inputs, weight, bias = scene(LENGTHS, dtype, width, taps, with_bias)
    y, tail, blocks = compute(ops, steps.whole(LENGTHS), LENGTHS, inputs, weight, bias)
    for b, (x,) in enumerate(inputs):
        assert y[b].dtype == dtype
        torch.testing.assert_close(y[b].double(), formula(x, weight, bias), **TOLERANCE[dtype])
        padded = F.pad(x, (0, 0, taps - 1, 0))
        for j in range(-(-len(x) // EVERY)):
            end = min(len(x), (j + 1) * EVERY)
            assert torch.equal(tail[blocks.state_table[b, j]], padded[end : end + taps - 1])
    owned = {int(blocks.state_table[b, p // EVERY]) for b, length in enumerate(LENGTHS) for p in range(length)}
    others = [block for block in range(blocks.num_states) if block not in owned]
    assert torch.equal(tail[others], torch.full_like(tail[others], 7.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [steps.one_by_one(LENGTHS), *(steps.random_cuts(LENGTHS, seed) for seed in range(4))])
def test_bits_do_not_depend_on_the_steps(dtype, plan):
    inputs, weight, bias = scene(LENGTHS, dtype)
    expected, expected_tail, _ = compute(OPS["cpu"], steps.whole(LENGTHS), LENGTHS, inputs, weight, bias)
    y, tail, _ = compute(OPS["cpu"], plan, LENGTHS, inputs, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    assert torch.equal(tail, expected_tail)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_sequences_go_on_from_one_snapshot(ops):
    """Two of them in one step, which reads the block of the interval before and leaves it as it is."""
    inputs, weight, bias = scene([300], torch.float32)
    lengths = [300, 300, 290]
    blocks = steps.Blocks.scatter(lengths, EVERY).with_first_blocks_of(0, 2)
    plan = [[(0, 0, 300)], [(1, 256, 300), (2, 256, 290)]]
    tail = torch.zeros(blocks.num_states, 3, len(weight))

    def step(parts):
        rows = torch.cat([inputs[0][0][start:end] for _, start, end in parts])
        return ops.causal_conv1d(rows, weight, bias, tail, blocks.metadata(parts))

    whole = step(plan[0])
    snapshot = tail[blocks.state_table[0, 1]].clone()
    torch.testing.assert_close(step(plan[1]), torch.cat((whole[256:300], whole[256:290])))
    assert torch.equal(tail[blocks.state_table[0, 1]], snapshot)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_rows_may_lie_apart(ops):
    [(wide,)], weight, bias = scene([70], torch.bfloat16, width=100)
    part, weight, bias = wide[:, 9:89], weight[:80], bias[:80]
    (near,), _, _ = compute(ops, [[(0, 0, 70)]], [70], [(part.contiguous(),)], weight, bias)
    blocks = steps.Blocks.scatter([70], EVERY)
    tail = torch.zeros(blocks.num_states, 3, 80, dtype=torch.bfloat16)
    y = ops.causal_conv1d(part, weight, bias, tail, blocks.metadata([(0, 0, 70)]))
    assert torch.equal(y, near) and y.is_contiguous()


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_no_rows(ops):
    blocks = steps.Blocks.scatter([], EVERY)
    y = ops.causal_conv1d(torch.empty(0, 8), torch.ones(8, 4), None, torch.zeros(3, 3, 8), blocks.metadata([]))
    assert y.shape == (0, 8)
