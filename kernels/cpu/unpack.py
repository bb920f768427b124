"""Quantised experts in panels: the bytes of a checkpoint in another order, and how a panel of numbers is made of them.

A panel of codes is [K / 2, 32]: entry (k, n) is numbers 2 k and 2 k + 1 of output n, which stand in a row's bytes side by side.
Its type says what they are: u16 two e4m3, u8 two e2m1, i8 two 4-bit numbers less 8. So a vector holds neighbouring outputs,
nothing changes lanes on the way to a panel of `panel`, and what is read from memory is the checkpoint's bytes.

A panel is unpacked when rows meet it, bit for bit as by `formats.dequantize`.

M outputs, K inputs, P panels, G groups of inputs that share a scale, e experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from expertwire.kernels import formats
from expertwire.kernels.cpu import vectors
from expertwire.kernels.cpu.numbers import allocating_jit, empty, jit, load
from expertwire.kernels.cpu.panel import PANEL
from expertwire.kernels.cpu.vectors import BITS, F32, HIGH, I8, I16, I32, I64, LANES, VECTOR
from expertwire.kernels.formats import QuantizedWeight

_AHEAD = 256  # rows of codes: how far what is read is asked for before, or else memory is waited for


_CODES = {"fp8_block": np.uint16, "fp8_row": np.uint16, "int4": np.int8}


class Codes(NamedTuple):
    """Matrices [e, M, K], or one without the first dimension."""

    codes: np.ndarray  # [e, P, K / 2, 32]
    scales: np.ndarray  # [e, P, G, 32 or 2]: of each output, or of each half of a panel; fp32, bf16 as u16, or u8
    factors: np.ndarray  # fp32 [e, P, 2]: of each half
    table: np.ndarray  # fp32 [256]: what scales of u8 stand for
    group: int  # of inputs, in pairs

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.codes, self.scales, self.factors


def pack(weight: QuantizedWeight, starts: np.ndarray) -> Codes:
    """Half a panel from each row of `starts` on, which are multiples of 16 and of whose sixteen rows each has one part.

    Raises:
        ValueError: the weight is not a number somewhere.
    """
    num_experts, num_rows, num_k = weight.shape
    assert len(starts) * LANES == num_rows, (len(starts), weight.shape)
    assert all(rows % LANES == 0 for rows in weight.parts), (weight.parts, LANES)
    rows = (starts[:, None] + np.arange(LANES)).reshape(-1, PANEL)  # [P, 32]
    stored, dtype = weight.data.contiguous().view(torch.uint8), _CODES.get(weight.format, np.uint8)
    codes = empty((num_experts, len(rows), num_k // 2, PANEL), dtype)
    for matrix, packed in zip(stored, codes, strict=True):
        if weight.data.dtype == formats.FP8 and ((matrix & 0x7F) == 0x7F).any():
            raise ValueError(f"a weight of format {weight.format} and shape {tuple(weight.shape)} holds NaN")
        _transpose(matrix.numpy().view(dtype), rows, packed)
    return Codes(codes, _scales(weight, rows), _factors(weight, rows), _table(weight.format), _group(weight))


@jit
def _transpose(matrix, rows, panels):
    for p in range(len(rows)):
        for k in range(panels.shape[1]):
            for n in range(rows.shape[1]):
                panels[p, k, n] = matrix[rows[p, n], k]


def _scales(weight: QuantizedWeight, rows: np.ndarray) -> np.ndarray:
    """[e, P, G, 32 or 2]"""
    if weight.format == "fp8_block":
        per_row, rows = formats.row_scales(weight), rows[:, ::LANES]
    elif weight.format == "fp8_row":
        per_row = weight.scales[..., None]
    else:
        per_row = weight.scales.view(torch.int16 if weight.format == "int4" else torch.uint8)
    found = np.ascontiguousarray(per_row.numpy()[:, rows].swapaxes(2, 3))
    return found.view(np.uint16) if found.dtype == np.int16 else found


def _factors(weight: QuantizedWeight, rows: np.ndarray) -> np.ndarray:
    if weight.global_scales is None:
        return np.ones((weight.shape[0], len(rows), 2), np.float32)
    part = np.searchsorted(np.cumsum(weight.parts), rows[:, ::LANES], side="right")
    return np.ascontiguousarray(weight.global_scales.numpy()[:, part])


def _table(format: str) -> np.ndarray:
    every = torch.arange(256).to(torch.uint8)
    return (formats.exponents_to_fp32(every) if format == "mxfp4" else formats.byte_values("fp8_row")).numpy()


def _group(weight: QuantizedWeight) -> int:
    columns = {"fp8_block": formats.BLOCK, "fp8_row": weight.shape[-1]} | formats.GROUPS
    return columns[weight.format] // 2


def tensors(weight: np.ndarray | Codes) -> tuple[Tensor, ...]:
    """The arrays [e, ...] of panels or codes, as tensors that share their memory."""
    arrays = weight.arrays if isinstance(weight, Codes) else (weight,)
    return tuple(torch.from_numpy(array.view(np.int32)) for array in arrays)


def expert(w, e):
    """Of panels or codes of matrices [e, ...] one."""


@overload(expert)
def _expert(w, e):
    if isinstance(w, types.Array):
        return lambda w, e: w[e]
    return lambda w, e: Codes(w.codes[e], w.scales[e], w.factors[e], w.table, w.group)


def num_panels(w):
    """Of an expert's panels or codes."""


