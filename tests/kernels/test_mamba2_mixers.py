"""Convolution, recurrence and gated norm together against transformers' mixers, with their weights."""

import pytest
import torch
from helpers import recurrent_steps as steps
from transformers import GraniteMoeHybridConfig, Mamba2Config, NemotronHConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from expertwire.kernels import registry
from expertwire.kernels.ops.mamba2 import CHUNK, Mamba2Cache, Mamba2Weights

OPS = {"cpu": registry.choose("cpu"), "torch": registry.plain()}
HIDDEN, HEADS, DIM, STATE, GROUPS, TAPS = 32, 8, 8, 16, 2, 4
LENGTHS = [150, 5]


def nemotron():
    config = NemotronHConfig(
        hidden_size=HIDDEN, mamba_num_heads=HEADS, mamba_head_dim=DIM, ssm_state_size=STATE, n_groups=GROUPS,
        conv_kernel=TAPS, chunk_size=32, layer_types=["mamba"], use_conv_bias=True,
    )  # fmt: skip
    # Where it clamps dt and the config does not say so, its own limits are taken.
    return NemotronHMamba2Mixer(config, 0), config.time_step_min, config.layer_norm_epsilon


def granite():
    config = GraniteMoeHybridConfig(
        hidden_size=HIDDEN, mamba_n_heads=HEADS, mamba_d_head=DIM, mamba_d_state=STATE, mamba_n_groups=GROUPS,
        mamba_d_conv=TAPS, mamba_chunk_size=32, mamba_expand=2, layer_types=["mamba"], num_hidden_layers=1,
    )  # fmt: skip
    return GraniteMoeHybridMambaLayer(config, 0), 0.0, config.rms_norm_eps


def mamba2():
    config = Mamba2Config(
        hidden_size=HIDDEN, num_heads=HEADS, head_dim=DIM, state_size=STATE, n_groups=GROUPS, conv_kernel=TAPS,
        chunk_size=32, expand=2,
    )  # fmt: skip
    return Mamba2Mixer(config, 0), 0.0, config.layer_norm_epsilon


def randomise(mixer):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in mixer.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS)
@pytest.mark.parametrize("make", [nemotron, granite, mamba2])
def test_a_mixer_is_that_of_transformers(ops, make):
    mixer, dt_min, eps = make()
    randomise(mixer)
    weights = Mamba2Weights(
        A_H=-mixer.A_log.detach().exp(),
        D_H=mixer.D.detach(),
        dt_bias_H=mixer.dt_bias.detach(),
        num_groups=GROUPS,
        head_dim=DIM,
        state_size=STATE,
        dt_min=dt_min,
    )
    blocks = steps.Blocks.scatter(LENGTHS, 2 * CHUNK)
    width = sum(weights.widths)
    tail = torch.empty(blocks.num_states, TAPS - 1, width)
    cache = Mamba2Cache(
        torch.empty(blocks.num_states, HEADS, STATE, DIM),
        torch.empty(blocks.num_chunks, CHUNK, weights.stored_width),
        torch.empty(blocks.num_chunks, CHUNK, HEADS),
    )

    def ours(x, states):
        z, xBC, dt = mixer.in_proj(x).split([HEADS * DIM, width, HEADS], -1)
        xBC = ops.causal_conv1d(xBC, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, tail, states)
        y = ops.mamba2(xBC, dt, weights, cache, states)
        group = mixer.norm.group_size if hasattr(mixer.norm, "group_size") else HEADS * DIM
        return mixer.out_proj(ops.gated_rms_norm(y, z, mixer.norm.weight, eps, group, True))

    generator = torch.Generator().manual_seed(6)
    inputs = [(torch.randn(length, HIDDEN, generator=generator),) for length in LENGTHS]
    with torch.no_grad():
        found = steps.run(steps.random_cuts(LENGTHS, 3), blocks, inputs, ours)
        for (x,), y in zip(inputs, found, strict=True):
            torch.testing.assert_close(y, mixer(x[None])[0], rtol=1e-4, atol=1e-5)
