"""Root-mean-square normalisation: `y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension, in fp32.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019). T tokens, D model width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RmsNorm(Protocol):
    """See `reference`."""

    def __call__(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Return y_TD."""
        ...


class AddRmsNorm(Protocol):
    """See `add_reference`."""

    def __call__(self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm."""
        ...


def reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x, fp32 or bf16."""
    x_fp32 = x_TD.float()
    scale = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (x_fp32 * scale * weight_D.float()).to(x_TD.dtype)


def add_reference(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the residual sum `x + delta` and its norm."""
    sum_TD = x_TD + delta_TD
    return sum_TD, reference(sum_TD, weight_D, eps)
