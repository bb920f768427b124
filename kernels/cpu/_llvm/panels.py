"""Weights packed into panels, the product of a few rows with a panel in vectors, and the epilogue of products.

A *panel* holds the weights of 32 outputs, [K', 32] elements of 32 bits: fp32 with K' = K, or pairs of bf16 adjacent
along K with K' = K / 2. A product keeps 32 sums of each row in vector registers and adds a row of the panel at a
time, so that a product of few rows, which is bound by reading weights, reads memory sequentially.

Each sum runs over K in order, for any number of rows: its bits depend on nothing else. Rows of bf16 are multiplied pair
by pair where the processor can (AVX512-BF16), rows of fp32 number by number.

M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels.cpu._llvm import vectors
from expertwire.kernels.cpu._llvm.scalars import allocating_jit, jit
from expertwire.kernels.cpu._llvm.vectors import BITS, F32, HIGH, I32, I64, LANES, VECTOR

PANEL = 2 * LANES  # outputs
K_STEP = 32  # divides K: sixteen pairs
_FEATURES = llvmlite.binding.get_host_cpu_features()
# Rows of x that are multiplied at once; the sums of the largest number fill the registers.
ROWS_AT_ONCE = (12, 8, 6, 4, 3, 2, 1) if _FEATURES.get("avx512f", False) else (3, 2, 1)
ROWS = ROWS_AT_ONCE[0]
MULTIPLIES_PAIRS = _FEATURES.get("avx512bf16", False)  # rows may be bf16


@intrinsic
def transpose(context, x, x_at, ldx, y, y_at, ldy):
    """Transpose 16 x 16 elements of 32 bits from x to y; each is given by array, start and row stride in elements."""

    def generate(context, builder, signature, args):
        b = builder
        source, target = (vectors.pointer(context, b, signature.args[i], args[i], args[i + 1], I32) for i in (0, 3))
        rows = [vectors.load(b, source, b.mul(args[2], I64(i)), BITS) for i in range(LANES)]
        for size in (1, 2, 4, 8):  # of the blocks that are exchanged
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
    """Transpose sixteen rows, from element `at` on and `stride` elements apart, into a half of panel i."""
    num_k = panels.shape[1]
    target = i * num_k * PANEL + half * LANES
    for k in range(0, num_k, LANES):
        transpose(rows, at + k, stride, panels, target + k * PANEL, PANEL)


@allocating_jit
def pack_rows(w, starts, panels):
    """Pack rows of w [N, K'] into `panels`, half a panel from each row of `starts`; zeros beyond row N."""
    num_n, num_k = w.shape
    rows = np.zeros((LANES, num_k), w.dtype)
    for half in range(len(starts)):
        for i in range(LANES):
            n = starts[half] + i
            for k in range(num_k):  # an assignment of rows takes a second to compile
                rows[i, k] = w[n, k] if n < num_n else 0
        pack_half(rows, 0, num_k, panels, half // 2, half % 2)


def _products(
    b: ir.IRBuilder, rows: int, kinds: Any, x: ir.Value, ldx: ir.Value, w: ir.Value, ahead: ir.Value, num_k: ir.Value
) -> list[ir.Value]:
    """Emit the product of `rows` rows from x on with the panel at w, and prefetch the panel at `ahead`.

    `num_k` is K', `kinds` are the arrays' types. 32 bits of x and of the panel are a number or a pair.
    """
    x_pairs, w_pairs = kinds[0].dtype == types.uint16, kinds[1].dtype == types.uint32
    assert w_pairs or not x_pairs, kinds
    split = w_pairs and not x_pairs
    multiply_add = vectors.add_pair_products if x_pairs else vectors.fma

    def weights(bits: ir.Value, step: int) -> ir.Value:
        if split:
            bits = b.and_(bits, vectors.constant_bits(HIGH)) if step else b.shl(bits, vectors.constant_bits(16))
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

    return vectors.loop(b, num_k, [vectors.constant(0.0)] * (2 * rows), add)


@intrinsic
def multiply_rows(context, num_rows, x, x_at, ldx, w, w_at, ahead_at, num_k, y, y_at):
    """Multiply up to `num_rows` rows of x by the panel at w_at into y, fp32 [*, 32]; return how many rows.

    x is fp32, or bf16 if the panel is of pairs and the processor `MULTIPLIES_PAIRS`. Offsets `*_at` and the row stride
    `ldx` are in elements; `num_k` is K'. The panel at `ahead_at` is prefetched.
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
        for rows in ROWS_AT_ONCE:
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
def store_rows(context, products, first, count, bias, bias_at, y, y_at, ldy):
    """Add a bias (fp32) to `count` >= 1 rows of `products`, fp32 [*, 32], from `first` on; store them in y's type.

    Offsets `*_at` and the row stride `ldy` are in elements.
    """

    def generate(context, builder, signature, args):
        b = builder
        row = _Row(context, b, signature.args, args, y=5)
        vectors.loop(b, args[2], [], lambda i, _: row.put(i, row.biased(i)))
        return context.get_dummy_value()

    number = types.int64
    return types.void(products, number, number, bias, number, y, number, number), generate


@intrinsic
def store_gated_rows(context, products, first, count, bias, bias_at, gating, like, y, y_at, ldy):
    """As `store_rows`, with `vectors.silu_mul`: sixteen columns; `gating` is alpha, limit and offset."""

    def generate(context, builder, signature, args):
        put, count = emit_gated_row(context, builder, signature.args, args)
        vectors.loop(builder, count, [], lambda i, _: put(i))
        return context.get_dummy_value()

    number = types.int64
    return types.void(products, number, number, bias, number, gating, like, y, number, number), generate


def emit_gated_row(
    context: Any, b: ir.IRBuilder, kinds: Any, args: Any
) -> tuple[Callable[[ir.Value], list[ir.Value]], ir.Value]:
    """Return an emitter of one row of `store_gated_rows`, whose arguments these are, and the number of rows."""
    row = _Row(context, b, kinds, args, y=7)
    alpha, limit, offset = (vectors.splat(b, b.extract_value(args[5], i)) for i in range(3))

    def put(i: ir.Value) -> list[ir.Value]:
        gate, up = row.biased(i)
        return row.put(i, [vectors.silu_mul(b, gate, up, alpha, limit, offset, bf16=kinds[6] == types.uint16)])

    return put, args[2]


class _Row:
    """Emit reads of rows of products and their stores; arguments as of `store_rows`, from index `y` on those of y."""

    def __init__(self, context: Any, b: ir.IRBuilder, kinds: Any, args: Any, *, y: int) -> None:
        self._b, self._kind, self._ldy = b, kinds[y].dtype, args[y + 2]
        self._source = vectors.pointer(context, b, kinds[0], args[0], b.mul(args[1], I64(PANEL)), F32)
        self._target = vectors.pointer(context, b, kinds[y], args[y], args[y + 1], context.get_data_type(self._kind))
        start = vectors.pointer(context, b, kinds[3], args[3], args[4], F32)
        self._biases = [vectors.load(b, start, I64(half)) for half in (0, LANES)]

    def biased(self, i: ir.Value) -> list[ir.Value]:
        """Return both halves of row i, with the bias."""
        b, at = self._b, self._b.mul(i, I64(PANEL))
        halves = (vectors.load(b, self._source, b.add(at, I64(half))) for half in (0, LANES))
        return [b.fadd(half, bias) for half, bias in zip(halves, self._biases, strict=True)]

    def put(self, i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
        """Emit the store of a row, sixteen numbers at a time; return no loop-carried values."""
        b = self._b
        for j, value in enumerate(values):
            stored = vectors.to_bf16(b, value) if self._kind == types.uint16 else value
            vectors.store(b, stored, self._target, b.add(b.mul(self._ldy, i), I64(j * LANES)))
        return []
