"""Dynamic quantisation of rows to fp8 (e4m3), with a scale for every `group` adjacent numbers of a row.

    scale = max|x| / 448,   values = round(x / scale),   x ~ values * scale

A group of 128 is DeepSeek-V3's (arXiv 2412.19437, section 3.3.2); a group as wide as the row gives one scale a token.

T tokens, D width, J groups of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 128
LARGEST = 448.0
# Lower bound of a group's largest magnitude, so that its scale is a normal number.
LEAST = 1e-30


class QuantizedRows(NamedTuple):
    """x ~ `values_TD * scales_TJ`, with a scale for `D / J` adjacent numbers."""

    values_TD: Tensor  # fp8 e4m3
    scales_TJ: Tensor  # fp32


def scaled(x_TD: Tensor, group: int = GROUP) -> QuantizedRows:
    """Return what `reference` does, before values are rounded: fp32."""
    grouped = x_TD.float().unflatten(1, (x_TD.shape[1] // group, group))
    largest_TJ1 = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=LEAST)
    # Not `LARGEST / largest_TJ1`, which torch rounds twice.
    values = (grouped * torch.full_like(largest_TJ1, LARGEST).div(largest_TJ1)).clamp(-LARGEST, LARGEST)
    return QuantizedRows(values.flatten(1), (largest_TJ1 / LARGEST).squeeze(2))


def reference(
    x_TD: Tensor, group: int = GROUP, *, num_rows: Tensor | None = None, index: Tensor | None = None
) -> QuantizedRows:
    """Quantise x in fp32, bf16 or fp16; D is a multiple of `group`.

    Rows from `num_rows` (i32 [1] on the device) on may be left undefined; or those that are not among the first `num_rows` of
    `index` (i32).
    """
    values_TD, scales_TJ = scaled(x_TD, group)
    return QuantizedRows(values_TD.to(torch.float8_e4m3fn), scales_TJ)


def packed_bytes(width: int) -> int:
    """Return the size of a packed row: D fp8 values, D / 128 scales, padded to a multiple of 16 bytes."""
    assert width % GROUP == 0, f"{width} columns, groups of {GROUP}"
    return -(-(width + width // GROUP * 4) // 16) * 16


def pack(quantized: QuantizedRows) -> Tensor:
    """Return u8 [T, `packed_bytes(D)`]: values followed by the scales of their groups of 128."""
    values_TD, scales_TJ = quantized
    num_rows, width = values_TD.shape
    rows = torch.zeros(num_rows, packed_bytes(width), dtype=torch.uint8, device=values_TD.device)
    values, scales = unpack(rows, width)
    values.view(torch.uint8).copy_(values_TD.view(torch.uint8))
    scales.copy_(scales_TJ)
    return rows


def unpack(rows: Tensor, width: int) -> QuantizedRows:
    """Return the values and scales of packed rows, as views."""
    assert rows.shape[1] == packed_bytes(width), f"rows of {rows.shape[1]} bytes, {width} numbers"
    scales = rows[:, width : width + width // GROUP * 4].view(torch.float32)
    return QuantizedRows(rows[:, :width].view(torch.float8_e4m3fn), scales)


def dequantize(quantized: QuantizedRows) -> Tensor:
    """Return fp32 [T, D]."""
    values_TD, scales_TJ = quantized
    return values_TD.float() * scales_TJ.repeat_interleave(values_TD.shape[1] // max(1, scales_TJ.shape[1]), dim=1)
