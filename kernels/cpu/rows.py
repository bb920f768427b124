"""What is done with a row of numbers, sixteen at a time, in fp32; what is left of a row, number by number.

Numbers of a row lie side by side. A result is rounded to the type of where it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels.cpu import vectors
from expertwire.kernels.cpu.numbers import jit, load, round_like
from expertwire.kernels.cpu.vectors import I32, I64, LANES


class _Row:
    """Emits how sixteen numbers of an array are read and written."""

    def __init__(self, context: Any, b: ir.IRBuilder, kind: Any, array: ir.Value, first: ir.Value) -> None:
        self._b, self._bits = b, kind.dtype.bitwidth
        self._start = vectors.pointer(context, b, kind, array, first, context.get_data_type(kind.dtype))

    def get(self, i: ir.Value) -> ir.Value:
        return vectors.load_numbers(self._b, self._start, self._b.mul(i, I64(LANES)), bits=self._bits)

    def put(self, i: ir.Value, value: ir.Value) -> None:
        vectors.store_numbers(self._b, value, self._start, self._b.mul(i, I64(LANES)), bits=self._bits)

    def copy(self, i: ir.Value, source: _Row) -> None:
        """Of a row of the same type."""
        b, at = self._b, self._b.mul(i, I64(LANES))
        bits = vectors.load(b, source._start, at, ir.VectorType(self._start.type.pointee, LANES))
        vectors.store(b, bits, self._start, at)


def _each(context: Any, b: ir.IRBuilder, count: ir.Value, put: Callable[[ir.Value], None]) -> ir.Value:
    """Emits `put` of 0 up to `count`, at least one."""

    def body(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        put(i)
        return []

    vectors.loop(b, count, [], body)
    return context.get_dummy_value()


def _rows(context: Any, b: ir.IRBuilder, signature: Any, args: Any, *which: int) -> list[_Row]:
    return [_Row(context, b, signature.args[i], args[i], I64(0)) for i in which]


@intrinsic
def _sum_squares(context, x, count):
    """Of the first `count` vectors of x, at least one, side by side."""

    def generate(context, b, signature, args):
        [row] = _rows(context, b, signature, args, 0)

        def add(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            value = row.get(i)
            return [vectors.fma(b, value, value, sums[0])]

        [total] = vectors.loop(b, args[1], [vectors.each(0.0)], add)
        return b.extract_element(vectors.folded(b, total, b.fadd), I32(0))

    return types.float32(x, types.int64), generate


@jit
def rms_scale(x: np.ndarray, eps: float) -> float:
    """What a row is multiplied by to be normed: 1 over the root of its mean square and eps."""
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
    """`y = (x * factor) * weight`, a number by which all are multiplied, and one of each."""
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
def put_row(x, y):
    """A row, as far as it goes, in the type of y."""
    assert x.strides[0] == x.itemsize, "numbers of a row lie side by side"
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
    """`y = x / divisor`, as far as x goes."""
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
def rotate_row(x, cos_Pr, sin_Pr, position, interleaved, y):
    """x with its first r numbers rotated: pairs are neighbours, if `interleaved`, or else r / 2 apart."""
    size = cos_Pr.shape[1]
    half = size // 2
    if interleaved:
        for i in range(half):
            first, second = load(x[2 * i]), load(x[2 * i + 1])
            cos, sin = cos_Pr[position, i + half], sin_Pr[position, i + half]
            y[2 * i] = round_like(first * cos - second * sin, y[i])
            y[2 * i + 1] = round_like(second * cos + first * sin, y[i])
    elif half % LANES == 0 and half > 0:
        _rotate(x, cos_Pr, position * size + half, sin_Pr, y, half // LANES)
    else:
        for i in range(half):
            first, second = load(x[i]), load(x[i + half])
            cos, sin = cos_Pr[position, i + half], sin_Pr[position, i + half]
            y[i] = round_like(first * cos - second * sin, y[i])
            y[i + half] = round_like(second * cos + first * sin, y[i])
    if size < len(x):
        put_row(x[size:], y[size:])
