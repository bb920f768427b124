"""Product with the sigmoid of a gate: `kernels.ops.sigmoid_mul` in Triton. A program takes one head of one token.

T tokens, H heads, d head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel


@triton.jit
def sigmoid_mul_kernel(
    x_ptr, gate_ptr, y_ptr, width, stride_token, stride_head, ONE_GATE: tl.constexpr, COLUMNS: tl.constexpr
):
    wait_for_previous_kernel()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, COLUMNS)
    mask = d < width
    at = (token * tl.num_programs(1) + head) * width + d
    gate_ptr += token * stride_token + head * stride_head
    gate = tl.load(gate_ptr) if ONE_GATE else tl.load(gate_ptr + d, mask=mask, other=0.0)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * tl.sigmoid(gate.to(tl.float32))).to(y_ptr.dtype.element_ty), mask=mask)


def warps_of(columns: int) -> int:
    return min(16, max(1, columns // 512))


def sigmoid_mul(x_THd: Tensor, gate_THd: Tensor) -> Tensor:
    """Run `kernels.ops.sigmoid_mul.reference`."""
    num_tokens, num_heads, dim = x_THd.shape
    assert x_THd.is_contiguous(), f"strides {x_THd.stride()} of shape {tuple(x_THd.shape)}"
    assert gate_THd.shape in (x_THd.shape, (num_tokens, num_heads, 1)), (x_THd.shape, gate_THd.shape)
    assert gate_THd.stride(2) == 1, f"strides {gate_THd.stride()} of gates"
    y_THd = torch.empty_like(x_THd)
    if num_tokens:
        columns = triton.next_power_of_2(dim)
        sigmoid_mul_kernel[(num_tokens, num_heads)](
            x_THd,
            gate_THd,
            y_THd,
            dim,
            gate_THd.stride(0),
            gate_THd.stride(1),
            ONE_GATE=gate_THd.shape[2] == 1,
            COLUMNS=columns,
            num_warps=warps_of(columns),
            **PDL,
        )
    return y_THd
