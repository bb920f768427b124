"""Dense linear layer whose rows do not depend on how many there are: `kernels.ops.linear` in Triton.

The product is `w @ x^T` for one token as for thousands. Weights are the left operand, so that few
tokens still meet wide matrix instructions, and an output is the sum over blocks of `block_k` inputs
in ascending order. Where the weight has too few rows to occupy the device, K is cut into `splits`
(split-K), by the weight's shape alone, whose sums are added in order. For few tokens the splits are
computed by several programs and the last to finish adds them up; for many tokens one program
computes them one after another: the same additions.

An fp32 weight that meets bf16 activations is cut into three bf16 terms, side by side in K: every
product is exact, as in fp32. (Triton's fp32 product on Blackwell is TF32, whatever precision is
requested.)

An fp8 weight is read as it is stored and becomes bf16 in registers: `value * scale` in fp32,
rounded once, which gives the bits of the unpacked weight (`formats.dequantize`), multiplied in the
same order. So results are those of the unpacked weight for half the bytes, which bound decode.
Activations stay bf16: rounding them to fp8 too would give other results than the CPU's.

T tokens, D model width, or the input width of another layer, N output width. Scales [scale rows,
D / 128] are one for each block of 128 x 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.formats import BLOCK, GPU_LINEAR_FORMATS, QuantizedWeight, Weight, block_rows
from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.ops.linear import Linear, unpacked

_SIDE_BY_SIDE = 128  # tokens
_BLOCK_K = 64  # columns that are multiplied at once; fewer in fp32
# Without it, ptxas for Blackwell spills a register or two where hundreds are left.
OPTIONS = {"maxnreg": 255, **PDL}
SCALE_BLOCK = tl.constexpr(BLOCK)
_GROUP = tl.constexpr(8)  # tiles of weight rows taken together, for the L2 cache


@triton.jit
def _product(
    w_ptr,
    x_ptr,
    scale_ptr,
    scale_row_ptr,
    n,
    t,
    num_tokens,
    num_rows,
    depth,
    width,
    stride_t,
    start,
    end,
    FORMAT: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Return fp32 [rows, tokens], summed over the inputs from `start` to `end`, of `depth` per weight row.

    x has `width` columns, repeated for each term.
    """
    total = tl.zeros([n.shape[0], t.shape[0]], tl.float32)
    k = tl.arange(0, BLOCK_K)
    w_rows = w_ptr + n.to(tl.int64)[:, None] * depth
    x_rows = x_ptr + t.to(tl.int64)[:, None] * stride_t
    w_mask, x_mask = (n < num_rows)[:, None], (t < num_tokens)[:, None]
    if FORMAT == "fp8_row":
        scale = tl.load(scale_ptr + n, mask=n < num_rows, other=0.0)
    elif FORMAT == "fp8_block":
        scale_row = tl.load(scale_row_ptr + n, mask=n < num_rows, other=0)
        scales = scale_ptr + scale_row * tl.cdiv(depth, SCALE_BLOCK)
    for at in range(start, end, BLOCK_K):
        d = at + k[None, :]
        if EVEN:
            w = tl.load(w_rows + d, mask=w_mask, other=0.0)
            x_at = tl.multiple_of(at % width, BLOCK_K) if TERMS > 1 else at
            x = tl.load(x_rows + x_at + k[None, :], mask=x_mask, other=0.0)
        else:
            w = tl.load(w_rows + d, mask=w_mask & (d < end), other=0.0)
            x = tl.load(x_rows + d, mask=x_mask & (d < end), other=0.0)
        if FORMAT == "fp8_block":
            scale = tl.load(scales + at // SCALE_BLOCK)
        if FORMAT != "dense":
            w = (w.to(tl.float32) * scale[:, None]).to(x.dtype)
        total = tl.dot(w, tl.trans(x), total, input_precision="ieee")
    return total


@triton.jit
def _store(total, bias_ptr, y_ptr, n, t, num_tokens, num_rows, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(tl.float32)[:, None]
    y = tl.trans(total.to(y_ptr.dtype.element_ty))
    mask = (t < num_tokens)[:, None] & (n < num_rows)[None, :]
    tl.store(y_ptr + t.to(tl.int64)[:, None] * num_rows + n[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_programs"])
def linear_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    scale_row_ptr,
    bias_ptr,
    y_ptr,
    partials_ptr,
    counters_ptr,
    num_tokens,
    num_rows,
    width,
    stride_t,
    num_splits,
    split_k,
    num_programs,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    FORMAT: tl.constexpr,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Multiply w [N, TERMS * D] by x [T, D] into y [T, N].

    Scales are fp32 [N] ("fp8_row") or [scale rows, D / 128] ("fp8_block"), where weight row n has
    those of row `scale_row[n]`, i32 [N]. partials: fp32, a tile per (tile, split). counters: i32,
    one per tile, zeros before and after.
    """
    wait_for_previous_kernel()
    depth = TERMS * width
    row_tiles, token_tiles = tl.cdiv(num_rows, ROWS), tl.cdiv(num_tokens, TOKENS)
    num_items = row_tiles * token_tiles * (num_splits if SIDE_BY_SIDE else 1)
    for item in range(tl.program_id(0), num_items, num_programs):
        tile = item // num_splits if SIDE_BY_SIDE else item
        group = tile // (_GROUP * token_tiles)
        members = tl.minimum(_GROUP, row_tiles - group * _GROUP)
        within = tile - group * _GROUP * token_tiles
        n = (group * _GROUP + within % members) * ROWS + tl.arange(0, ROWS)
        t = (within // members) * TOKENS + tl.arange(0, TOKENS)
        first = item % num_splits if SIDE_BY_SIDE else 0
        end = tl.minimum(depth, (first + 1) * split_k) if SPLIT else depth
        total = _product(
            w_ptr, x_ptr, scale_ptr, scale_row_ptr, n, t, num_tokens, num_rows, depth, width, stride_t, first * split_k, end,
            FORMAT, TERMS, BLOCK_K, EVEN,
        )  # fmt: skip
        complete = True
        if SIDE_BY_SIDE:
            at = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
            tl.store(partials_ptr + item * (ROWS * TOKENS) + at, total)
            tl.debug_barrier()
            complete = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == num_splits - 1
            if complete:
                tl.store(counters_ptr + tile, 0)
                partials = partials_ptr + tile * num_splits * (ROWS * TOKENS) + at
                total = tl.load(partials, cache_modifier=".cg")
                for split in range(1, num_splits):
                    total += tl.load(partials + split * (ROWS * TOKENS), cache_modifier=".cg")
        elif SPLIT:
            for split in range(1, num_splits):
                end = tl.minimum(depth, (split + 1) * split_k)
                total += _product(
                    w_ptr, x_ptr, scale_ptr, scale_row_ptr, n, t, num_tokens, num_rows, depth, width, stride_t,
                    split * split_k, end, FORMAT, TERMS, BLOCK_K, EVEN,
                )  # fmt: skip
        if complete:
            _store(total, bias_ptr, y_ptr, n, t, num_tokens, num_rows, HAS_BIAS)


@dataclass(frozen=True, kw_only=True)
class LinearTileConfig:
    """Tile sizes and launch options. `block_k`, `splits` and `split_k` make the bits: they depend on
    the weight only.
    """

    block_k: int
    splits: int
    split_k: int
    rows: int
    tokens: int
    side_by_side: bool
    num_warps: int
    num_stages: int
    blocks_per_sm: int


def tile_config(num_tokens: int, num_rows: int, depth: int, dtype: torch.dtype, device: Device) -> LinearTileConfig:
    """Return the configuration for weights [num_rows, depth] that meet activations of this dtype."""
    block_k = 16 if dtype == torch.float32 else _BLOCK_K
    blocks = triton.cdiv(depth, block_k)
    row_tiles = triton.cdiv(num_rows, 64)
    # Splits computed side by side should occupy some 128 multiprocessors, with four blocks or more each.
    splits = 1
    while row_tiles * splits < 96 and splits < 32 and 8 * splits <= blocks:
        splits *= 2
    split_k = triton.cdiv(blocks, splits) * block_k
    splits = triton.cdiv(depth, split_k)
    side_by_side = splits > 1 and num_tokens <= _SIDE_BY_SIDE
    rows, tokens, num_warps, num_stages, blocks_per_sm = _tile(num_tokens, row_tiles, splits, dtype, device)
    return LinearTileConfig(
        block_k=block_k,
        splits=splits,
        split_k=split_k,
        rows=rows,
        tokens=tokens,
        side_by_side=side_by_side,
        num_warps=num_warps,
        num_stages=num_stages,
        blocks_per_sm=blocks_per_sm,
    )


def _tile(
    num_tokens: int, row_tiles: int, splits: int, dtype: torch.dtype, device: Device
) -> tuple[int, int, int, int, int]:
    """Return rows, tokens, warps, stages and blocks an SM."""
    if dtype == torch.float32:
        return 64, (16 if num_tokens <= 16 else 64), 4, 3, 2
    if num_tokens <= 16:
        return 64, 16, 4, 8, 2
    if num_tokens <= 32:
        return 64, 32, 4, 8, 2
    if num_tokens <= 64:
        return 64, 64, 4, 6, 2
    if num_tokens <= _SIDE_BY_SIDE:
        return 64, 128, 4, 4, 2
    large_tiles = triton.cdiv(row_tiles, 2) * triton.cdiv(num_tokens, 256)
    # Two accumulators of the large tile would not fit the registers.
    if splits > 1 or large_tiles < device.num_sms:
        return 128, 128, 8, 4, 1
    return 128, 256, 8, 4, 1


def prepare(
    weight: Weight,
    bias_N: Tensor | None = None,
    *,
    device: Device,
    dtype: torch.dtype | None = None,
    x_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Linear:
    """Return a callable x [T, D] -> y [T, N] for this weight, bf16, fp16 or fp32, and x in `x_dtype`.

    That is the weight's dtype, or bf16 for fp32. The weight is converted to `dtype` first. A
    quantised one needs `dtype`, and is kept as it is stored if its format is one of
    `formats.GPU_LINEAR_FORMATS`: the results are the same. y is in `out_dtype`, by default x's
    dtype. Calls must follow each other on one stream, since they share the counters.

    Raises:
        ValueError: fp32 activations on Blackwell.
    """
    if isinstance(weight, QuantizedWeight) and weight.format in GPU_LINEAR_FORMATS:
        assert dtype is not None, f"{weight.format} {weight.shape} without a dtype"
        x_dtype, matrix = dtype, Matrix.fp8(weight)
    else:
        w_ND = unpacked(weight, dtype)
        x_dtype = x_dtype or w_ND.dtype
        matrix = Matrix.dense(w_ND, x_dtype)
    num_rows, width = weight.shape
    if device.arch >= 100 and x_dtype == torch.float32:
        raise ValueError("dtype is float32, whose products Triton makes in TF32 on this GPU; allowed is bfloat16")
    assert bias_N is None or (bias_N.shape == (num_rows,) and bias_N.is_contiguous()), bias_N
    counters = torch.zeros(triton.cdiv(num_rows, 64), dtype=torch.int32, device=weight.device)

    padding = matrix.data.shape[1] // matrix.num_terms - width

    def apply(x_TD: Tensor) -> Tensor:
        num_tokens = x_TD.shape[0]
        assert (x_TD.shape[1], x_TD.dtype) == (width, x_dtype), f"{x_TD.shape} {x_TD.dtype} for {width} {x_dtype}"
        assert x_TD.stride(1) == 1 or width == 1, f"strides {x_TD.stride()} of shape {tuple(x_TD.shape)}"
        y_TN = x_TD.new_empty(num_tokens, num_rows, dtype=out_dtype or x_dtype)
        if padding:
            x_TD = F.pad(x_TD, (0, padding))
        if num_tokens:
            _launch(x_TD, matrix, bias_N, y_TN, counters, device)
        return y_TN

    return apply


@dataclass(frozen=True, kw_only=True, eq=False)
class Matrix:
    """A weight as the kernel reads it.

    format    | data               | scales                | scale_row_N
    dense     | [N, TERMS * D]     |                       |
    fp8_block | e4m3 [N, D]        | fp32 [-, ceil(D/128)] | i32: the row of `scales` that a weight row has
    fp8_row   | e4m3 [N, D]        | fp32 [N]              |

    Of several terms (`num_terms`), each is padded with zeros to a multiple of the columns that are multiplied at once.
    """

    format: str
    data: Tensor
    num_terms: int = 1
    scales: Tensor | None = None
    scale_row_N: Tensor | None = None

    def __post_init__(self) -> None:
        for tensor in (self.data, self.scales, self.scale_row_N):
            assert tensor is None or tensor.is_contiguous(), f"strides {tensor.stride()} of shape {tuple(tensor.shape)}"

    @classmethod
    def dense(cls, w_ND: Tensor, x_dtype: torch.dtype) -> Matrix:
        """Return an unquantised weight, in three terms where x has another dtype."""
        if w_ND.dtype == x_dtype:
            return cls(format="dense", data=w_ND)
        terms = three_terms(w_ND)
        assert terms[0].dtype == x_dtype, f"{x_dtype} by {w_ND.dtype}"
        padding = -w_ND.shape[1] % _BLOCK_K
        return cls(
            format="dense", data=torch.cat([F.pad(term, (0, padding)) for term in terms], 1), num_terms=len(terms)
        )

    @classmethod
    def fp8(cls, weight: QuantizedWeight) -> Matrix:
        """Return a weight in one of `GPU_LINEAR_FORMATS` as it is stored."""
        scale_row_N = None
        if weight.format == "fp8_block":
            scale_row_N = block_rows(weight.parts).to(torch.int32).to(weight.device)
        return cls(format=weight.format, data=weight.data, scales=weight.scales, scale_row_N=scale_row_N)


def three_terms(w_ND: Tensor) -> list[Tensor]:
    """Return three bf16 tensors whose sum is an fp32 one, exactly where its numbers are not tiny (below 2^-110)."""
    terms, rest = [], w_ND
    for _ in range(3):
        terms.append(rest.to(torch.bfloat16))
        rest = rest - terms[-1].float()
    return terms


def _launch(
    x_TD: Tensor, weight: Matrix, bias_N: Tensor | None, y_TN: Tensor, counters: Tensor, device: Device
) -> None:
    (num_tokens, width), (num_rows, depth) = x_TD.shape, weight.data.shape
    config = tile_config(num_tokens, num_rows, depth, x_TD.dtype, device)
    num_items = triton.cdiv(num_rows, config.rows) * triton.cdiv(num_tokens, config.tokens)
    partials = y_TN
    if config.side_by_side:
        num_items *= config.splits
        partials = y_TN.new_empty(num_items * config.rows * config.tokens, dtype=torch.float32)
    num_programs = min(num_items, config.blocks_per_sm * device.num_sms)
    linear_kernel[(num_programs,)](
        x_TD,
        weight.data,
        weight.scales,
        weight.scale_row_N,
        y_TN if bias_N is None else bias_N,
        y_TN,
        partials,
        counters,
        num_tokens,
        num_rows,
        width,
        x_TD.stride(0),
        config.splits,
        config.split_k,
        num_programs,
        **constexprs(config, weight.format, width, depth // width, bias_N is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **OPTIONS,
    )


def constexprs(
    config: LinearTileConfig, format: str, width: int, terms: int, has_bias: bool
) -> dict[str, int | bool | str]:
    even = width % config.block_k == 0
    assert even or terms == 1, f"{width} inputs in {terms} terms are no multiple of {config.block_k}"
    return {
        "HAS_BIAS": has_bias,
        "SPLIT": config.splits > 1,
        "SIDE_BY_SIDE": config.side_by_side,
        "FORMAT": format,
        "TERMS": terms,
        "ROWS": config.rows,
        "TOKENS": config.tokens,
        "BLOCK_K": config.block_k,
        "EVEN": even,
    }
