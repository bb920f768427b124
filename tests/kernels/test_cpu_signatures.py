"""Steps of one row and of more run the same machine code: numba would compile a function again for rows that lie apart."""

import pytest
import torch
from helpers import recurrent_steps as steps
from numba.core.dispatcher import Dispatcher

from expertwire.kernels.cpu import causal_conv1d, elementwise, gated_delta_rule, mamba2, recurrent, selective_scan
from expertwire.kernels.ops.gated_delta_rule import CHUNK, DeltaCache
from expertwire.kernels.ops.mamba2 import Mamba2Cache, Mamba2Weights
from expertwire.kernels.ops.selective_scan import ScanWeights

MODULES = causal_conv1d, elementwise, gated_delta_rule, mamba2, recurrent, selective_scan
EVERY = 128


def num_compiled():
    """Return the number of compiled forms of these modules' functions, by name."""
    named = [(module.__name__, name, value) for module in MODULES for name, value in vars(module).items()]
    return {(file, name): len(value.signatures) for file, name, value in named if isinstance(value, Dispatcher)}


def part(num, *shape):
    """Return bf16 rows that lie apart."""
    return torch.randn(num, shape[0] + 5, *shape[1:]).to(torch.bfloat16)[:, 3 : shape[0] + 3]


def conv(num, states, blocks):
    tail = torch.zeros(blocks.num_states, 3, 80, dtype=torch.bfloat16)
    causal_conv1d.causal_conv1d(part(num, 80), torch.randn(80, 4).to(torch.bfloat16), None, tail, states)


def norm(num, states, blocks):
    weight = torch.ones(80, dtype=torch.bfloat16)
    elementwise.gated_rms_norm(part(num, 80), part(num, 80), weight, 1e-5, 40, gate_first=True)


def gate(num, states, blocks):
    elementwise.sigmoid_mul(part(num, 1, 32).contiguous(), part(num, 1, 32))


def delta(num, states, blocks):
    rows = torch.randn(num, 2 * 32 + 64).to(torch.bfloat16)
    state = torch.zeros(blocks.num_states, 2, 32, 32)
    shapes = (1, 32), (2, 32), (2,)
    dtypes = torch.bfloat16, torch.float32, torch.float32
    chunk = (torch.zeros(blocks.num_chunks, CHUNK, *s, dtype=d) for s, d in zip(shapes, dtypes, strict=True))
    cache = DeltaCache(state, *chunk)
    gated_delta_rule.gated_delta_rule(rows, part(num, 2), part(num, 2), -torch.ones(2), torch.ones(2), cache, states)


def ssm(num, states, blocks):
    weights = Mamba2Weights(
        A_H=-torch.ones(2), D_H=torch.ones(2), dt_bias_H=torch.ones(2), num_groups=1, head_dim=32, state_size=16
    )
    cache = Mamba2Cache(
        torch.zeros(blocks.num_states, 2, 16, 32),
        torch.zeros(blocks.num_chunks, CHUNK, weights.stored_width, dtype=torch.bfloat16),
        torch.zeros(blocks.num_chunks, CHUNK, 2),
    )
    rows = torch.randn(num, sum(weights.widths)).to(torch.bfloat16)
    mamba2.mamba2(rows, part(num, 2), weights, cache, states)


def scan(num, states, blocks):
    weights = ScanWeights(A_ND=-torch.ones(16, 80), skip_D=torch.ones(80), dt_bias_D=torch.ones(80))
    state = torch.zeros(blocks.num_states, 16, 80)
    rows = part(num, 80), part(num, 80), part(num, 16), part(num, 16)
    selective_scan.selective_scan(*rows, weights, state, states)


@pytest.mark.parametrize("work", [conv, norm, gate, delta, ssm, scan], ids=lambda work: work.__name__)
def test_one_row_compiles_nothing_for_more(work):
    blocks = steps.Blocks.scatter([4], EVERY)
    work(1, blocks.metadata([(0, 0, 1)]), blocks)
    before = num_compiled()
    work(3, blocks.metadata([(0, 1, 4)]), blocks)
    assert num_compiled() == before
