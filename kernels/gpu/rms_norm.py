"""Root-mean-square normalisation in one pass, with the residual sum before it and quantisation to fp8 behind it:
`kernels.rms_norm` and `kernels.quantize` in Triton.

A program takes a row, whatever the number of rows. T tokens, D model width, G groups of columns with a scale each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu import quantize
from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.quantize import store_scaled
from expertwire.kernels.quantize import GROUP, Quantized


@triton.jit
def rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    values_ptr,
    scales_ptr,
    width,
    eps,
    ADD: tl.constexpr,
    STORE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    wait_for_previous()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    mask = d < width
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(sum_ptr + row * width + d, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    y = (x * scale * tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    if STORE:
        tl.store(y_ptr + row * width + d, y, mask=mask)
    if QUANTIZE:
        store_scaled(y.to(tl.float32), values_ptr, scales_ptr, row, 0, width, GROUP)


class Normed(NamedTuple):
    """What was asked for of: the residual sum, its norm, and the norm quantised."""

    sum_TD: Tensor | None
    y_TD: Tensor | None
    quantized: Quantized | None


def _warps(columns: int) -> int:
    return min(16, max(1, columns // 512))


def norm(
    x_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    delta_TD: Tensor | None = None,
    store: bool = True,
    group: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> Normed:
    """The norm of x, or of `x + delta`: as it is if `store`, quantised in groups of `group` if that is not None.

    `dtype` is that of the quantised values; fp32 leaves them unrounded.
    """
    num_tokens, width = x_TD.shape
    assert x_TD.is_contiguous(), f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
    assert weight_D.shape == (width,), f"{tuple(weight_D.shape)} weights for {width}"
    assert weight_D.is_contiguous(), f"strides {weight_D.stride()} of weights"
    assert delta_TD is None or (delta_TD.shape == x_TD.shape and delta_TD.is_contiguous()), delta_TD
    sum_TD = None if delta_TD is None else torch.empty_like(x_TD)
    y_TD = torch.empty_like(x_TD) if store else None
    quantized = None if group is None else quantize.allocate(num_tokens, width, group, x_TD, dtype)
    if num_tokens:
        columns = triton.next_power_of_2(width)
        values, scales = (x_TD, x_TD) if quantized is None else quantized
        rms_norm_kernel[(num_tokens,)](
            x_TD,
            x_TD if delta_TD is None else delta_TD,
            weight_D,
            x_TD if sum_TD is None else sum_TD,
            x_TD if y_TD is None else y_TD,
            values,
            scales,
            width,
            eps,
            ADD=delta_TD is not None,
            STORE=store,
            QUANTIZE=group is not None,
            GROUP=0 if group is None else quantize.check_group(width, group),
            COLUMNS=columns,
            num_warps=_warps(columns),
            **EARLY,
        )
    return Normed(sum_TD, y_TD, quantized)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """As `kernels.rms_norm.reference`."""
    y_TD = norm(x_TD, weight_D, eps).y_TD
    assert y_TD is not None
    return y_TD


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kernels.rms_norm.add_reference`."""
    sum_TD, y_TD, _ = norm(x_TD, weight_D, eps, delta_TD=delta_TD)
    assert sum_TD is not None
    assert y_TD is not None
    return sum_TD, y_TD


def cases() -> list[Case]:
    forms = {  # add, store, quantize, group
        "norm": (False, True, False, 0),
        "add": (True, True, False, 0),
        "add quantize": (True, True, True, GROUP),
        "quantize rows": (False, False, True, 0),
    }
    bf16 = torch.bfloat16
    return [
        Case(
            name=f"rms_norm.{form} D{width}",
            kernel=rms_norm_kernel,
            args={
                **dict.fromkeys(("x_ptr", "delta_ptr", "weight_ptr", "sum_ptr", "y_ptr"), bf16),
                "values_ptr": torch.float8_e4m3fn if quantized else bf16,
                "scales_ptr": torch.float32 if quantized else bf16,
                "width": width,
                "eps": 1e-6,
            },
            constexprs={
                "ADD": add,
                "STORE": store,
                "QUANTIZE": quantized,
                "GROUP": group,
                "COLUMNS": triton.next_power_of_2(width),
            },
            num_warps=_warps(triton.next_power_of_2(width)),
            options=EARLY,
            expect={90: "", 100: ""},
            blocks_per_sm=2,
        )
        for form, (add, store, quantized, group) in forms.items()
        for width in (2048, 2880, 7168)
        if not quantized or width != 2880
    ]
