"""Quantisation to fp8, and the activation of dense layers, in Triton.

`kernels.ops.quantize` and `kernels.ops.experts.silu_mul_reference` define them.

T tokens, D model width, F width of gate and up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.ops import quantize as spec
from expertwire.kernels.ops.quantize import GROUP, QuantizedRows

MAX_PROGRAMS = 4096  # for a device-side number of rows
_LARGEST, _LEAST = tl.constexpr(spec.LARGEST), tl.constexpr(spec.LEAST)


@triton.jit
def scale_groups(x, GROUP: tl.constexpr):
    """Return the values of a vector before rounding to fp8, and a scale for each GROUP of them; GROUP is a power of two."""
    grouped = tl.reshape(x, x.shape[0] // GROUP, GROUP)
    largest = tl.maximum(tl.max(tl.abs(grouped), axis=1), _LEAST)
    values = grouped * tl.div_rn(_LARGEST, largest)[:, None]
    values = tl.minimum(tl.maximum(values, -_LARGEST), _LARGEST)
    return tl.reshape(values, x.shape[0]), tl.div_rn(largest, _LARGEST)


@triton.jit
def store_scaled(x, values_ptr, scales_ptr, row, start, width, GROUP: tl.constexpr):
    """Quantise the columns from `start` on of a row of `width` columns.

    GROUP 0 means one scale a row, of which `x` is all.
    """
    if GROUP == 0:
        values, scales = scale_groups(x, x.shape[0])
        tl.store(scales_ptr + row + tl.arange(0, 1), scales)
    else:
        values, scales = scale_groups(x, GROUP)
        group = start // GROUP + tl.arange(0, x.shape[0] // GROUP)
        tl.store(scales_ptr + row * (width // GROUP) + group, scales, mask=group < width // GROUP)
    d = start + tl.arange(0, x.shape[0])
    tl.store(values_ptr + row * width + d, values.to(values_ptr.dtype.element_ty), mask=d < width)


@triton.jit
def quantize_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    index_ptr,
    num_rows_ptr,
    width,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantise rows of `width` columns, or with GATED multiply `width` ups by the silu of the `width`
    gates before them.

    `num_rows`: how many rows there are, else one for each program. `index`: which they are, a row maybe
    several times, else the first ones.
    """
    wait_for_previous_kernel()
    num_rows = tl.num_programs(0) if num_rows_ptr is None else tl.load(num_rows_ptr)
    start = tl.program_id(1) * COLUMNS
    d = start + tl.arange(0, COLUMNS)
    dtype = x_ptr.dtype.element_ty
    for r in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64) if index_ptr is None else tl.load(index_ptr + r).to(tl.int64)
        if GATED:
            gate = tl.load(x_ptr + row * 2 * width + d, mask=d < width, other=0.0).to(tl.float32)
            up = tl.load(x_ptr + row * 2 * width + width + d, mask=d < width, other=0.0).to(tl.float32)
            silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
            tl.store(values_ptr + row * width + d, (silu * up).to(dtype), mask=d < width)
        else:
            x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
            store_scaled(x, values_ptr, scales_ptr, row, start, width, GROUP)


def check_group(width: int, group: int) -> int:
    """Return the kernels' GROUP for a width and a group size."""
    assert group == width or (width % group == 0 and group == triton.next_power_of_2(group)), f"{group} of {width}"
    return 0 if group == width else group


def allocate(num_rows: int, width: int, group: int, like: Tensor, dtype: torch.dtype) -> QuantizedRows:
    """Return undefined memory for the result."""
    values_TD = like.new_empty(num_rows, width, dtype=dtype)
    return QuantizedRows(values_TD, like.new_empty(num_rows, width // group, dtype=torch.float32))


def columns_of(width: int, group: int) -> int:
    return triton.next_power_of_2(width) if group == 0 else min(1024, max(group, triton.next_power_of_2(width)))


def _run(
    x_TD: Tensor,
    values_TD: Tensor,
    scales: Tensor,
    *,
    gated: bool,
    group: int,
    num_rows: Tensor | None = None,
    index: Tensor | None = None,
) -> None:
    width, most_rows = values_TD.shape[1], len(values_TD) if index is None else len(index)
    assert x_TD.is_contiguous(), f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
    if most_rows == 0:
        return
    columns = columns_of(width, group)
    # Few of the possible rows exist: launching a program for each would take longer than quantising those that do.
    programs = most_rows if num_rows is None else min(most_rows, MAX_PROGRAMS)
    quantize_kernel[(programs, triton.cdiv(width, columns))](
        x_TD,
        values_TD,
        scales,
        index,
        num_rows,
        width,
        gated,
        group,
        columns,
        num_warps=warps_of(columns),
        **PDL,
    )


def warps_of(columns: int) -> int:
    return min(16, max(1, columns // 512))


def quantize(
    x_TD: Tensor,
    group: int = GROUP,
    *,
    num_rows: Tensor | None = None,
    index: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> QuantizedRows:
    """Run `kernels.ops.quantize.reference`, or `scaled` with dtype fp32. The group is a power of two or the row.

    `index`: i32, the rows to quantise, of which the first `num_rows` count; others stay undefined.
    """
    most_rows, width = x_TD.shape
    done = allocate(most_rows, width, group, x_TD, dtype)
    _run(x_TD, *done, gated=False, group=check_group(width, group), num_rows=num_rows, index=index)
    return done


def silu_mul(gate_up_TF: Tensor) -> Tensor:
    """Run `kernels.ops.experts.silu_mul_reference`."""
    num_rows, width = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = gate_up_TF.new_empty(num_rows, width)
    _run(gate_up_TF, out_TF, out_TF, gated=True, group=1)
    return out_TF
