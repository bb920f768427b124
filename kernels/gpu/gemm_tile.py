"""The computation of one tile of a grouped GEMM: a block of weights, in any format, times rows of x, and the
activation of that.

Weights are the left operand and tokens the columns of the product. K is summed in steps of
`BLOCK_K` in ascending order: one instruction family and one order of summation for any number of
tokens.

M rows of a weight matrix, K its columns, F columns of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertwire.kernels.gpu import formats


@triton.jit
def activate(acc, bias_ptr, f, F, alpha, limit, ROWS: tl.constexpr, TOKENS: tl.constexpr, KIND: tl.constexpr):
    """Return columns `f` of the output from [ROWS, TOKENS] of the product; `bias_ptr` is the expert's."""
    if KIND.startswith("swiglu"):
        # Rows are interleaved by eight: gate and up of a column lie in the same thread.
        gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1)))
        gate = tl.reshape(gate, (ROWS // 2, TOKENS))
        up = tl.reshape(up, (ROWS // 2, TOKENS))
        if bias_ptr is not None:
            gate += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[:, None]
            up += tl.load(bias_ptr + F + f, mask=f < F, other=0.0).to(tl.float32)[:, None]
        if KIND == "swiglu_clamped":
            gate = tl.minimum(gate, limit)
            up = tl.minimum(tl.maximum(up, -limit), limit)
            result = gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)
        else:
            result = gate / (1.0 + tl.exp(-gate)) * up
    else:
        result = acc
        if bias_ptr is not None:
            result += tl.load(bias_ptr + f, mask=f < F, other=0.0).to(tl.float32)[:, None]
        if KIND == "relu2":
            result = tl.maximum(result, 0.0) * tl.maximum(result, 0.0)
    return result


@triton.jit
def load_x(x, x_stride, source, row, k, exists, K, GATHER: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load [TOKENS, BLOCK_K] of the rows `source`, or of the rows from `row` on."""
    if GATHER:
        column = k + tl.arange(0, BLOCK_K)
        inside = exists[:, None] & (column < K)[None, :]
        block = tl.load(x + source.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0.0)
    else:
        block = x.load([row, k])
    return block


@triton.jit
def multiply_tile(
    w_desc,
    w_scale,
    x,
    x_stride,
    x_scale,
    x_scale_stride,
    source,
    expert,
    block,
    row,
    scale_column,
    exists,
    M,
    K,
    FORMAT: tl.constexpr,
    GATED: tl.constexpr,
    GATHER: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Return fp32 [ROWS, TOKENS]: the block of weights times the rows of x, summed in steps of BLOCK_K.

    The loop has `STAGES` too, so that loads of scales are pipelined with those of the matrices.
    """
    SCALES: tl.constexpr = BLOCK_K // (16 if FORMAT == "nvfp4" else 32)
    acc = tl.zeros((ROWS, TOKENS), tl.float32)
    if FORMAT == "fp8_block":
        k_blocks = tl.cdiv(K, BLOCK_K)
        half_blocks = tl.cdiv(M // 2, 128)  # gate and up have blocks of their own
        w_scale += expert.to(tl.int64) * (2 * half_blocks if GATED else tl.cdiv(M, 128)) * k_blocks
        up_scale = w_scale + half_blocks * k_blocks
        block_row = (block * ROWS // 2 if GATED else block * ROWS) // 128 * k_blocks
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if FORMAT == "fp8_block":
            scale_x = x_scale.load([k // BLOCK_K, scale_column])
            scale_w = tl.load(w_scale + block_row + k // BLOCK_K)
            if GATED:
                scale_up = tl.load(up_scale + block_row + k // BLOCK_K)
                scale_w = tl.where(tl.arange(0, ROWS) // 8 % 2 == 1, scale_up, scale_w)[:, None]
        if FORMAT == "dense" or FORMAT == "fp8_block" or FORMAT == "fp8_row":
            w_block = w_desc.load([expert, block * ROWS, k]).reshape(ROWS, BLOCK_K)
        else:
            words = w_desc.load([expert, block * ROWS, k // 8]).reshape(ROWS, BLOCK_K // 8)
            scale = w_scale.load([expert, k // BLOCK_K * SCALES, block * ROWS]).reshape(SCALES, ROWS)
            w_block = formats.dequantise(words, scale, FORMAT, SCALES, ROWS, BLOCK_K // 8)
            w_block = w_block.to(x.dtype.element_ty if GATHER else x.dtype)
        x_block = tl.trans(load_x(x, x_stride, source, row, k, exists, K, GATHER, BLOCK_K))
        if FORMAT == "fp8_block":
            acc += tl.dot(w_block, x_block) * (scale_w * scale_x)
        else:
            # Hopper's tensor cores add fp8 products in few bits: sums of BLOCK_K products are added outside.
            acc = tl.dot(w_block, x_block, acc, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
    if FORMAT == "fp8_row":
        m = block * ROWS + tl.arange(0, ROWS)
        scale_w = tl.load(w_scale + expert.to(tl.int64) * M + m, mask=m < M, other=0.0)
        acc *= scale_w[:, None] * tl.load(x_scale + source * x_scale_stride)[None, :]
    return acc
