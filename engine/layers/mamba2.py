"""Mamba-2 mixer of a layer, and the norm behind it.

    z | xBC | dt = in_proj(normed);  y = mamba2(conv1d(xBC), dt);  out_proj(norm(y * silu(z)))

Dao and Gu, "Transformers are SSMs" (2024); `kernels.ops.mamba2` has the mathematics.

T tokens, D width of rows: of the model, or inside the mixer, H heads, d their size, n numbers of the state for each of a
head's d, B blocks, s positions of a block, K taps of the convolution, k those before a token's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.param_specs import ParamSpec
from expertwire.engine.loader.parameters import Destination, LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import Mamba2Config
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.ops import causal_conv1d
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.mamba2 import Mamba2Cache, Mamba2Weights


def declare(
    layout: ParameterLayout, param: str, source: str, config: Mamba2Config, names: TensorNames, width: int
) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`."""
    c, module, param = config, source + names.mamba, param + "mamba."
    projected = c.inner_size + c.conv_size + c.num_heads
    layout.matrix(param + "in_proj", (module + "in_proj", projected), columns=width)
    layout.matrix(param + "out_proj", (module + "out_proj", width), columns=c.inner_size)
    if c.proj_bias:
        layout.vector(param + "in_proj_bias", (module + "in_proj.bias", projected), fan_in=width)
        layout.vector(param + "out_proj_bias", (module + "out_proj.bias", width), fan_in=c.inner_size)
    layout.specs[param + "conv"] = ParamSpec(shape=(c.conv_size, 1, c.conv_kernel), fan_in=c.conv_kernel)
    layout.assign(module + "conv1d.weight", Destination(param=param + "conv"))
    if c.conv_bias:
        layout.vector(param + "conv_bias", (module + "conv1d.bias", c.conv_size), fan_in=c.conv_kernel)
    for name in ("A_log", "D", "dt_bias"):
        layout.vector(param + name, (module + name, c.num_heads), dtype=torch.float32)
    layout.vector(param + "norm", (module + "norm.weight", c.inner_size))


@dataclass(frozen=True, kw_only=True)
class Mamba2:
    """The mixer of one layer."""

    config: Mamba2Config
    context: LayerContext
    in_proj: Linear
    conv_DK: Tensor
    conv_bias_D: Tensor | None
    weights: Mamba2Weights
    norm_D: Tensor
    out_proj: Linear

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + mixer(normed)` and its norm."""
        c, context = self.config, self.context
        states, (inputs_BsD, dt_BsH), (tail_BkD, state_BHnd) = step.states(context.caches, context.layer)
        projected = self.in_proj(normed_TD)
        z_TD, xBC_TD, dt_TH = projected.split((c.inner_size, c.conv_size, c.num_heads), dim=1)
        xBC_TD = context.ops.causal_conv1d(xBC_TD, self.conv_DK, self.conv_bias_D, tail_BkD, states)
        cache = Mamba2Cache(state_BHnd, inputs_BsD, dt_BsH)
        y_TD = context.ops.mamba2(xBC_TD, dt_TH, self.weights, cache, states)
        group = c.inner_size // c.num_groups
        y_TD = context.ops.gated_rms_norm(y_TD, z_TD, self.norm_D, c.norm_eps, group, gate_first=True)
        return context.add_norm(x_TD, self.out_proj(y_TD))


def bind(p: LoadedParameters, config: Mamba2Config, context: LayerContext) -> Mamba2:
    """Return the layer of the parameters that `declare` declared."""
    p, (dt_min, dt_max) = p.within("mamba."), config.dt_limits
    weights = Mamba2Weights(
        A_H=-p.tensor("A_log").exp(),
        D_H=p.tensor("D"),
        dt_bias_H=p.tensor("dt_bias"),
        num_groups=config.num_groups,
        head_dim=config.head_dim,
        state_size=config.state_size,
        dt_min=dt_min,
        dt_max=dt_max,
    )
    return Mamba2(
        config=config,
        context=context,
        in_proj=context.ops.linear(p.weight("in_proj"), p.maybe("in_proj_bias"), dtype=context.dtype),
        conv_DK=causal_conv1d.prepare(p.tensor("conv")),
        conv_bias_D=p.maybe("conv_bias"),
        weights=weights,
        norm_D=p.tensor("norm"),
        out_proj=context.ops.linear(p.weight("out_proj"), p.maybe("out_proj_bias"), dtype=context.dtype),
    )
