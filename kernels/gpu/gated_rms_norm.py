"""The gated RMS norms in one pass: `kernels.ops.gated_rms_norm` in Triton.

A program takes some groups of one row.

T tokens, D width of the rows. In the kernel J groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.causal_conv1d import silu
from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel

_LEAST = 1024  # numbers of a program


@triton.jit
def gated_rms_norm_kernel(
    x,
    z,
    weight,
    y,
    num_groups,
    width,
    eps,
    stride_x,
    stride_z,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):
    """Grid (groups, rows); groups of `width` numbers."""
    wait_for_previous_kernel()
    row = tl.program_id(1).to(tl.int64)
    group_J = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, COLUMNS)
    mask = (group_J < num_groups)[:, None] & (column < width)
    at = group_J[:, None] * width + column
    value = tl.load(x + row * stride_x + at, mask=mask, other=0.0).to(tl.float32)
    gate = silu(tl.load(z + row * stride_z + at, mask=mask, other=0.0).to(tl.float32))
    if GATE_FIRST:
        value *= gate
    value *= tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)[:, None]
    value *= tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    if not GATE_FIRST:
        value *= gate
    tl.store(y + row * (num_groups * width) + at, value.to(y.dtype.element_ty), mask=mask)


def tile_of(group_size: int) -> tuple[int, int, int]:
    """Return the groups of a program, the padded size of one, and warps."""
    columns = triton.next_power_of_2(group_size)
    groups = max(1, _LEAST // columns)
    return groups, columns, min(16, max(1, groups * columns // 512))


def gated_rms_norm(
    x_TD: Tensor, z_TD: Tensor, weight_D: Tensor, eps: float, group_size: int, gate_first: bool
) -> Tensor:
    """Run `kernels.ops.gated_rms_norm.reference`."""
    num_tokens, width = x_TD.shape
    assert weight_D.shape == (width,), f"{tuple(weight_D.shape)} weights for {width}"
    assert z_TD.shape == x_TD.shape, f"gates {tuple(z_TD.shape)} of {tuple(x_TD.shape)}"
    assert width % group_size == 0, f"groups of {group_size} in rows of {width}"
    for rows in (x_TD, z_TD):
        assert rows.stride(1) == 1, f"strides {rows.stride()} of shape {tuple(rows.shape)}"
    y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    if num_tokens:
        num_groups = width // group_size
        groups, columns, warps = tile_of(group_size)
        gated_rms_norm_kernel[triton.cdiv(num_groups, groups), num_tokens](
            x_TD, z_TD, weight_D, y_TD, num_groups, group_size, eps, x_TD.stride(0), z_TD.stride(0),
            GROUPS=groups, COLUMNS=columns, GATE_FIRST=gate_first, num_warps=warps, **PDL,
        )  # fmt: skip
    return y_TD
