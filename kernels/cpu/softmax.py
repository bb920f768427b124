"""The softmax of a row of scores, whole or in parts, in vectors of sixteen; a lane's sums run over the row in order."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels.cpu import vectors
from expertwire.kernels.cpu.vectors import BITS, F32, I32, I64, LANES


class _Row:
    """Emits what the two kinds of softmax do with a row of scores: the elements from `first` to `visible`, times `scale`."""

    def __init__(self, b: ir.IRBuilder, source: ir.Value, first: ir.Value, visible: ir.Value, scale: ir.Value) -> None:
        self.b, self.source, self.first, self.visible = b, source, first, visible
        self.count, self.factor = b.trunc(b.sub(visible, first), I32), vectors.splat(b, scale)

    def score(self, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        """And which of the sixteen are visible."""
        b, at, lanes = self.b, self.b.mul(i, I64(LANES)), BITS([I32(lane) for lane in range(LANES)])
        # Before the first, it wraps around and is large.
        index = b.add(_splat_bits(b, b.trunc(b.sub(at, self.first), I32)), lanes)
        value = b.fmul(vectors.load(b, self.source, at), self.factor)
        return value, b.icmp_unsigned("<", index, _splat_bits(b, self.count))

    def largest(self, start: ir.Value) -> ir.Value:
        """Of all scores and `start`, in every lane."""
        b = self.b

        def larger(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
            value, seen = self.score(i)
            return [vectors.maximum(b, b.select(seen, value, values[0]), values[0])]

        [top] = vectors.loop(b, b.udiv(b.add(self.visible, I64(LANES - 1)), I64(LANES)), [start], larger)
        return vectors.folded(b, top, lambda x, y: vectors.maximum(b, x, y))

    def weigh(self, top: ir.Value, steps: ir.Value, put: Callable[[ir.Value, ir.Value], None]) -> ir.Value:
        """`put` of e^(score - top), 0 where a score is not visible, sixteen at a time; their sum, in every lane."""
        b = self.b

        def add(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
            value, seen = self.score(i)
            weight = b.select(seen, vectors.exp(b, b.fsub(value, top)), vectors.each(0.0))
            put(weight, b.mul(i, I64(LANES)))
            return [b.fadd(values[0], weight)]

        [total] = vectors.loop(b, steps, [vectors.each(0.0)], add)
        return vectors.folded(b, total, b.fadd)


@intrinsic
def softmax(context, scores, scores_at, first, visible, scale, sink, factor, weights, weights_at, width):
    """Of a row, in fp32: the softmax of the scores from `first` to `visible` times `scale` and of `sink`, which is not stored,
    times `factor`, rounded to the type of weights; zeros before it and, to `width`, a multiple of 16, behind it. The scores are
    lost. Of the arrays: where the row starts."""

    def generate(context, builder, signature, args):
        b, kind = builder, signature.args[7].dtype
        source = vectors.pointer(context, b, signature.args[0], args[0], args[1], F32)
        target = vectors.pointer(context, b, signature.args[7], args[7], args[8], context.get_data_type(kind))
        row, sink = _Row(b, source, args[2], args[3], args[4]), vectors.splat(b, args[5])
        top, steps = row.largest(sink), b.udiv(args[9], I64(LANES))
        total = row.weigh(top, steps, lambda weight, at: vectors.store(b, weight, source, at))
        # Without a sink, -inf, e^-87: no bit of a sum of 1 and more.
        total = b.fadd(total, vectors.exp(b, b.fsub(sink, top)))
        inverse = b.fdiv(vectors.splat(b, args[6]), total)

        def divide(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            at = b.mul(i, I64(LANES))
            _put_weights(b, kind, b.fmul(vectors.load(b, source, at), inverse), target, at)
            return []

        vectors.loop(b, steps, [], divide)
        return context.get_dummy_value()

    number = types.int64
    kinds = scores, number, number, number, types.float32, types.float32, types.float32, weights, number, number
    return types.void(*kinds), generate


@intrinsic
def soften(context, scores, scores_at, visible, scale, top, weights, weights_at, width, total):
    """Part of an online softmax: e^(score - greatest) of the first `visible` scores times `scale`, the greatest of which may be
    an earlier one, `top`; rounded to the type of weights, then zeros to `width`. Puts their sum into total[0], fp32, and returns
    the greatest."""

    def generate(context, builder, signature, args):
        b, kind = builder, signature.args[5].dtype
        source = vectors.pointer(context, b, signature.args[0], args[0], args[1], F32)
        target = vectors.pointer(context, b, signature.args[5], args[5], args[6], context.get_data_type(kind))
        row = _Row(b, source, I64(0), args[2], args[3])
        greatest = row.largest(vectors.splat(b, args[4]))
        steps = b.udiv(args[7], I64(LANES))
        found = row.weigh(greatest, steps, lambda weight, at: _put_weights(b, kind, weight, target, at))
        place = vectors.pointer(context, b, signature.args[8], args[8], I64(0), F32)
        b.store(b.extract_element(found, I32(0)), place)
        return b.extract_element(greatest, I32(0))

    number = types.int64
    kinds = scores, number, number, types.float32, types.float32, weights, number, number, total
    return types.float32(*kinds), generate


def _put_weights(b: ir.IRBuilder, kind: types.Type, weights: ir.Value, target: ir.Value, at: ir.Value) -> None:
    vectors.store(b, vectors.to_bf16(b, weights) if kind == types.uint16 else weights, target, at)


def _splat_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(BITS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, vectors.each_bits(0))
