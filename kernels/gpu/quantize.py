"""Quantisation to fp8, and the activation of dense layers: `kernels.ops.quantize` and
`kernels.ops.experts.silu_mul_reference` in Triton.

T rows, D width, G groups a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.ops import quantize as spec
from expertwire.kernels.ops.quantize import GROUP, Quantized

MOST_PROGRAMS = 4096  # that rows are dealt out to
_LARGEST, _LEAST = tl.constexpr(spec.LARGEST), tl.constexpr(spec.LEAST)


@triton.jit
def scale_groups(x, GROUP: tl.constexpr):
    """Values of [N] before they are rounded to fp8, and scales [N / GROUP]; GROUP is a power of two."""
    grouped = tl.reshape(x, x.shape[0] // GROUP, GROUP)
    largest = tl.maximum(tl.max(tl.abs(grouped), axis=1), _LEAST)
    values = grouped * tl.div_rn(_LARGEST, largest)[:, None]
    values = tl.minimum(tl.maximum(values, -_LARGEST), _LARGEST)
    return tl.reshape(values, x.shape[0]), tl.div_rn(largest, _LARGEST)


@triton.jit
def store_scaled(x, values_ptr, scales_ptr, row, start, width, GROUP: tl.constexpr):
    """Quantise the columns from `start` on, of a row of `width` columns; GROUP 0 is a scale a row, of which `x` is all."""
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
    num_rows_ptr,
    width,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantise rows of `width` columns; or if GATED, multiply as many ups by the silu of as many gates before them. `num_rows`:
    how many there are, else a row for each program."""
    wait_for_previous()
    num_rows = tl.num_programs(0) if num_rows_ptr is None else tl.load(num_rows_ptr)
    start = tl.program_id(1) * COLUMNS
    d = start + tl.arange(0, COLUMNS)
    dtype = x_ptr.dtype.element_ty
    for r in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        if GATED:
            gate = tl.load(x_ptr + row * 2 * width + d, mask=d < width, other=0.0).to(tl.float32)
            up = tl.load(x_ptr + row * 2 * width + width + d, mask=d < width, other=0.0).to(tl.float32)
            silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
            tl.store(values_ptr + row * width + d, (silu * up).to(dtype), mask=d < width)
        else:
            x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
            store_scaled(x, values_ptr, scales_ptr, row, start, width, GROUP)


def check_group(width: int, group: int) -> int:
    """The kernels' GROUP."""
    assert group == width or (width % group == 0 and group == triton.next_power_of_2(group)), f"{group} of {width}"
    return 0 if group == width else group


def allocate(num_rows: int, width: int, group: int, like: Tensor, dtype: torch.dtype) -> Quantized:
    """Room for the result."""
    values_TD = like.new_empty(num_rows, width, dtype=dtype)
    return Quantized(values_TD, like.new_empty(num_rows, width // group, dtype=torch.float32))


def _columns(width: int, group: int) -> int:
    return triton.next_power_of_2(width) if group == 0 else min(1024, max(group, triton.next_power_of_2(width)))


def _run(
    x_TD: Tensor,
    values_TD: Tensor,
    scales_TG: Tensor,
    *,
    gated: bool,
    group: int,
    num_rows: Tensor | None = None,
) -> None:
    most_rows, width = values_TD.shape
    assert x_TD.is_contiguous(), f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
    if most_rows == 0:
        return
    columns = _columns(width, group)
    # Of the rows that there can be, few are there: programs for all of them would take longer to end than the rows to quantise.
    programs = most_rows if num_rows is None else min(most_rows, MOST_PROGRAMS)
    quantize_kernel[(programs, triton.cdiv(width, columns))](
        x_TD,
        values_TD,
        scales_TG,
        num_rows,
        width,
        gated,
        group,
        columns,
        num_warps=_warps(columns),
        **EARLY,
    )


def _warps(columns: int) -> int:
    return min(16, max(1, columns // 512))


def quantize(
    x_TD: Tensor,
    group: int = GROUP,
    *,
    num_rows: Tensor | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Quantized:
    """As `kernels.ops.quantize.reference`; as `scaled` with dtype fp32. The group is a power of two or the row."""
    done = allocate(*x_TD.shape, group, x_TD, dtype)
    _run(x_TD, *done, gated=False, group=check_group(x_TD.shape[1], group), num_rows=num_rows)
    return done


def silu_mul(gate_up_NF: Tensor) -> Tensor:
    """As `kernels.ops.experts.silu_mul_reference`."""
    num_rows, width = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
    out_NF = gate_up_NF.new_empty(num_rows, width)
    _run(gate_up_NF, out_NF, out_NF, gated=True, group=1)
    return out_NF


def cases() -> list[Case]:
    forms = {"quantize": (False, GROUP), "quantize rows": (False, 0), "silu_mul": (True, 1)}  # gated, group
    found = []
    for form, (gated, group) in forms.items():
        for width in (2048, 768) if gated else (7168, 2048):
            columns = _columns(width, group)
            found.append(
                Case(
                    name=f"quantize.{form} D{width}",
                    kernel=quantize_kernel,
                    args={
                        "x_ptr": torch.bfloat16,
                        "values_ptr": torch.bfloat16 if gated else torch.float8_e4m3fn,
                        "scales_ptr": torch.float32,
                        "num_rows_ptr": torch.int32 if form.startswith("quantize") and width == 2048 else None,
                        "width": width,
                    },
                    constexprs={"GATED": gated, "GROUP": group, "COLUMNS": columns},
                    num_warps=_warps(columns),
                    options=EARLY,
                    expect={90: "", 100: ""},
                    blocks_per_sm=2,
                )
            )
    return found
