"""Dynamic quantisation to fp8 (e4m3): values times a scale for every `group` neighbours of a row.

`scale = max|x| / 448`, so that the largest of a group becomes fp8's largest number; x is about `values * scale`. A
group of 128 is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2); a group as wide as the row is a scale a token. A group
depends on nothing outside of it.

T tokens, D width, G groups a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 128
LARGEST = 448.0
# The least that a group's largest magnitude passes for: its scale stays a normal number.
LEAST = 1e-30


class Quantized(NamedTuple):
    """x is about `values_TD * scales_TG`, each scale for `D / G` neighbours."""

    values_TD: Tensor  # fp8 e4m3
    scales_TG: Tensor  # fp32


def scaled(x_TD: Tensor, group: int = GROUP) -> Quantized:
    """As `reference`, before the values are rounded: fp32."""
    grouped = x_TD.float().unflatten(1, (x_TD.shape[1] // group, group))
    largest_TG1 = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST)
    # Not `LARGEST / largest_TG1`, which torch rounds twice.
    values = (grouped * torch.full_like(largest_TG1, LARGEST).div(largest_TG1)).clamp(-LARGEST, LARGEST)
    return Quantized(values.flatten(1), (largest_TG1 / LARGEST).squeeze(2))


def reference(x_TD: Tensor, group: int = GROUP, *, num_rows: Tensor | None = None) -> Quantized:
    """x fp32, bf16 or fp16, D a multiple of `group`. Rows from `num_rows` on, i32 [1] on the device, may be left undefined."""
    values_TD, scales_TG = scaled(x_TD, group)
    return Quantized(values_TD.to(torch.float8_e4m3fn), scales_TG)


def packed_bytes(width: int) -> int:
    """Of a packed row of D numbers: D fp8 values, their D / 128 scales, and nothing up to a multiple of 16 bytes."""
    assert width % GROUP == 0, f"{width} columns, groups of {GROUP}"
    return -(-(width + width // GROUP * 4) // 16) * 16


def pack(quantized: Quantized) -> Tensor:
    """u8 [T, `packed_bytes(D)`]: rows with the scales of their groups of 128 behind them."""
    values_TD, scales_TG = quantized
    num_rows, width = values_TD.shape
    rows = torch.zeros(num_rows, packed_bytes(width), dtype=torch.uint8, device=values_TD.device)
    values, scales = unpack(rows, width)
    values.view(torch.uint8).copy_(values_TD.view(torch.uint8))
    scales.copy_(scales_TG)
    return rows


def unpack(rows: Tensor, width: int) -> Quantized:
    """What `pack` was given, as views of its rows."""
    assert rows.shape[1] == packed_bytes(width), f"rows of {rows.shape[1]} bytes, {width} numbers"
    scales = rows[:, width : width + width // GROUP * 4].view(torch.float32)
    return Quantized(rows[:, :width].view(torch.float8_e4m3fn), scales)


def dequantize(quantized: Quantized) -> Tensor:
    """fp32 [T, D]."""
    values_TD, scales_TG = quantized
    return values_TD.float() * scales_TG.repeat_interleave(values_TD.shape[1] // max(1, scales_TG.shape[1]), dim=1)
