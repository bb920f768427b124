"""Expert weights as the GPU kernels read them, and their conversion from a checkpoint's.

w13 [e, 2F, D] comes as gate rows over up rows. The kernels need both rows of a hidden column within
one tile, so that the activation needs no exchange: rows are interleaved by eight (gate 0-7, up 0-7,
gate 8-15, ...), which leaves both in one thread of a tensor core's accumulator.

e experts, M rows of a weight matrix, K its columns, N rows of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from expertwire.kernels.formats import BLOCK, FP8, GROUPS, QuantizedWeight, Weight

INTERLEAVE = 8  # rows
FP8_MAX = 448.0
SCALES = {"int4": torch.bfloat16, "mxfp4": torch.uint8, "nvfp4": FP8}
SCALED = {"mxfp4_x8": 32, "nvfp4_x4": 16}  # columns that share a scale, in x too
FORMATS = ("dense", "fp8_block", "fp8_row", *GROUPS, *SCALED)


@dataclass(frozen=True, kw_only=True)
class ExpertWeights:
    """The weights of e experts, each [M, K]: M = 2F rows interleaved by eight (gated w13), F (ungated w1), or D (w2).

    format    | data           | scales                                | x
    dense     | any [e, M, K]  | none                                  | of the same dtype
    fp8_block | fp8 [e, M, K]  | fp32 [e, M / 128, K / 128] (1)        | fp8, scales of `tiles.tile_scales`
    fp8_row   | fp8 [e, M, K]  | fp32 [e, M], in the order of the rows | fp8, scales fp32 [N] or [1]
    int4      | words (2)      | bf16 [e, K / 32, M] (3)               | bf16, fp16 or fp32
    mxfp4     | words          | u8 exponents [e, K / 32, M]           | bf16 or fp32 (4)
    nvfp4     | words          | fp8 [e, K / 16, M]                    | bf16 or fp32
    mxfp4_x8  | bytes (6)      | u8 exponents (5)                      | fp8, scales u8 exponents [N, K / 32]
    nvfp4_x4  | bytes          | fp8                                   | bytes [N, K / 2], scales fp8 [N, K / 16]

    (1) rounded up; for a gated w13 the gate's blocks before the up's, neither interleaved.
    (2) i32 [e, M, K / 8] of `pack4`, K filled up to a multiple of 128. All 4-bit weights become x's dtype before the product.
    (3) `(q - 8) * scale`, q in [0, 15].
    (4) e2m1 numbers become 2^-26 times their value, too small for fp16; `global_scales` fp32 [e] makes up for it.
    (5) [e, K / 128, M, 128 / group]: a step's scales side by side, K filled up as the numbers are.
    (6) u8 [e, M, K / 2], two e2m1 numbers each, the lower half first, K filled up to a multiple of 128.
    """

    format: str
    data: Tensor
    scales: Tensor | None = None
    global_scales: Tensor | None = None
    columns: int | None = None  # K, where `data` does not show it

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return e, M and K."""
        e, M, K = self.data.shape
        return e, M, self.columns or K

    @property
    def block_k(self) -> int:
        """Return the columns per step of the product: part of the numerics, so the same for every batch."""
        return 64 if self.format == "dense" else 128

    @property
    def packed_k(self) -> int:
        """Return the elements of `data` per step."""
        return self.block_k // (8 if self.format in GROUPS else 2 if self.format in SCALED else 1)

    @property
    def x_columns(self) -> int:
        """Return the elements of a row of x."""
        return self.shape[2] // (2 if self.format == "nvfp4_x4" else 1)

    def scale_argument(self, rows: int) -> Tensor | TensorDescriptor | None:
        """Return the scales as the kernel takes them, for tiles of so many rows."""
        if self.format not in GROUPS:
            return self.scales
        return TensorDescriptor.from_tensor(self.scales, [1, self.block_k // GROUPS[self.format], rows])

    def check(self, x: Tensor, x_scales: Tensor | None, tiled_rows: int) -> None:
        """Assert that rows and scales of x are those that the format needs."""
        num_rows, K = len(x), self.shape[2]
        assert x.shape[1] == self.x_columns, (self.format, x.shape, self.shape)
        if self.format in SCALED:
            dtypes = (torch.uint8, FP8) if self.format == "nvfp4_x4" else (FP8, torch.uint8)
            assert K % 32 == 0, f"{K} columns"
            assert x_scales is not None, f"{self.format} rows without scales"
            assert x_scales.shape == (num_rows, K // SCALED[self.format]), (self.format, x_scales.shape, x.shape)
            assert x_scales.is_contiguous(), x_scales.stride()
            assert (x.dtype, x_scales.dtype) == dtypes, (self.format, x.dtype, x_scales.dtype)
            return
        forbidden = {"mxfp4": (torch.float16,), "nvfp4": (torch.float16,)}.get(self.format, ())
        assert x.dtype not in forbidden, (self.format, x.dtype)
        assert self.format in GROUPS or x.dtype == self.data.dtype, (self.format, x.dtype, self.data.dtype)
        shapes = {"dense": None, "fp8_block": (-(-K // BLOCK), tiled_rows), "fp8_row": (num_rows,)}
        found = None if x_scales is None else tuple(x_scales.shape)
        constant = self.format == "fp8_row" and found == (1,)
        assert constant or found == shapes.get(self.format), (self.format, found, shapes)


@triton.jit
def _fp4_pair(word, PAIR: tl.constexpr):
    """Return two of a word's eight e2m1 numbers as two bf16 numbers 2^126 times too small; see `_spread`."""
    if PAIR == 3:  # noqa: SIM108
        pair = ((word << 1) & 0x80008000) | ((word >> 3) & 0x01800180) | ((word >> 7) & 0x00400040)
    else:
        pair = (word << 3 * PAIR) & 0x81C081C0
    return (pair << 16).to(tl.float32, bitcast=True), (pair & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _int4_pair(word, PAIR: tl.constexpr):
    """Return two of a word's eight 4-bit numbers q as 1 + q / 16: their bits behind those of 1.0."""
    low = ((word << 19 - 4 * PAIR) & 0x00780000) | 0x3F800000
    high = word << 3 if PAIR == 0 else word >> 4 * PAIR - 3
    high = (high & 0x00780000) | 0x3F800000
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def _scaled_pair(word, factor, PAIR: tl.constexpr, FORMAT: tl.constexpr):
    """Return [ROWS, WORDS, 2]: columns 2c and 2c + 1 of half a chunk."""
    if FORMAT == "int4":
        low, high = _int4_pair(word, PAIR)
        low = low * (factor * 16.0) - factor * 24.0
        high = high * (factor * 16.0) - factor * 24.0
    else:
        low, high = _fp4_pair(word, PAIR)
        low *= factor
        high *= factor
    return tl.join(low, high)


@triton.jit
def dequantise(words, scale, FORMAT: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """Convert words [ROWS, WORDS] of eight 4-bit weights and scales [SCALES, ROWS] to fp32 [ROWS, 8 * WORDS].

    A word holds eight columns that lie in one thread of a tensor core's left operand, so weights
    never change threads.
    """
    words = words.to(tl.uint32, bitcast=True)
    if FORMAT == "mxfp4":
        factor = ((scale.to(tl.int32) + 100) << 23).to(tl.float32, bitcast=True)  # 2^100 times the scale
    elif FORMAT == "nvfp4":
        factor = scale.to(tl.float32) * 1.2676506002282294e30
    else:
        factor = scale.to(tl.float32)
    factor = tl.trans(factor)
    if FORMAT == "nvfp4":
        factor, factor_1 = tl.split(tl.reshape(factor, (ROWS, SCALES // 2, 2)))
        factor_1 = tl.broadcast_to(factor_1[:, :, None], (ROWS, WORDS // 4, 4)).reshape(ROWS, WORDS)
    factor = tl.broadcast_to(factor[:, :, None], (ROWS, WORDS // 4, 4)).reshape(ROWS, WORDS)
    if FORMAT != "nvfp4":
        factor_1 = factor
    chunk_0 = tl.join(_scaled_pair(words, factor, 0, FORMAT), _scaled_pair(words, factor, 1, FORMAT))
    chunk_1 = tl.join(_scaled_pair(words, factor_1, 2, FORMAT), _scaled_pair(words, factor_1, 3, FORMAT))
    # row, group of 32 columns, c, 2c or 2c + 1, half, chunk -> columns in order
    weights = tl.join(chunk_0, chunk_1).reshape(ROWS, WORDS // 4, 4, 2, 2, 2)
    return weights.permute(0, 1, 5, 4, 2, 3).reshape(ROWS, 8 * WORDS)


def interleave(w13: Tensor) -> Tensor:
    """Return [e, 2F, ...] interleaved by eight, from gate rows over up rows."""
    e, rows = w13.shape[:2]
    assert rows % (2 * INTERLEAVE) == 0, f"{rows} rows cannot be interleaved by {INTERLEAVE}"
    halves = w13.view(e, 2, rows // (2 * INTERLEAVE), INTERLEAVE, *w13.shape[2:])
    return halves.transpose(1, 2).reshape(w13.shape)


def dense(weights: Tensor, *, gated: bool = False) -> ExpertWeights:
    """Return weights from bf16, fp16 or fp32 [e, M, K]; `gated`: gate rows over up rows."""
    return ExpertWeights(format="dense", data=interleave(weights) if gated else weights.contiguous())


def fp8_block(data: Tensor, scales: Tensor, *, gated: bool = False) -> ExpertWeights:
    """Return weights from fp8 [e, M, K] and fp32 [e, M / 128, K / 128]; `gated`: gate over up in both."""
    e, M, K = data.shape
    block_rows = 2 * -(-M // 2 // BLOCK) if gated else -(-M // BLOCK)
    assert scales.shape == (e, block_rows, -(-K // BLOCK)), (data.shape, scales.shape)
    return ExpertWeights(
        format="fp8_block", data=interleave(data) if gated else data.contiguous(), scales=scales.contiguous()
    )


def fp8_row(data: Tensor, scales: Tensor, *, gated: bool = False) -> ExpertWeights:
    """Return weights from fp8 [e, M, K] and fp32 scales [e, M], or [e] or [e, 2] (gate, up) for whole matrices."""
    e, M, _ = data.shape
    per_part = scales.reshape(e, -1)
    row_scales = per_part.repeat_interleave(M // per_part.shape[1], dim=1)
    assert row_scales.shape == (e, M), (data.shape, scales.shape)
    if gated:
        data, row_scales = interleave(data), interleave(row_scales)
    return ExpertWeights(format="fp8_row", data=data.contiguous(), scales=row_scales.contiguous())


def _spread(codes: Tensor, pair: int, format: str) -> Tensor:
    """Return a 4-bit code's bits where the kernel expects those of its pair, in 16 bits.

    int4: side by side. e2m1: shifted by 3 * pair from where bf16 has its sign and the bits next to
    its mantissa; the last pair takes what is left of the 16 bits.
    """
    if format == "int4":
        return codes << 4 * pair
    sign, magnitude = codes >> 3, codes & 7
    if pair == 3:
        return (sign << 14) | (magnitude >> 1 << 10) | ((magnitude & 1) << 13)
    return ((sign << 15) | (magnitude << 6)) >> 3 * pair


def pack4(
    format: str, codes: Tensor, scales: Tensor, global_scales: Tensor | None = None, *, gated: bool = False
) -> ExpertWeights:
    """Return weights from 4-bit codes u8 [e, M, K] and scales [e, M, K / 32 or 16] (int4 bf16, mxfp4
    u8 exponents, nvfp4 fp8).

    `global_scales`: fp32 [e], nvfp4 only. `gated`: gate rows over up rows.
    """
    e, M, K = codes.shape
    group = GROUPS[format]
    assert scales.shape == (e, M, K // group), (format, codes.shape, scales.shape)
    assert K % group == 0 and scales.dtype == SCALES[format], (K, scales.dtype)  # noqa: PT018
    if gated:
        codes, scales = interleave(codes), interleave(scales.view(torch.int16 if format == "int4" else torch.uint8))
        scales = scales.view(SCALES[format])
    padding = -K % BLOCK
    codes = torch.nn.functional.pad(codes.to(torch.int64), (0, padding), value=8 if format == "int4" else 0)
    # group of 32 columns, chunk, half, c, 2c or 2c + 1 -> word, pair, 2c or 2c + 1
    parts = codes.view(e, M, -1, 2, 2, 4, 2).permute(0, 1, 2, 5, 3, 4, 6).reshape(e, M, -1, 4, 2)
    words: Any = sum(
        _spread(parts[..., pair, elem], pair, format) << 16 * elem for pair in range(4) for elem in range(2)
    )
    filled = scales.new_zeros(e, (K + padding) // group, M)
    filled[:, : K // group] = scales.transpose(1, 2)
    if format != "int4":
        global_scales = (torch.ones(e, device=codes.device) if global_scales is None else global_scales) * 2.0**26
    signed = words - (words >> 31 << 32)
    return ExpertWeights(
        format=format, data=signed.to(torch.int32), scales=filled, global_scales=global_scales, columns=K
    )


def of_weight(weight: Weight, *, gated: bool = False, pack: Callable[..., ExpertWeights] = pack4) -> ExpertWeights:
    """Return weights from a checkpoint's [e, M, K]; `gated`: gate rows over up rows, the two `parts`
    of a quantised weight.

    `pack` packs weights of 4 bits.

    Raises:
        ValueError: parts of an "nvfp4" matrix have different global scales.
    """
    if isinstance(weight, Tensor):
        return dense(weight, gated=gated)
    if weight.format == "fp8_block":
        return fp8_block(weight.data, weight.scales, gated=gated)
    if weight.format == "fp8_row":
        return fp8_row(weight.data, weight.scales, gated=gated)
    every = [
        _pack_expert(weight.experts(e, e + 1), gated, pack) for e in range(len(weight.data))
    ]  # codes take 64 bits there
    scales, global_scales = ([getattr(one, name) for one in every] for name in ("scales", "global_scales"))
    return ExpertWeights(
        format=every[0].format,
        data=_cat([one.data for one in every]),
        scales=_cat(scales),
        global_scales=None if global_scales[0] is None else torch.cat(global_scales),
        columns=weight.shape[2],
    )


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; fp8 numbers as bytes, since not every device's `cat` takes them."""
    dtype = tensors[0].dtype
    return (
        torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)
        if dtype == FP8
        else torch.cat(list(tensors))
    )


def _pack_expert(weight: QuantizedWeight, gated: bool, pack: Callable[..., ExpertWeights]) -> ExpertWeights:
    """Pack a weight of a 4-bit format, with a first dimension of 1."""
    bytes_eMK = weight.data.contiguous().view(torch.uint8)
    codes = torch.stack((bytes_eMK & 15, bytes_eMK >> 4), dim=-1).flatten(2)
    global_scales = weight.global_scales
    if global_scales is not None:
        if (global_scales != global_scales[:, :1]).any():
            raise ValueError(f"global scales of an nvfp4 matrix's parts are {global_scales.tolist()}, must be equal")
        global_scales = global_scales[:, 0]
    return pack(weight.format, codes, weight.scales, global_scales, gated=gated)
