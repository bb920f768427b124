"""The selective scan's kernel in the interpreter: the reference's values and states, the same bits for any steps."""

import pytest
import torch
from helpers import recurrent_steps as steps

from expertwire.kernels.gpu import selective_scan as gpu
from expertwire.kernels.ops import selective_scan
from expertwire.kernels.ops.selective_scan import ScanWeights

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.float16: {"rtol": 2e-3, "atol": 1e-3}}
LENGTHS = [1, 2, 17, 35]
EVERY = 16


def scene(dtype, width=24, size=16, lengths=LENGTHS):
    """Decays reach from less than a token to hundreds."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = [tuple(draw(length, w).to(dtype) for w in (width, width, size, size)) for length in lengths]
    weights = ScanWeights(A_ND=-(2 * draw(size, width)).exp(), skip_D=draw(width), dt_bias_D=3 * draw(width))
    return inputs, weights


def compute(op, plan, inputs, weights, unused=None, every=EVERY):
    """Return outputs and states, which hold NaN first."""
    blocks = steps.Blocks.scatter([len(x) for x, *_ in inputs], every)
    state = torch.full((blocks.num_states, *weights.A_ND.shape), float("nan"))
    return steps.run(plan, blocks, inputs, lambda *rows: op(*rows[:-1], weights, state, rows[-1]), unused), state


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("width", "size"), [(24, 16), (7, 3)])
def test_values_and_states(dtype, width, size):
    scenery = scene(dtype, width, size)
    for plan in (steps.whole(LENGTHS), steps.random_cuts(LENGTHS, 1)):
        expected, expected_state = compute(selective_scan.reference, plan, *scenery)
        y, state = compute(gpu.selective_scan, plan, *scenery)
        for a, b in zip(y, expected, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE[dtype])
        torch.testing.assert_close(state, expected_state, **TOLERANCE[torch.float32], equal_nan=True)


@pytest.mark.parametrize(
    ("plan", "unused"),
    [
        (steps.one_by_one(LENGTHS, 14, 4), 3),
        (steps.random_cuts(LENGTHS, 2, 20), 0),
        (steps.random_cuts(LENGTHS, 3, 8), None),
    ],
)
def test_bits_depend_neither_on_steps_nor_on_bounds(plan, unused):
    scenery = scene(torch.float32)
    expected, expected_state = compute(gpu.selective_scan, steps.whole(LENGTHS), *scenery)
    y, state = compute(gpu.selective_scan, plan, *scenery, unused=unused)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0, equal_nan=True)


def test_intervals_of_any_length_change_no_bit():
    """Those that are no multiple of the tokens that are loaded at a time."""
    scenery = scene(torch.float32)
    expected, _ = compute(gpu.selective_scan, steps.whole(LENGTHS), *scenery)
    plan = steps.random_cuts(LENGTHS, 2, 20)
    _, expected_state = compute(selective_scan.reference, plan, *scenery, every=22)
    y, state = compute(gpu.selective_scan, plan, *scenery, every=22)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))
    torch.testing.assert_close(state, expected_state, **TOLERANCE[torch.float32], equal_nan=True)


def test_sequences_go_on_from_one_snapshot():
    """Two of them in one step, which reads the block of the interval before and leaves it as it is."""
    [inputs], weights = scene(torch.float32, lengths=[37])
    blocks = steps.Blocks.scatter([37, 37, 35], EVERY).with_first_blocks_of(0, 2)
    state = torch.zeros(blocks.num_states, *weights.A_ND.shape)

    def step(parts):
        rows = (torch.cat([x[start:end] for _, start, end in parts]) for x in inputs)
        return gpu.selective_scan(*rows, weights, state, blocks.metadata(parts))

    whole = step([(0, 0, 37)])
    snapshot = state[blocks.state_table[0, 1]].clone()
    assert torch.equal(step([(1, 32, 37), (2, 32, 35)]), torch.cat((whole[32:37], whole[32:35])))
    assert torch.equal(state[blocks.state_table[0, 1]], snapshot)


def test_rows_may_lie_apart():
    inputs, weights = scene(torch.float16)
    expected, _ = compute(gpu.selective_scan, steps.whole(LENGTHS), inputs, weights)

    def apart(x, dt, B, C, *rest):
        wide = torch.cat((x, B, C, dt), 1)
        width, size = x.shape[1], B.shape[1]
        x, B, C, dt = wide.split((width, size, size, width), 1)
        return gpu.selective_scan(x, dt, B, C, *rest)

    y, _ = compute(apart, steps.whole(LENGTHS), inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))


def test_states_of_another_dtype_are_refused():
    [inputs, *_], weights = scene(torch.float32)
    blocks = steps.Blocks.scatter([1], EVERY)
    state = torch.zeros(blocks.num_states, *weights.A_ND.shape, dtype=torch.float16)
    with pytest.raises(AssertionError, match="float16"):
        gpu.selective_scan(*inputs, weights, state, blocks.metadata([(0, 0, 1)]))
