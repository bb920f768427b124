"""Root-mean-square normalisation: `y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension, in fp32.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] fp32 or bf16, weight [D] -> [..., D] in x's dtype."""
    x_fp32 = x.float()
    scale = torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (x_fp32 * scale * weight.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference`, by torch's fused kernel."""
    return F.rms_norm(x, weight.shape, weight, eps)
