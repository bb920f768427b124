"""Root-mean-square normalisation of groups of a row, with a gate:

    y = norm(silu(z) * x) * weight    gate first: Mamba-2 (Dao and Gu, 2024), as in Nemotron-H and Granite 4
    y = norm(x) * weight * silu(z)    else: gated delta net (Yang et al., 2024), as in Qwen3-Next

where `norm(x) = x / sqrt(mean(x^2) + eps)` over each group. In fp32, rounded once.

T tokens, D width of the rows.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class GatedRmsNorm(Protocol):
    """See `reference`."""

    def __call__(
        self, x_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float, group_size: int, gate_first: bool
    ) -> Tensor:
        """Return y_TD."""
        ...


def reference(x_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float, group_size: int, gate_first: bool) -> Tensor:
    """Return contiguous y in x's dtype.

    Args:
        x_TD, z_TD: of one dtype, any distance between rows.
        weight_D: of the whole row, any float dtype: one group's weight is repeated by the caller.
        eps: added to the mean square.
        group_size: numbers that are normalised together; divides D.
        gate_first: see the module.
    """
    x, gate = x_TD.float(), F.silu(z_TD.float())
    groups = (x * gate if gate_first else x).unflatten(-1, (-1, group_size))
    normed = groups / (groups.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    weighted_TD = normed.flatten(-2) * weight_D.float()
    return (weighted_TD if gate_first else weighted_TD * gate).to(x_TD.dtype)
