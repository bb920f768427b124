"""Layer normalisation: `y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, over the last dimension, in fp32.

Ba, Kiros and Hinton, "Layer Normalization" (2016). T tokens, D model width.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class LayerNorm(Protocol):
    """See `reference`."""

    def __call__(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        """Return y_TD."""
        ...


class AddLayerNorm(Protocol):
    """See `add_reference`."""

    def __call__(
        self, x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm."""
        ...


def reference(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Return y in the dtype of x, fp32 or bf16."""
    return F.layer_norm(x_TD.float(), x_TD.shape[-1:], weight_D.float(), bias_D.float(), eps).to(x_TD.dtype)


def add_reference(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the residual sum `x + delta` and its norm."""
    sum_TD = x_TD + delta_TD
    return sum_TD, reference(sum_TD, weight_D, bias_D, eps)
