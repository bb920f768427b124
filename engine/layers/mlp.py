"""Dense MLP: a layer's second half, or a shared expert.

T tokens, D model width, F the MLP's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.model_config import MlpConfig, TensorNames
from expertwire.kernels.ops.linear import Linear
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


def bind(p: LoadedParameters, config: MlpConfig, ops: Ops, dtype: torch.dtype) -> Linear:
    """Return the MLP of the parameters that `declare` declared, [T, D] to [T, D]."""
    assert config.activation.kind in ("swiglu", "relu2"), f"{config.activation} in a dense MLP"
    if config.activation.gated:
        gate_up, down = ops.linear(p.weight("gate_up"), dtype=dtype), ops.linear(p.weight("down"), dtype=dtype)
        return lambda x_TD: down(ops.silu_mul(gate_up(x_TD)))
    up, down = ops.linear(p.weight("up"), dtype=dtype), ops.linear(p.weight("down"), dtype=dtype)

    def relu2(up_TF: Tensor) -> Tensor:
        return up_TF.relu_().square_()

    return lambda x_TD: down(relu2(up(x_TD)))


def gated(dense: Linear, gate: Linear, ops: Ops) -> Linear:
    """Return an MLP whose output is multiplied by the sigmoid of the gate, [T, 1]."""
    return lambda x_TD: ops.sigmoid_mul(dense(x_TD)[:, None], gate(x_TD)[:, None])[:, 0]
