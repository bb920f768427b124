"""The gated norms of Mamba-2 and of the gated delta net, against the mathematics and against transformers' modules."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from expertwire.kernels import registry

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 2e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6}}
SHAPES = [(0, 64, 64), (1, 64, 32), (5, 99, 33), (30, 24, 8), (3, 7, 7), (9, 512, 128)]  # tokens, width, group
EPS = 1e-5


def inputs(tokens, width, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(width)
    x, z = (scale * torch.randn(tokens, width, generator=generator) for _ in range(2))
    return x.to(dtype), z.to(dtype), (1 + torch.randn(width, generator=generator)).to(dtype)


def formula(x, z, weight, group, gate_first):
    """In fp64."""
    x, gate = x.double(), F.silu(z.double())
    y = x * gate if gate_first else x
    mean = y.pow(2).unflatten(-1, (-1, group)).mean(-1).repeat_interleave(group, -1)
    y = y / (mean + EPS).sqrt() * weight.double()
    return y if gate_first else y * gate


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_values(ops, dtype, shape, gate_first, scale):
    tokens, width, group = shape
    x, z, weight = inputs(tokens, width, dtype, scale)
    y = ops.gated_rms_norm(x, z, weight, EPS, group, gate_first)
    assert y.dtype == dtype and y.is_contiguous()
    torch.testing.assert_close(y.double(), formula(x, z, weight, group, gate_first), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_bits_of_a_row_depend_on_it_alone_and_rows_may_lie_apart(dtype, gate_first):
    x, z, weight = inputs(20, 150, dtype)
    x, z, weight = x[:, 3:99], z[:, 50:146], weight[:96]
    rest = weight, EPS, 32, gate_first
    whole = OPS["cpu"].gated_rms_norm(x.contiguous(), z.contiguous(), *rest)
    assert torch.equal(OPS["cpu"].gated_rms_norm(x, z, *rest), whole)
    for t in range(20):
        assert torch.equal(OPS["cpu"].gated_rms_norm(x[t : t + 1], z[t : t + 1], *rest)[0], whole[t])


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("module", [NemotronHRMSNormGated, GraniteMoeHybridRMSNormGated])
def test_mamba2s_norm_is_that_of_transformers(ops, module):
    x, z, weight = inputs(9, 96, torch.float32)
    theirs = module(96, group_size=32, eps=EPS)
    theirs.weight.data = weight
    torch.testing.assert_close(ops.gated_rms_norm(x, z, weight, EPS, 32, True), theirs(x, z).detach())


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
def test_the_gated_delta_nets_norm_is_that_of_transformers(ops):
    x, z, weight = inputs(9, 96, torch.float32)
    theirs = Qwen3NextRMSNormGated(32, eps=EPS)
    theirs.weight.data = weight[:32]
    expected = theirs(x.view(-1, 32), z.view(-1, 32)).view(9, 96).detach()
    torch.testing.assert_close(ops.gated_rms_norm(x, z, weight[:32].repeat(3), EPS, 32, False), expected)
