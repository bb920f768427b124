"""Expansion of quantised codes into panels of numbers.

A panel of codes is [K / 2, 32]: entry (k, n) holds numbers 2 k and 2 k + 1 of output n. Its element type says which
numbers: u16 two e4m3, u8 two e2m1, i8 two 4-bit integers less 8.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels.cpu._llvm import vectors
from expertwire.kernels.cpu._llvm.panels import PANEL
from expertwire.kernels.cpu._llvm.vectors import BITS, F32, HIGH, I8, I16, I32, I64, LANES, VECTOR

_AHEAD = 256  # rows of codes between the one that is expanded and the one that is prefetched


def _numbers(b: ir.IRBuilder, codes: ir.Value, kind: types.Type) -> tuple[ir.Value, ir.Value]:
    """Return the first and second numbers of sixteen codes, fp32."""

    def each(value: int) -> ir.Constant:
        return ir.Constant(codes.type, [value] * LANES)

    if kind == types.int8:
        return tuple(
            b.sitofp(b.sub(b.zext(nibbles, BITS), vectors.constant_bits(8)), VECTOR)
            for nibbles in (b.and_(codes, each(15)), b.lshr(codes, each(4)))
        )
    if kind == types.uint8:
        codes = b.zext(codes, ir.VectorType(I16, LANES))
        # Masks of sign and magnitude, and the shifts that move them to fp16's places; fp16's exponents are 14 higher.
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
    return tuple(b.fmul(b.fpext(b.bitcast(half, fp16), VECTOR), vectors.constant(bias)) for half in halves)


@intrinsic
def expand_codes(context, codes, first, count, scales, panels):
    """Write `count` rows of codes from `first` on, times `scales` [32], into the first panel of `panels`."""

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

    return types.void(codes, types.int64, types.int64, scales, panels), generate


def _pair(b: ir.IRBuilder, low: ir.Value, high: ir.Value) -> ir.Value:
    """Return two bf16 in 32 bits."""
    low, high = (vectors.rounded_bits(b, value) for value in (low, high))
    return b.or_(b.lshr(low, vectors.constant_bits(16)), b.and_(high, vectors.constant_bits(HIGH)))
