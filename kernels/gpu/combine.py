"""Weighted sum of a token's expert rows: `kernels.ops.combine` in Triton, bit for bit.

T tokens, K experts a token, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel

OPTIONS = {"enable_fp_fusion": False, **PDL}  # product and sum round separately
COLUMNS_PER_PROGRAM = 1024


@triton.jit
def combine_kernel(
    rows_ptr, weights_ptr, shared_ptr, out_ptr, width, K: tl.constexpr, HAS_SHARED: tl.constexpr, COLUMNS: tl.constexpr
):
    wait_for_previous_kernel()
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype = out_ptr.dtype.element_ty
    total = tl.zeros([COLUMNS], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(rows_ptr + (t * K + k) * width + d, mask=d < width, other=0.0).to(tl.float32)
        total += row * tl.load(weights_ptr + t * K + k)
    y = total.to(dtype)
    if HAS_SHARED:
        shared = tl.load(shared_ptr + t * width + d, mask=d < width, other=0.0).to(tl.float32)
        y = (y.to(tl.float32) + shared).to(dtype)
    tl.store(out_ptr + t * width + d, y, mask=d < width)


def combine(rows_TKD: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None) -> Tensor:
    """Run `kernels.ops.combine.reference`; everything contiguous, weights fp32."""
    num_tokens, top_k, width = rows_TKD.shape
    assert rows_TKD.is_contiguous(), f"strides {rows_TKD.stride()}"
    assert weights_TK.shape == (num_tokens, top_k), f"{tuple(weights_TK.shape)} weights of {tuple(rows_TKD.shape)}"
    assert weights_TK.is_contiguous(), f"strides {weights_TK.stride()} of weights"
    assert weights_TK.dtype == torch.float32, f"{weights_TK.dtype} weights"
    assert shared_TD is None or (shared_TD.shape == (num_tokens, width) and shared_TD.is_contiguous()), shared_TD
    out_TD = rows_TKD.new_empty(num_tokens, width)
    if num_tokens == 0:
        return out_TD
    columns = min(COLUMNS_PER_PROGRAM, triton.next_power_of_2(width))
    combine_kernel[(num_tokens, triton.cdiv(width, columns))](
        rows_TKD,
        weights_TK,
        out_TD if shared_TD is None else shared_TD,
        out_TD,
        width,
        top_k,
        shared_TD is not None,
        columns,
        **OPTIONS,
    )
    return out_TD
