"""Operations on a row of contiguous numbers in fp32, in vectors of sixteen; the remainder of a row number by number.

Results are rounded to the target's type. Lanes of a sum run over the row in order, so that its bits are reproducible.

Y positions, r rotated numbers of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels.cpu._llvm import vectors
from expertwire.kernels.cpu._llvm.scalars import jit, load, round_like
from expertwire.kernels.cpu._llvm.vectors import BITS, F32, I32, I64, LANES


class _Row:
    """Emit reads and writes of sixteen numbers of an array."""

    def __init__(self, context: Any, b: ir.IRBuilder, kind: Any, array: ir.Value, first: ir.Value) -> None:
        self._b, self._bits = b, kind.dtype.bitwidth
        self._start = vectors.pointer(context, b, kind, array, first, context.get_data_type(kind.dtype))

    def get(self, i: ir.Value) -> ir.Value:
        return vectors.load_numbers(self._b, self._start, self._b.mul(i, I64(LANES)), bits=self._bits)

    def put(self, i: ir.Value, value: ir.Value) -> None:
        vectors.store_numbers(self._b, value, self._start, self._b.mul(i, I64(LANES)), bits=self._bits)

    def copy(self, i: ir.Value, source: _Row) -> None:
        """Emit a copy from a row of the same type."""
        b, at = self._b, self._b.mul(i, I64(LANES))
        bits = vectors.load(b, source._start, at, ir.VectorType(self._start.type.pointee, LANES))
        vectors.store(b, bits, self._start, at)


def _each(context: Any, b: ir.IRBuilder, count: ir.Value, put: Callable[[ir.Value], None]) -> ir.Value:
    """Emit `put` for 0, 1, ..., `count` - 1; `count` is at least one."""

    def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        put(i)
        return []

    vectors.loop(b, count, [], body)
    return context.get_dummy_value()


def _rows(context: Any, b: ir.IRBuilder, signature: Any, args: Any, *which: int) -> list[_Row]:
    return [_Row(context, b, signature.args[i], args[i], I64(0)) for i in which]


@intrinsic
def _sum_squares(context, x, count):
    """Return the sum of squares of the first `count` >= 1 vectors of x."""

    def generate(context, b, signature, args):
        [row] = _rows(context, b, signature, args, 0)

        def add(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            value = row.get(i)
            return [vectors.fma(b, value, value, sums[0])]

        [total] = vectors.loop(b, args[1], [vectors.constant(0.0)], add)
        return b.extract_element(vectors.reduce_lanes(b, total, b.fadd), I32(0))

    return types.float32(x, types.int64), generate


@jit
def rms_scale(x: np.ndarray, eps: float) -> float:
    """Return 1 / sqrt(mean(x^2) + eps), the factor of an RMS norm."""
    num, total = len(x) // LANES, np.float32(0)
    if num > 0:
        total = _sum_squares(x, num)
    for i in range(num * LANES, len(x)):
        total += load(x[i]) * load(x[i])
    return np.float32(1) / np.sqrt(total / np.float32(len(x)) + np.float32(eps))


@intrinsic
def _add(context, x, y, total, count):
    def generate(context, b, signature, args):
        first, second, target = _rows(context, b, signature, args, 0, 1, 2)
        return _each(context, b, args[3], lambda i: target.put(i, b.fadd(first.get(i), second.get(i))))

    return types.void(x, y, total, types.int64), generate


@jit
def add_row(x, y, total):
    """`total = x + y`."""
    num = len(x) // LANES
    if num > 0:
        _add(x, y, total, num)
    for i in range(num * LANES, len(x)):
        total[i] = round_like(load(x[i]) + load(y[i]), total[i])


@intrinsic
def _scale(context, x, factor, weight, y, count):
    def generate(context, b, signature, args):
        source, weights, target = _rows(context, b, signature, args, 0, 2, 3)
        factors = vectors.splat(b, args[1])

        def put(i: ir.Value) -> None:
            target.put(i, b.fmul(b.fmul(source.get(i), factors), weights.get(i)))

        return _each(context, b, args[4], put)

    return types.void(x, types.float32, weight, y, types.int64), generate


@jit
def scale_row(x, factor, weight, y):
    """`y = (x * factor) * weight`, with one factor for the row and a weight for each number."""
    num = len(weight) // LANES
    if num > 0:
        _scale(x, factor, weight, y, num)
    for i in range(num * LANES, len(weight)):
        y[i] = round_like(load(x[i]) * factor * load(weight[i]), y[i])


@intrinsic
def _add_scaled(context, x, factor, total, count):
    def generate(context, b, signature, args):
        source, target = _rows(context, b, signature, args, 0, 2)
        factors = vectors.splat(b, args[1])

        def put(i: ir.Value) -> None:
            target.put(i, b.fadd(target.get(i), b.fmul(source.get(i), factors)))

        return _each(context, b, args[3], put)

    return types.void(x, types.float32, total, types.int64), generate


@jit
def add_scaled_row(x, factor, total):
    """`total += x * factor`."""
    num = len(x) // LANES
    if num > 0:
        _add_scaled(x, factor, total, num)
    for i in range(num * LANES, len(x)):
        total[i] += load(x[i]) * factor


@intrinsic
def _put(context, x, y, count):
    def generate(context, b, signature, args):
        source, target = _rows(context, b, signature, args, 0, 1)
        same = x.dtype == y.dtype
        return _each(context, b, args[2], lambda i: target.copy(i, source) if same else target.put(i, source.get(i)))

    return types.void(x, y, types.int64), generate


@jit
def copy_row(x, y):
    """Copy x to the beginning of y, converted to y's type."""
    assert x.strides[0] == x.itemsize, "rows must be contiguous"
    num = len(x) // LANES
    if num > 0:
        _put(x, y, num)
    for i in range(num * LANES, len(x)):
        y[i] = round_like(load(x[i]), y[i])


