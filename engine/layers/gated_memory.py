"""Gated memory unit in a layer, and the norm behind it.

    unit = out_proj(silu(in_proj(normed)) * y)

Ren et al., "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning with Long Generation" (2025). The memory y is the output
of an earlier layer's selective scan for the same token, before its gate: layers hand it on within a step, and no cache has it.

T tokens, D width of rows: of the model, or inside the unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.engine.layers.step import LayerContext, Step
from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.mixer_configs import GatedMemoryConfig
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.ops.linear import Linear


def declare(
    layout: ParameterLayout, param: str, source: str, config: GatedMemoryConfig, names: TensorNames, width: int
) -> None:
    """Declare the parameters of a layer whose tensors begin with `source`."""
    module, param = source + names.mamba, param + "mamba."
    layout.matrix(param + "in_proj", (module + "in_proj", config.inner_size), columns=width)
    layout.matrix(param + "out_proj", (module + "out_proj", width), columns=config.inner_size)


@dataclass(frozen=True, kw_only=True)
class GatedMemoryUnit:
    """The gated memory unit of one layer."""

    config: GatedMemoryConfig
    context: LayerContext
    in_proj: Linear
    out_proj: Linear

    def forward(self, x_TD: Tensor, normed_TD: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return the residual sum `x + unit(normed)` and its norm."""
        gate_and_memory_TD = torch.cat((self.in_proj(normed_TD), step.kept(self.config.memory_layer)), dim=1)
        return self.context.add_norm(x_TD, self.out_proj(self.context.ops.silu_mul(gate_and_memory_TD)))


def bind(p: LoadedParameters, config: GatedMemoryConfig, context: LayerContext) -> GatedMemoryUnit:
    """Return the layer of the parameters that `declare` declared."""
    p, linear, dtype = p.within("mamba."), context.ops.linear, context.dtype
    return GatedMemoryUnit(
        config=config,
        context=context,
        in_proj=linear(p.weight("in_proj"), dtype=dtype),
        out_proj=linear(p.weight("out_proj"), dtype=dtype),
    )
