"""Product with the sigmoid of a gate, in fp32 and rounded once: of attention's heads, or of a shared expert (Qwen3-Next).

T tokens, H heads, d head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class SigmoidMul(Protocol):
    """See `reference`."""

    def __call__(self, x_THd: Tensor, gate_THd: Tensor) -> Tensor:
        """Return y_THd."""
        ...


def reference(x_THd: Tensor, gate_THd: Tensor) -> Tensor:
    """Return contiguous y in x's dtype.

    Args:
        x_THd: contiguous.
        gate_THd: of x's dtype, with one number for each of x's or for each head; tokens and heads may lie apart.
    """
    return (x_THd.float() * torch.sigmoid(gate_THd.float())).to(x_THd.dtype)
