"""Layer normalisation in one pass, with the residual addition before it: `kernels.ops.layer_norm` in Triton.

A program takes one row, for any number of rows.

T tokens, D model width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.rms_norm import warps_of


@triton.jit
def layer_norm_kernel(
    x_ptr,
    delta_ptr,  # None: nothing is added
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    width,
    eps,
    COLUMNS: tl.constexpr,
):
    wait_for_previous_kernel()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    mask = d < width
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x += tl.load(delta_ptr + row * width + d, mask=mask, other=0.0).to(tl.float32)
        total = x.to(dtype)
        tl.store(sum_ptr + row * width + d, total, mask=mask)
        x = total.to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    weight = tl.load(weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + d, (x * scale * weight + bias).to(dtype), mask=mask)


def _launch(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor | None, Tensor]:
    """Return the sum, if there is one, and the norm."""
    num_tokens, width = x_TD.shape
    assert x_TD.is_contiguous(), f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
    for name, vector in (("weights", weight_D), ("biases", bias_D)):
        assert vector.shape == (width,), f"{tuple(vector.shape)} {name} for {width}"
        assert vector.is_contiguous(), f"strides {vector.stride()} of {name}"
    assert delta_TD is None or (delta_TD.shape == x_TD.shape and delta_TD.is_contiguous()), delta_TD
    sum_TD, y_TD = None if delta_TD is None else torch.empty_like(x_TD), torch.empty_like(x_TD)
    if num_tokens:
        columns = triton.next_power_of_2(width)
        layer_norm_kernel[(num_tokens,)](
            x_TD, delta_TD, weight_D, bias_D, sum_TD, y_TD, width, eps,
            COLUMNS=columns, num_warps=warps_of(columns), **PDL,
        )  # fmt: skip
    return sum_TD, y_TD


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Run `kernels.ops.layer_norm.reference`."""
    return _launch(x_TD, None, weight_D, bias_D, eps)[1]


def add_layer_norm(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Run `kernels.ops.layer_norm.add_reference`."""
    sum_TD, y_TD = _launch(x_TD, delta_TD, weight_D, bias_D, eps)
    assert sum_TD is not None
    return sum_TD, y_TD
