"""Mamba mixer of the first kind (Gu and Dao, 2023) in a layer, and the norm behind it.

    x | z = in_proj(normed);  x = conv1d(x);  dt | B | C = x_proj(x);  y = selective_scan(x, dt_proj(dt), B, C)
    mixer = out_proj(silu(z) * y)

T tokens, D width of rows: of the model, or inside the mixer, n numbers of the state for each channel, K taps of the
convolution, k those before a token's own, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.param_specs import ParamSpec
from expertwire.engine.loader.parameters import Destination, LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import MambaConfig
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.ops import causal_conv1d
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.selective_scan import ScanWeights


def declare(
    layout: ParameterLayout, param: str, source: str, config: MambaConfig, names: TensorNames, width: int
) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`."""
    c, module, param = config, source + names.mamba, param + "mamba."
    layout.matrix(param + "in_proj", (module + "in_proj", 2 * c.inner_size), columns=width)
    layout.specs[param + "conv"] = ParamSpec(shape=(c.inner_size, 1, c.conv_kernel), fan_in=c.conv_kernel)
    layout.assign(module + "conv1d.weight", Destination(param=param + "conv"))
    layout.vector(param + "conv_bias", (module + "conv1d.bias", c.inner_size), fan_in=c.conv_kernel)
    layout.matrix(param + "x_proj", (module + "x_proj", c.dt_rank + 2 * c.state_size), columns=c.inner_size)
    layout.matrix(param + "dt_proj", (module + "dt_proj", c.inner_size), columns=c.dt_rank)
    layout.vector(param + "dt_bias", (module + "dt_proj.bias", c.inner_size), dtype=torch.float32)
    layout.specs[param + "A_log"] = ParamSpec(shape=(c.inner_size, c.state_size), fan_in=None, dtype=torch.float32)
    layout.assign(module + "A_log", Destination(param=param + "A_log"))
    layout.vector(param + "D", (module + "D", c.inner_size), dtype=torch.float32)
    layout.matrix(param + "out_proj", (module + "out_proj", width), columns=c.inner_size)


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """The mixer of one layer."""

    config: MambaConfig
    context: LayerContext
    in_proj: Linear
    conv_DK: Tensor
    conv_bias_D: Tensor
    x_proj: Linear
    dt_proj: Linear
    weights: ScanWeights
    out_proj: Linear

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + mixer(normed)` and its norm; keep the memory in the step if units read it."""
        c, context = self.config, self.context
        states, _, (tail_BkD, state_BnD) = step.states(context.caches, context.layer)
        inner_TD, z_TD = self.in_proj(normed_TD).chunk(2, dim=1)
        inner_TD = context.ops.causal_conv1d(inner_TD, self.conv_DK, self.conv_bias_D, tail_BkD, states)
        dt_TD, B_Tn, C_Tn = self.x_proj(inner_TD).split((c.dt_rank, c.state_size, c.state_size), dim=1)
        dt_TD = self.dt_proj(dt_TD.contiguous())
        y_TD = context.ops.selective_scan(inner_TD, dt_TD, B_Tn, C_Tn, self.weights, state_BnD, states)
        if c.gives_memory:
            step.keep(context.layer, y_TD)
        return context.add_norm(x_TD, self.out_proj(context.ops.silu_mul(torch.cat((z_TD, y_TD), dim=1))))


def bind(p: LoadedParameters, config: MambaConfig, context: LayerContext) -> Mamba:
    """Return the layer of the parameters that `declare` declared."""
    p, linear, dtype = p.within("mamba."), context.ops.linear, context.dtype
    return Mamba(
        config=config,
        context=context,
        in_proj=linear(p.weight("in_proj"), dtype=dtype),
        conv_DK=causal_conv1d.prepare(p.tensor("conv")),
        conv_bias_D=p.tensor("conv_bias"),
        x_proj=linear(p.weight("x_proj"), dtype=dtype),
        dt_proj=linear(p.weight("dt_proj"), dtype=dtype),
        weights=ScanWeights(
            A_ND=-p.tensor("A_log").exp().t().contiguous(), skip_D=p.tensor("D"), dt_bias_D=p.tensor("dt_bias")
        ),
        out_proj=linear(p.weight("out_proj"), dtype=dtype),
    )