@intrinsic
def _divide(context, x, divisor, y, count):
    def generate(context, b, signature, args):
        source, target = _rows(context, b, signature, args, 0, 2)
        divisors = vectors.splat(b, args[1])
        return _each(context, b, args[3], lambda i: target.put(i, b.fdiv(source.get(i), divisors)))

    return types.void(x, types.float32, y, types.int64), generate


@jit
def divide_row(x, divisor, y):
    """`y = x / divisor`, for the length of x."""
    num = len(x) // LANES
    if num > 0:
        _divide(x, divisor, y, num)
    for i in range(num * LANES, len(x)):
        y[i] = round_like(load(x[i]) / divisor, y[i])


@intrinsic
def _rotate(context, x, cos, cos_at, sin, y, half):
    def generate(context, b, signature, args):
        source, target = _rows(context, b, signature, args, 0, 4)
        cosines, sines = (_Row(context, b, signature.args[i], args[i], args[2]) for i in (1, 3))

        def put(i: ir.Value) -> None:
            j = b.add(i, args[5])
            first, second, cosine, sine = source.get(i), source.get(j), cosines.get(i), sines.get(i)
            target.put(i, b.fsub(b.fmul(first, cosine), b.fmul(second, sine)))
            target.put(j, b.fadd(b.fmul(second, cosine), b.fmul(first, sine)))

        return _each(context, b, args[5], put)

    number = types.int64
    return types.void(x, cos, number, sin, y, number), generate


