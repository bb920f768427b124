"""The grouped expert MLP: any distribution of rows over experts gives each row its own expert's output."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from expertwire.kernels import registry
from expertwire.kernels.ops import experts
from expertwire.kernels.ops.experts import GroupedMlpWeights
from expertwire.kernels.ops.variants import Activation

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
# Rows of each of five experts.
COUNTS = {
    "nothing": [0, 0, 0, 0, 0],
    "one row": [0, 0, 1, 0, 0],
    "one each": [1, 1, 1, 1, 1],
    "all to the last": [0, 0, 0, 0, 40],
    "uneven": [3, 0, 17, 1, 64],
    "around small": [4, 5, 8, 9, 16],
    "around tiles": [15, 16, 17, 32, 33],
    "many": [48, 70, 127, 128, 130],
}
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}, torch.bfloat16: {"rtol": 2**-6, "atol": 3e-2}}


@pytest.fixture(params=[1, 2, 3], ids=["1 thread", "2 threads", "3 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def inputs(counts, dtype, width=64, inner=96):
    generator = torch.Generator().manual_seed(6)

    def normal(*shape, scale):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    num, scale = len(counts), 1.5 / width**0.5
    weights = normal(num, 2 * inner, width, scale=scale), normal(num, width, inner, scale=scale)
    x = normal(sum(counts) + 3, width, scale=1.0)
    index = torch.randint(len(x), (sum(counts),), generator=generator)  # rows are read in any order, some of them twice
    return x, index, np.concatenate(([0], np.cumsum(counts))), *weights


def formula(x, index, offsets, w13, w2):
    """fp64, rounded to the activations' dtype where the contract rounds."""
    dtype, rows = x.dtype, []
    x = x[index]
    for r in range(len(x)):
        expert = np.searchsorted(offsets, r, side="right") - 1
        gate, up = (w13[expert].double() @ x[r].double()).to(dtype).chunk(2)
        silu = (gate.double() * gate.double().sigmoid()).to(dtype)
        rows.append(w2[expert].double() @ (silu * up).double())
    return torch.stack(rows) if rows else torch.empty(0, x.shape[1], dtype=torch.float64)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", COUNTS)
def test_prepared(ops, dtype, name):
    *rows, w13, w2 = inputs(COUNTS[name], dtype)
    expected = formula(*rows, w13, w2)
    y = ops.experts(GroupedMlpWeights(w13.clone(), w2.clone()))(*rows)
    assert (y.shape, y.dtype) == (expected.shape, dtype)
    torch.testing.assert_close(y.double(), expected, **TOLERANCE[dtype])
    torch.testing.assert_close(experts.reference(*rows, w13, w2).double(), expected, **TOLERANCE[dtype])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("width", "inner"), [(24, 16), (33, 7), (64, 48), (128, 256)])
def test_other_widths(width, inner):
    *rows, w13, w2 = inputs([0, 3, 20, 1], torch.float32, width, inner)
    y = OPS["cpu"].experts(GroupedMlpWeights(w13.clone(), w2.clone()))(*rows)
    torch.testing.assert_close(y.double(), formula(*rows, w13, w2), **TOLERANCE[torch.float32])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "inner"), [(32, 64), (64, 96), (96, 32), (256, 160), (1120, 32)])
def test_bits_of_rows_do_not_depend_on_their_company(dtype, width, inner):
    x, index, offsets, w13, w2 = inputs([129, 0, 3, 17, 300], dtype, width, inner)
    apply = OPS["cpu"].experts(GroupedMlpWeights(w13, w2))
    whole = apply(x, index, offsets)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        for first, last in [(start, start + 1), (start + 1, end), (start + 2, start + 19), (start + 3, start + 99)]:
            if start <= first < last <= end:
                alone = np.repeat([0, last - first], [e + 1, 5 - e])
                assert torch.equal(apply(x, index[first:last], alone), whole[first:last]), (e, first, last)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "inner"), [(64, 96), (96, 80), (33, 7), (128, 1856)])
def test_squared_relu_without_a_gate(ops, dtype, width, inner):
    x, index, offsets, w13, w2 = inputs([3, 0, 17, 1, 40], dtype, width, inner)
    w1, relu2 = w13[:, :inner].clone(), Activation("relu2")
    apply = ops.experts(GroupedMlpWeights(w1.clone(), w2.clone(), relu2))
    whole = apply(x, index, offsets)
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        hidden = (x[index[start:end]].double() @ w1[e].double().T).to(dtype).relu().square()
        expected = hidden.double() @ w2[e].double().T
        torch.testing.assert_close(whole[start:end].double(), expected, **TOLERANCE[dtype])
    alone = apply(x, index[4:5], np.array([0, 0, 0, 1, 1, 1]))
    assert ops is OPS["torch"] or torch.equal(alone, whole[4:5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40, 95])
@pytest.mark.parametrize("width", [32, 64, 1120])
def test_an_expert_is_two_linear_layers_and_the_activation_between_them(dtype, rows, width):
    x, index, offsets, w13, w2 = inputs([0, rows, 0, 0, 0], dtype, width)
    hidden = OPS["cpu"].silu_mul(OPS["cpu"].linear(w13[1])(x[index]))
    expected = OPS["cpu"].linear(w2[1])(hidden)
    assert torch.equal(OPS["cpu"].experts(GroupedMlpWeights(w13, w2))(x, index, offsets), expected)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (5, 38), (100, 96)], ids=str)
def test_silu_mul(ops, dtype, shape):
    gate_up = (4 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    y = ops.silu_mul(gate_up)
    gate, up = gate_up.double().chunk(2, dim=1)
    expected = (gate * gate.sigmoid()).to(dtype).double() * up
    torch.testing.assert_close(y.double(), expected, rtol=2e-6 if dtype == torch.float32 else 2**-7, atol=1e-7)


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul_of_extreme_gates(ops, dtype):
    gate = torch.tensor([-1e30, -1000.0, -90.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 1000.0, 1e30])
    y = ops.silu_mul(torch.cat((gate, torch.ones_like(gate))).to(dtype)[None])[0]
    gate = gate.to(dtype).double()
    torch.testing.assert_close(y.double(), gate * gate.sigmoid(), rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_mul_of_a_row_does_not_depend_on_its_neighbours(dtype):
    gate_up = torch.randn(30, 74, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = OPS["cpu"].silu_mul(gate_up)
    assert all(torch.equal(OPS["cpu"].silu_mul(gate_up[r : r + 1])[0], whole[r]) for r in range(30))