@overload(num_panels)
def _num_panels(w):
    return (lambda w: len(w)) if isinstance(w, types.Array) else (lambda w: len(w.codes))


def unpacked(w, i, room):
    """Panel i of panels or codes: an array of panels, of the type of `room`, and which of them it is."""


@overload(unpacked)
def _unpacked(w, i, room):
    if isinstance(w, types.Array):
        return lambda w, i, room: (w, i)

    def unpack(w, i, room):
        _unpack(w.codes[i], w.scales[i], w.factors[i], w.table, w.group, room)
        return room, 0

    return unpack


def room(w, like):
    """Where `unpacked` may put a panel of an expert, of the type of `like`: [2, K', 32], or nothing.

    The second one is what a product with the first asks for ahead (`panel`).
    """


@overload(room)
def _room(w, like):
    if isinstance(w, types.Array):
        return lambda w, like: w[:0]
    if like.dtype == types.uint16:
        return lambda w, like: empty((2, w.codes.shape[1], PANEL), np.uint32)
    return lambda w, like: empty((2, 2 * w.codes.shape[1], PANEL), np.float32)


def _scale(stored, table):
    """fp32."""


@overload(_scale, inline="always")
def _scale_overload(stored, table):
    if stored == types.uint8:
        return lambda stored, table: table[stored]
    return lambda stored, table: load(stored)


@allocating_jit
def _unpack(codes, scales, factors, table, group, room):
    num_k, each, of_outputs = len(codes), scales.shape[1] == PANEL, np.empty(PANEL, np.float32)
    for g in range(len(scales)):
        for half in range(2):
            for n in range(half * LANES, (half + 1) * LANES):
                of_outputs[n] = _scale(scales[g, n if each else half], table) * factors[half]
        first = g * group
        _expand(codes, first, min(group, num_k - first), of_outputs, room)


def _numbers(b: ir.IRBuilder, codes: ir.Value, kind: types.Type) -> tuple[ir.Value, ir.Value]:
    """Sixteen codes' first and second numbers, fp32."""

    def each(value: int) -> ir.Constant:
        return ir.Constant(codes.type, [value] * LANES)

    if kind == types.int8:
        return tuple(
            b.sitofp(b.sub(b.zext(nibbles, BITS), vectors.each_bits(8)), VECTOR)
            for nibbles in (b.and_(codes, each(15)), b.lshr(codes, each(4)))
        )
    if kind == types.uint8:
        codes = b.zext(codes, ir.VectorType(I16, LANES))
        # Sign, mantissa and exponent where fp16 has them, and how many bits to the left; fp16's exponents are 14 higher.
        places, bias = ((0x8, 12, 0x7, 9), (0x80, 8, 0x70, 5)), 2.0**14
        halves = [
            b.or_(b.shl(b.and_(codes, each(sign)), each(to)), b.shl(b.and_(codes, each(rest)), each(at)))
            for sign, to, rest, at in places
        ]
    else:
        low = b.or_(b.and_(b.shl(codes, each(8)), each(0x8000)), b.shl(b.and_(codes, each(0x7F)), each(7)))
        high = b.or_(b.and_(codes, each(0x8000)), b.and_(b.lshr(codes, each(1)), each(0x3F80)))
        halves, bias = [low, high], 2.0**8
    fp16 = ir.VectorType(ir.HalfType(), LANES)
    return tuple(b.fmul(b.fpext(b.bitcast(half, fp16), VECTOR), vectors.each(bias)) for half in halves)


@intrinsic
def _expand(context, codes, first, count, scales, room):
    """Rows of codes from `first` on, `count` of them, times `scales`, into the first panel of `room`."""

    def generate(context, builder, signature, args):
        b, kind, pairs = builder, signature.args[0].dtype, signature.args[4].dtype == types.uint32
        lane = I16 if kind == types.uint16 else I8
        at = b.mul(args[1], I64(PANEL))
        source = vectors.pointer(context, b, signature.args[0], args[0], at, lane)
        factors = vectors.pointer(context, b, signature.args[3], args[3], I64(0), F32)
        target_at = at if pairs else b.mul(at, I64(2))
        target = vectors.pointer(context, b, signature.args[4], args[4], target_at, I32 if pairs else F32)
        scale = [vectors.load(b, factors, I64(half)) for half in (0, LANES)]

        def expand(k: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            row = b.mul(k, I64(PANEL))
            for j, half in enumerate((0, LANES)):
                if j == 0:
                    vectors.prefetch(b, b.gep(source, [b.add(row, I64(_AHEAD * PANEL))]), 2)
                stored = vectors.load(b, source, b.add(row, I64(half)), ir.VectorType(lane, LANES))
                low, high = (b.fmul(number, scale[j]) for number in _numbers(b, stored, kind))
                if pairs:
                    vectors.store(b, _pair(b, low, high), target, b.add(row, I64(half)))
                else:
                    place = b.add(b.mul(row, I64(2)), I64(half))
                    vectors.store(b, low, target, place)
                    vectors.store(b, high, target, b.add(place, I64(PANEL)))
            return []

        vectors.loop(b, args[2], [], expand)
        return context.get_dummy_value()

    return types.void(codes, types.int64, types.int64, scales, room), generate


def _pair(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Two bf16 in 32 bits."""
    low, high = (vectors.rounded_bits(b, value) for value in (low, high))
    return b.or_(b.lshr(low, vectors.each_bits(16)), b.and_(high, vectors.each_bits(HIGH)))
