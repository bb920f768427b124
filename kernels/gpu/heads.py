"""A linear layer for each head in one launch: `kernels.ops.heads` in Triton.

A program multiplies a tile of one head's weight rows by a tile of tokens. As in `linear`, the
weights are the left operand and an output is one sum over blocks of `block_k` inputs in ascending
order, so a token's bits depend on that token alone: `rows`, `tokens`, warps and stages follow the
number of tokens, `block_k` follows the dtype. Tokens and heads may be strided on both sides, so
nothing is copied before or after.

T tokens, H heads, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops.heads import PerHead

# As in `linear`: without it, ptxas for Blackwell spills a register or two where hundreds are left.
OPTIONS = {"maxnreg": 255, **PDL}


@triton.jit(do_not_specialize=["num_tokens"])
def per_head_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    x_stride_token,
    x_stride_head,
    y_stride_token,
    y_stride_head,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Grid (tiles of N, H, tiles of T): x [T, H, K], w [H, N, K], y [T, H, N]. EVEN: K is a multiple of BLOCK_K."""
    wait_for_previous_kernel()
    head = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + head * num_outputs * num_inputs + n[:, None] * num_inputs
    x_rows = x_ptr + head * x_stride_head + t.to(tl.int64)[:, None] * x_stride_token
    w_mask, x_mask = (n < num_outputs)[:, None], (t < num_tokens)[:, None]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        at = start + k[None, :]
        if EVEN:
            w = tl.load(w_rows + at, mask=w_mask, other=0.0)
            x = tl.load(x_rows + at, mask=x_mask, other=0.0)
        else:
            w = tl.load(w_rows + at, mask=w_mask & (at < num_inputs), other=0.0)
            x = tl.load(x_rows + at, mask=x_mask & (at < num_inputs), other=0.0)
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    y_rows = y_ptr + head * y_stride_head + t.to(tl.int64)[:, None] * y_stride_token
    mask = (t < num_tokens)[:, None] & (n < num_outputs)[None, :]
    tl.store(y_rows + n[None, :], tl.trans(total.to(y_ptr.dtype.element_ty)), mask=mask)


@dataclass(frozen=True, kw_only=True)
class PerHeadTileConfig:
    """Tile sizes and launch options. Only `block_k` affects the bits."""

    block_k: int
    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def tile_config(num_tokens: int, dtype: torch.dtype) -> PerHeadTileConfig:
    """Return the configuration for so many tokens of this dtype."""
    if dtype == torch.float32:
        return PerHeadTileConfig(block_k=16, rows=64, tokens=16 if num_tokens <= 16 else 64, num_warps=4, num_stages=3)
    if num_tokens <= 64:
        tokens = max(16, triton.next_power_of_2(num_tokens))
        return PerHeadTileConfig(block_k=64, rows=64, tokens=tokens, num_warps=4, num_stages=4)
    return PerHeadTileConfig(block_k=64, rows=128, tokens=128, num_warps=8, num_stages=3)


def prepare(w_HNK: Tensor, *, device: Device) -> PerHead:
    """Return `kernels.ops.heads.prepare`'s callable for bf16, fp16 or fp32.

    Raises:
        ValueError: fp32 on Blackwell.
    """
    num_heads, num_outputs, num_inputs = w_HNK.shape
    dtype = w_HNK.dtype
    if device.arch >= 100 and dtype == torch.float32:
        raise ValueError("dtype is float32, whose products Triton makes in TF32 on this GPU; allowed is bfloat16")
    assert w_HNK.is_contiguous(), f"strides {w_HNK.stride()} of shape {tuple(w_HNK.shape)}"

    def apply(x_THK: Tensor, out: Tensor | None = None) -> Tensor:
        num_tokens = len(x_THK)
        assert x_THK.shape[1:] == (num_heads, num_inputs), f"{tuple(x_THK.shape)} for {num_heads} x {num_inputs}"
        y_THN = x_THK.new_empty(num_tokens, num_heads, num_outputs) if out is None else out
        assert y_THN.shape == (num_tokens, num_heads, num_outputs), f"output {tuple(y_THN.shape)}"
        assert x_THK.stride(2) == y_THN.stride(2) == 1, f"strides {x_THK.stride()} and {y_THN.stride()}"
        assert x_THK.dtype == y_THN.dtype == dtype, f"{x_THK.dtype} by {dtype} into {y_THN.dtype}"
        if num_tokens:
            _launch(x_THK, w_HNK, y_THN, tile_config(num_tokens, dtype))
        return y_THN

    return apply


def _launch(x_THK: Tensor, w_HNK: Tensor, y_THN: Tensor, config: PerHeadTileConfig) -> None:
    num_heads, num_outputs, num_inputs = w_HNK.shape
    grid = triton.cdiv(num_outputs, config.rows), num_heads, triton.cdiv(len(x_THK), config.tokens)
    per_head_kernel[grid](
        x_THK, w_HNK, y_THN, len(x_THK), num_outputs, num_inputs, *x_THK.stride()[:2], *y_THN.stride()[:2],
        ROWS=config.rows, TOKENS=config.tokens, BLOCK_K=config.block_k, EVEN=num_inputs % config.block_k == 0,
        num_warps=config.num_warps, num_stages=config.num_stages, **OPTIONS,
    )  # fmt: skip
