"""Dense MLP: a layer's second half, or a shared expert."""

from __future__ import annotations

import torch

from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.model_config import MlpConfig, TensorNames
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.moe_block import DenseMlp
from expertwire.kernels.registry import Ops


def declare(
    layout: ParameterLayout, param: str, source: str, config: MlpConfig, names: TensorNames, width: int
) -> None:
    """Declare the parameters of an MLP whose tensors begin with `source`."""
    size = config.intermediate_size
    if not config.activation.gated:
        layout.matrix(param + "up", (source + names.up, size), columns=width)
    elif names.gate_up is not None:
        layout.matrix(param + "gate_up", (source + names.gate_up, 2 * size), columns=width)
    else:
        layout.matrix(param + "gate_up", (source + names.gate, size), (source + names.up, size), columns=width)
    layout.matrix(param + "down", (source + names.down, width), columns=size)


def bind(p: LoadedParameters, config: MlpConfig, ops: Ops, dtype: torch.dtype, gate: Linear | None = None) -> DenseMlp:
    """Return the MLP of the parameters that `declare` declared, with its gate, if it has one."""
    assert config.activation.kind in ("swiglu", "relu2"), f"{config.activation} in a dense MLP"
    is_gated = config.activation.gated
    return DenseMlp(
        up=ops.linear(p.weight("gate_up" if is_gated else "up"), dtype=dtype),
        down=ops.linear(p.weight("down"), dtype=dtype),
        silu_mul=ops.silu_mul if is_gated else None,
        gate=gate,
        sigmoid_mul=ops.sigmoid_mul,
    )