@jit
def rotate_row(x, cos_Yr, sin_Yr, position, interleaved, y):
    """Write x to y with its first r numbers rotated, in pairs as `kernels.ops.rotary` describes."""
    size = cos_Yr.shape[1]
    half = size // 2
    if interleaved:
        for i in range(half):
            first, second = load(x[2 * i]), load(x[2 * i + 1])
            cos, sin = cos_Yr[position, i + half], sin_Yr[position, i + half]
            y[2 * i] = round_like(first * cos - second * sin, y[i])
            y[2 * i + 1] = round_like(second * cos + first * sin, y[i])
    elif half % LANES == 0 and half > 0:
        _rotate(x, cos_Yr, position * size + half, sin_Yr, y, half // LANES)
    else:
        for i in range(half):
            first, second = load(x[i]), load(x[i + half])
            cos, sin = cos_Yr[position, i + half], sin_Yr[position, i + half]
            y[i] = round_like(first * cos - second * sin, y[i])
            y[i + half] = round_like(second * cos + first * sin, y[i])
    if size < len(x):
        copy_row(x[size:], y[size:])


class _Scores:
    """Emit the steps of both softmaxes over a row of scores: elements `first` to `visible`, times `scale`."""

    def __init__(self, b: ir.IRBuilder, source: ir.Value, first: ir.Value, visible: ir.Value, scale: ir.Value) -> None:
        self.b, self.source, self.first, self.visible = b, source, first, visible
        self.count, self.factor = b.trunc(b.sub(visible, first), I32), vectors.splat(b, scale)

    def score(self, i: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return sixteen scores and which of them are visible."""
        b, at, lanes = self.b, self.b.mul(i, I64(LANES)), BITS([I32(lane) for lane in range(LANES)])
        # Before the first it wraps around to a large number.
        index = b.add(_splat_integer(b, b.trunc(b.sub(at, self.first), I32)), lanes)
        value = b.fmul(vectors.load(b, self.source, at), self.factor)
        return value, b.icmp_unsigned("<", index, _splat_integer(b, self.count))

    def largest(self, start: ir.Value) -> ir.Value:
        """Return the maximum of all visible scores and `start`, in every lane."""
        b = self.b

        def larger(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
            value, seen = self.score(i)
            return [vectors.maximum(b, b.select(seen, value, values[0]), values[0])]

        [top] = vectors.loop(b, b.udiv(b.add(self.visible, I64(LANES - 1)), I64(LANES)), [start], larger)
        return vectors.reduce_lanes(b, top, lambda x, y: vectors.maximum(b, x, y))

    def weigh(self, top: ir.Value, steps: ir.Value, put: Callable[[ir.Value, ir.Value], None]) -> ir.Value:
        """Emit `put` of e^(score - top), 0 where not visible, sixteen at a time; return the sum, in every lane."""
        b = self.b

        def add(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
            value, seen = self.score(i)
            weight = b.select(seen, vectors.exp(b, b.fsub(value, top)), vectors.constant(0.0))
            put(weight, b.mul(i, I64(LANES)))
            return [b.fadd(values[0], weight)]

        [total] = vectors.loop(b, steps, [vectors.constant(0.0)], add)
        return vectors.reduce_lanes(b, total, b.fadd)


@intrinsic
def softmax(context, scores, scores_at, first, visible, scale, sink, factor, weights, weights_at, width):
    """Write the softmax of a row's scores from `first` to `visible`, times `scale`, into `weights`, times `factor`.

    `sink` takes part in the sum but is not stored (-inf: none). Weights are rounded to their type and zero
    elsewhere, up to `width`, a multiple of 16. The scores are overwritten. `scores_at`, `weights_at`: where the row
    starts.
    """

    def generate(context, builder, signature, args):
        b, kind = builder, signature.args[7].dtype
        source = vectors.pointer(context, b, signature.args[0], args[0], args[1], F32)
        target = vectors.pointer(context, b, signature.args[7], args[7], args[8], context.get_data_type(kind))
        row, sink = _Scores(b, source, args[2], args[3], args[4]), vectors.splat(b, args[5])
        top, steps = row.largest(sink), b.udiv(args[9], I64(LANES))
        total = row.weigh(top, steps, lambda weight, at: vectors.store(b, weight, source, at))
        # Without a sink (-inf) e^-87 is added, which changes no bit of a sum of at least 1.
        total = b.fadd(total, vectors.exp(b, b.fsub(sink, top)))
        inverse = b.fdiv(vectors.splat(b, args[6]), total)

        def divide(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            at = b.mul(i, I64(LANES))
            _store_weights(b, kind, b.fmul(vectors.load(b, source, at), inverse), target, at)
            return []

        vectors.loop(b, steps, [], divide)
        return context.get_dummy_value()

    number = types.int64
    kinds = scores, number, number, number, types.float32, types.float32, types.float32, weights, number, number
    return types.void(*kinds), generate


@intrinsic
def online_softmax_update(context, scores, scores_at, visible, scale, top, weights, weights_at, width, total):
    """Continue an online softmax with the first `visible` scores of a row, times `scale`; return the new maximum.

    The maximum of earlier scores is `top`. Writes e^(score - new maximum) into `weights`, rounded to their type, then
    zeros up to `width`, and their sum in fp32 into total[0]; the caller rescales earlier sums.
    """

    def generate(context, builder, signature, args):
        b, kind = builder, signature.args[5].dtype
        source = vectors.pointer(context, b, signature.args[0], args[0], args[1], F32)
        target = vectors.pointer(context, b, signature.args[5], args[5], args[6], context.get_data_type(kind))
        row = _Scores(b, source, I64(0), args[2], args[3])
        greatest = row.largest(vectors.splat(b, args[4]))
        steps = b.udiv(args[7], I64(LANES))
        found = row.weigh(greatest, steps, lambda weight, at: _store_weights(b, kind, weight, target, at))
        place = vectors.pointer(context, b, signature.args[8], args[8], I64(0), F32)
        b.store(b.extract_element(found, I32(0)), place)
        return b.extract_element(greatest, I32(0))

    number = types.int64
    kinds = scores, number, number, types.float32, types.float32, weights, number, number, total
    return types.float32(*kinds), generate


def _store_weights(b: ir.IRBuilder, kind: types.Type, weights: ir.Value, target: ir.Value, at: ir.Value) -> None:
    vectors.store(b, vectors.to_bf16(b, weights) if kind == types.uint16 else weights, target, at)


def _splat_integer(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(BITS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, vectors.constant_bits(0))
