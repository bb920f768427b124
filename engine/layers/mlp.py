"""Dense MLP with SwiGLU: a layer's second half, or a shared expert.

T tokens, D model width.
"""

from __future__ import annotations

import torch

from expertwire.engine.loader.parameters import LoadedParameters, ParameterLayout
from expertwire.engine.models.model_config import TensorNames
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.registry import Ops


def declare(layout: ParameterLayout, param: str, source: str, size: int, names: TensorNames, width: int) -> None:
    """Declare the parameters of an MLP whose tensors begin with `source`."""
    parts = [(source + names.gate, size), (source + names.up, size)]
    if names.gate_up is not None:
        parts = [(source + names.gate_up, 2 * size)]
    layout.matrix(param + "gate_up", *parts, columns=width)
    layout.matrix(param + "down", (source + names.down, width), columns=size)


def bind(p: LoadedParameters, ops: Ops, dtype: torch.dtype) -> Linear:
    """Return the MLP of the parameters that `declare` declared, [T, D] to [T, D]."""
    gate_up, down = ops.linear(p.weight("gate_up"), dtype=dtype), ops.linear(p.weight("down"), dtype=dtype)
    return lambda x_TD: down(ops.silu_mul(gate_up(x_TD)))
