"""Weights packed for products on a CPU, the product of a few rows with them in vectors, and what is done with products.

A *panel* is the weights of 32 outputs, [K', 32] of 32 bits each: fp32, and K' is K; or bf16 in pairs of neighbours along K, and
K' is K / 2. So 32 sums stand side by side in vectors, each row of a panel adds to them, and few rows of x, for which a product
waits for its weights, read memory from front to back.

A sum over K is one sum in the order of K, whatever the number of rows: its bits depend on nothing else. Rows of bf16 meet pairs
pair by pair, where the processor has an instruction for that (AVX512-BF16); rows of fp32 meet anything number by number.

M rows, N outputs, K inputs, P panels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels.cpu import vectors
from expertwire.kernels.cpu.numbers import allocating_jit, jit
from expertwire.kernels.cpu.vectors import BITS, F32, HIGH, I32, I64, LANES, VECTOR

PANEL = 2 * LANES  # outputs
LINE = 32  # K is a multiple of it: sixteen pairs
_FEATURES = llvmlite.binding.get_host_cpu_features()
# Rows of x at once: the sums of the most fill registers.
_ROWS_AT_ONCE = (12, 8, 6, 4, 3, 2, 1) if _FEATURES.get("avx512f", False) else (3, 2, 1)
ROWS = _ROWS_AT_ONCE[0]
MULTIPLIES_PAIRS = _FEATURES.get("avx512bf16", False)  # whether rows may be bf16


@intrinsic
def _transpose(context, x, x_at, ldx, y, y_at, ldy):
    """16 by 16 numbers of 32 bits; of x and y: the array, where to start, and from row to row, in elements."""

    def generate(context, builder, signature, args):
        b = builder
        source, target = (vectors.pointer(context, b, signature.args[i], args[i], args[i + 1], I32) for i in (0, 3))
        rows = [vectors.load(b, source, b.mul(args[2], I64(i)), BITS) for i in range(LANES)]
        for size in (1, 2, 4, 8):  # of the blocks that change places
            low = [lane + LANES - size if lane & size else lane for lane in range(LANES)]
            high = [lane + LANES if lane & size else lane + size for lane in range(LANES)]
            for i in (i for i in range(LANES) if not i & size):
                pair = rows[i], rows[i + size]
                for j, lanes in ((i, low), (i + size, high)):
                    rows[j] = b.shuffle_vector(*pair, ir.Constant(BITS, lanes))
        for i, row in enumerate(rows):
            vectors.store(b, row, target, b.mul(args[5], I64(i)))
        return context.get_dummy_value()

    number = types.int64
    return types.void(x, number, number, y, number, number), generate


@jit
def pack_half(rows, at, stride, panels, i, half):
    """Sixteen rows, from element `at` of 32 bits on, `stride` of them apart, into one half of panel i of `panels` [P, K', 32]."""
    num_k = panels.shape[1]
    target = i * num_k * PANEL + half * LANES
    for k in range(0, num_k, LANES):
        _transpose(rows, at + k, stride, panels, target + k * PANEL, PANEL)


@allocating_jit
def pack_rows(w, starts, panels):
    """Rows of w [N, K'] into `panels` [P, K', 32], both of 32 bits: half a panel from each of `starts`; zeros behind row N."""
    num_n, num_k = w.shape
    rows = np.zeros((LANES, num_k), w.dtype)
    for half in range(len(starts)):
        for i in range(LANES):
            if starts[half] + i < num_n:
                rows[i] = w[starts[half] + i]
            else:
                rows[i] = 0
        pack_half(rows, 0, num_k, panels, half // 2, half % 2)


def _products(
    b: ir.IRBuilder, rows: int, kinds: Any, x: ir.Value, ldx: ir.Value, w: ir.Value, ahead: ir.Value, num_k: ir.Value
) -> list[ir.Value]:
    """The sums of `rows` rows from x with the panel at w; asks for another one. `num_k` is K', `kinds` are the arrays' types.

    Of x and the panel each 32 bits are a number or a pair.
    """
    x_pairs, w_pairs = kinds[0].dtype == types.uint16, kinds[1].dtype == types.uint32
    assert w_pairs or not x_pairs, kinds
    split = w_pairs and not x_pairs
    multiply_add = vectors.add_pair_products if x_pairs else vectors.fma

    def weights(bits: ir.Value, step: int) -> ir.Value:
        if split:
            bits = b.and_(bits, vectors.each_bits(HIGH)) if step else b.shl(bits, vectors.each_bits(16))
        return b.bitcast(bits, VECTOR)

    def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        at, steps = b.mul(k, I64(PANEL)), 2 if split else 1
        halves = [vectors.load(b, w, b.add(at, I64(half)), BITS) for half in (0, LANES)]
        for step in range(steps):
            column = b.add(b.mul(k, I64(steps)), I64(step))
            for m in range(rows):
                value = vectors.splat(b, b.load(b.gep(x, [b.add(b.mul(ldx, I64(m)), column)])))
                for half in range(2):
                    sums[2 * m + half] = multiply_add(b, value, weights(halves[half], step), sums[2 * m + half])
        for line in (0, LANES):
            vectors.prefetch(b, b.gep(ahead, [b.add(at, I64(line))]), 2)
        return sums

    return vectors.loop(b, num_k, [vectors.each(0.0)] * (2 * rows), add)


@intrinsic
def multiply_rows(context, num_rows, x, x_at, ldx, w, w_at, ahead_at, num_k, y, y_at):
    """Of some of `num_rows` rows of x with the panel at w_at: y, fp32 [*, 32]. Asks for the panel at `ahead_at`.

    x is fp32, or bf16 if the panel is of pairs and the processor `MULTIPLIES_PAIRS`. Of the arrays: where to start, and of x from
    row to row, in elements. `num_k` is K'. Returns how many rows these were.
    """

    def generate(context, builder, signature, args):
        b = builder

        def start(array: int, offset: ir.Value, kind: ir.Type) -> ir.Value:
            return vectors.pointer(context, b, signature.args[array], args[array], offset, kind)

        kinds = signature.args[1], signature.args[4]
        numbers = 2 if kinds[0].dtype == types.uint16 else 1
        x_start, ldx = start(1, b.udiv(args[2], I64(numbers)), F32), b.udiv(args[3], I64(numbers))
        y_start = start(8, args[9], F32)
        w_start, ahead = start(4, args[5], I32), start(4, args[6], I32)
        done, taken = b.append_basic_block("done"), []
        for rows in _ROWS_AT_ONCE:
            enough, fewer = b.append_basic_block(f"rows{rows}"), b.append_basic_block("fewer")
            b.cbranch(b.icmp_signed(">=", args[0], I64(rows)), enough, fewer)
            b.position_at_end(enough)
            for i, total in enumerate(_products(b, rows, kinds, x_start, ldx, w_start, ahead, args[7])):
                vectors.store(b, total, y_start, I64(i * LANES))
            taken.append((I64(rows), b.block))
            b.branch(done)
            b.position_at_end(fewer)
        b.unreachable()
        b.position_at_end(done)
        number = b.phi(I64)
        for value, block in taken:
            number.add_incoming(value, block)
        return number

    number = types.int64
    return number(number, x, number, number, w, number, number, number, y, number), generate


@intrinsic
def put_rows(context, products, first, count, bias, bias_at, y, y_at, ldy):
    """Rows of `products`, fp32 [*, 32], from `first` on, `count` >= 1 of them, plus a bias, fp32, rounded to y's type.

    Of bias and y: where to start, and of y from row to row, in elements.
    """

    def generate(context, builder, signature, args):
        b = builder
        row = _Row(context, b, signature.args, args, y=5)
        vectors.loop(b, args[2], [], lambda i, _: row.put(i, row.biased(i)))
        return context.get_dummy_value()

    number = types.int64
    return types.void(products, number, number, bias, number, y, number, number), generate


@intrinsic
def put_gated_rows(context, products, first, count, bias, bias_at, gating, like, y, y_at, ldy):
    """As `put_rows`: sixteen columns of `vectors.silu_mul`, with its alpha, limit and offset, rounded as `like`."""

    def generate(context, builder, signature, args):
        put, count = gated_row(context, builder, signature.args, args)
        vectors.loop(builder, count, [], lambda i, _: put(i))
        return context.get_dummy_value()

    number = types.int64
    return types.void(products, number, number, bias, number, gating, like, y, number, number), generate


def gated_row(
    context: Any, b: ir.IRBuilder, kinds: Any, args: Any
) -> tuple[Callable[[ir.Value], list[ir.Value]], ir.Value]:
    """What emits a row of `put_gated_rows`, of whose arguments these are, and how many rows there are."""
    row = _Row(context, b, kinds, args, y=7)
    numbers = [vectors.splat(b, b.extract_value(args[5], i)) for i in range(3)]

    def put(i: ir.Value) -> list[ir.Value]:
        return row.put(i, [vectors.silu_mul(b, *row.biased(i), *numbers, bf16=kinds[6] == types.uint16)])

    return put, args[2]


class _Row:
    """Emits how a row of products is read and where it goes; arguments as of `put_rows`, y and what follows it from `y` on."""

    def __init__(self, context: Any, b: ir.IRBuilder, kinds: Any, args: Any, *, y: int) -> None:
        self._b, self._kind, self._ldy = b, kinds[y].dtype, args[y + 2]
        self._source = vectors.pointer(context, b, kinds[0], args[0], b.mul(args[1], I64(PANEL)), F32)
        self._target = vectors.pointer(context, b, kinds[y], args[y], args[y + 1], context.get_data_type(self._kind))
        start = vectors.pointer(context, b, kinds[3], args[3], args[4], F32)
        self._biases = [vectors.load(b, start, I64(half)) for half in (0, LANES)]

    def biased(self, i: ir.Value) -> list[ir.Value]:
        """Row i's two halves."""
        b, at = self._b, self._b.mul(i, I64(PANEL))
        halves = (vectors.load(b, self._source, b.add(at, I64(half))) for half in (0, LANES))
        return [b.fadd(half, bias) for half, bias in zip(halves, self._biases, strict=True)]

    def put(self, i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
        """Sixteen by sixteen; nothing is carried to the next row."""
        b = self._b
        for j, value in enumerate(values):
            stored = vectors.to_bf16(b, value) if self._kind == types.uint16 else value
            vectors.store(b, stored, self._target, b.add(b.mul(self._ldy, i), I64(j * LANES)))
        return []
