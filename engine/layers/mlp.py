"""A dense MLP with SwiGLU, as a layer's second half or as a shared expert.

T tokens, D model width, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertwire.engine.loader.layout import Layout, Parameters
from expertwire.engine.models.family import Names
from expertwire.kernels.registry import Ops

Mlp = Callable[[Tensor], Tensor]  # x_TD -> y_TD


def declare(layout: Layout, param: str, source: str, size: int, names: Names, width: int) -> None:
    """The parameters of an MLP whose tensors begin with `source`."""
    parts = [(source + names.gate, size), (source + names.up, size)]
    if names.gate_up is not None:
        parts = [(source + names.gate_up, 2 * size)]
    layout.matrix(param + "gate_up", *parts, columns=width)
    layout.matrix(param + "down", (source + names.down, width), columns=size)


def bind(p: Parameters, ops: Ops, dtype: torch.dtype) -> Mlp:
    """Of the parameters that `declare` declared."""
    gate_up, down = ops.linear(p.weight("gate_up"), dtype=dtype), ops.linear(p.weight("down"), dtype=dtype)
    return lambda x_TD: down(ops.silu_mul(gate_up(x_TD)))
