"""Rotary position embedding, half-split form: the pair (x_i, x_{i + d/2}) is rotated by the angle `position * theta^(-2i/d)`.

Su et al., "RoFormer" (2021), in the layout of the Llama family. T tokens, H heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tables(num_positions: int, head_dim: int, theta: float, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, fp32 [positions, d]; the first half of the sines is negative, as `rotate` expects."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    angles = torch.arange(num_positions).float()[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(device), torch.cat((-sin, sin), dim=-1).to(device)


def reference(x_THd: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """The rotation in fp64, straight from the formula; rounded once to x's dtype."""
    half = x_THd.shape[-1] // 2
    inverse = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions_T.double()[:, None, None] * inverse
    first, second = x_THd.double().split(half, dim=-1)
    turned = (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin())
    return torch.cat(turned, dim=-1).to(x_THd.dtype)


def rotate(x_THd: Tensor, cos_T1d: Tensor, sin_T1d: Tensor) -> Tensor:
    """Rotate by tables already gathered at the tokens' positions, with a head dimension of one."""
    return torch.addcmul(x_THd * cos_T1d, x_THd.roll(x_THd.shape[-1] // 2, -1), sin_T1d)
