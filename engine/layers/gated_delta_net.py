"""Gated delta net: the mixer of a layer, and the norm behind it.

    q | k | v | z = in_proj(normed);  b | a = gates(normed)
    o = gated_delta_rule(conv1d(q | k | v), a, b);  out_proj(norm(o) * silu(z))

Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (2024); `kernels.ops.gated_delta_rule` has the mathematics.

T tokens, D width of rows: of the model, or inside the mixer, H heads of values, d and v the sizes of a head's keys and values,
B blocks, K taps of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.param_specs import ParamSpec
from expertwire.engine.loader.parameters import Destination, LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import GatedDeltaNetConfig
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.ops import causal_conv1d
from expertwire.kernels.ops.gated_delta_rule import DeltaCache
from expertwire.kernels.ops.linear import Linear


def declare(
    layout: ParameterLayout, param: str, source: str, config: GatedDeltaNetConfig, names: TensorNames, width: int
) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`."""
    c, module, param = config, source + names.delta, param + "delta."
    if names.delta_by_head:
        qkvz = c.key_size, c.key_size, c.inner_size, c.inner_size
        layout.matrix_in_turns(param + "in_proj", module + "in_proj_qkvz", qkvz, c.num_key_heads, columns=width)
        gates = c.num_heads, c.num_heads
        layout.matrix_in_turns(param + "gates", module + "in_proj_ba", gates, c.num_key_heads, columns=width)
    else:
        qkv, z = (module + "in_proj_qkv", c.conv_size), (module + "in_proj_z", c.inner_size)
        layout.matrix(param + "in_proj", qkv, z, columns=width)
        b, a = (module + "in_proj_b", c.num_heads), (module + "in_proj_a", c.num_heads)
        layout.matrix(param + "gates", b, a, columns=width)
    layout.matrix(param + "out_proj", (module + "out_proj", width), columns=c.inner_size)
    layout.specs[param + "conv"] = ParamSpec(shape=(c.conv_size, 1, c.conv_kernel), fan_in=c.conv_kernel)
    layout.assign(module + "conv1d.weight", Destination(param=param + "conv"))
    for name in ("A_log", "dt_bias"):
        layout.vector(param + name, (module + name, c.num_heads), dtype=torch.float32)
    layout.vector(param + "norm", (module + "norm.weight", c.value_dim))


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet:
    """The mixer of one layer. `norm_D` has a head's weights for every head."""

    config: GatedDeltaNetConfig
    context: LayerContext
    in_proj: Linear
    gates: Linear
    conv_DK: Tensor
    A_H: Tensor
    dt_bias_H: Tensor
    norm_D: Tensor
    out_proj: Linear

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + mixer(normed)` and its norm."""
        c, context = self.config, self.context
        states, chunk, (tail_BkD, state_BHdv) = step.states(context.caches, context.layer)
        qkv_TD, z_TD = self.in_proj(normed_TD).split((c.conv_size, c.inner_size), dim=1)
        b_TH, a_TH = self.gates(normed_TD).split(c.num_heads, dim=1)
        qkv_TD = context.ops.causal_conv1d(qkv_TD, self.conv_DK, None, tail_BkD, states)
        cache = DeltaCache(state_BHdv, *chunk)
        o_TD = context.ops.gated_delta_rule(qkv_TD, a_TH, b_TH, self.A_H, self.dt_bias_H, cache, states)
        y_TD = context.ops.gated_rms_norm(o_TD, z_TD, self.norm_D, c.norm_eps, c.value_dim, gate_first=False)
        return context.add_norm(x_TD, self.out_proj(y_TD))


def bind(p: LoadedParameters, config: GatedDeltaNetConfig, context: LayerContext) -> GatedDeltaNet:
    """Return the layer of the parameters that `declare` declared."""
    p = p.within("delta.")
    in_proj, gates, out_proj = (
        context.ops.linear(p.weight(name), dtype=context.dtype) for name in ("in_proj", "gates", "out_proj")
    )
    return GatedDeltaNet(
        config=config,
        context=context,
        in_proj=in_proj,
        gates=gates,
        conv_DK=causal_conv1d.prepare(p.tensor("conv")),
        A_H=-p.tensor("A_log").exp(),
        dt_bias_H=p.tensor("dt_bias"),
        norm_D=p.tensor("norm").repeat(config.num_heads),
        out_proj=out_proj,
    )
