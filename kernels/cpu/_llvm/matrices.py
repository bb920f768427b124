"""Products of a few rows with a matrix that lies as it is, in fp32: not packed, as it is multiplied once or changes.

M rows, N outputs, K inputs.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from expertwire.kernels.cpu._llvm import vectors
from expertwire.kernels.cpu._llvm.panels import PANEL, ROWS, ROWS_AT_ONCE
from expertwire.kernels.cpu._llvm.scalars import jit
from expertwire.kernels.cpu._llvm.vectors import F32, I64, LANES


@intrinsic
def _add_products(context, num_rows, x, x_at, ldx, w, w_at, ldw, num_k, y, y_at, ldy):
    """As `add_product`, of up to `num_rows` rows and 32 columns; return how many rows."""

    def generate(context, builder, signature, args):
        b = builder
        x, w, y = (vectors.pointer(context, b, signature.args[i], args[i], args[i + 1], F32) for i in (1, 4, 8))
        ldx, ldw, num_k, ldy = (args[i] for i in (3, 6, 7, 10))
        done, taken = b.append_basic_block("done"), []
        for rows in ROWS_AT_ONCE:
            enough, fewer = b.append_basic_block(f"rows{rows}"), b.append_basic_block("fewer")
            b.cbranch(b.icmp_signed(">=", args[0], I64(rows)), enough, fewer)
            b.position_at_end(enough)
            places = [b.add(b.mul(ldy, I64(m)), I64(half)) for m in range(rows) for half in (0, LANES)]

            def add(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                halves = [vectors.load(b, w, b.add(b.mul(k, ldw), I64(half))) for half in (0, LANES)]
                starts = (b.gep(x, [b.add(b.mul(ldx, I64(m)), k)]) for m in range(len(sums) // 2))
                values = [vectors.splat(b, b.load(start)) for start in starts]
                return [vectors.fma(b, values[i // 2], halves[i % 2], total) for i, total in enumerate(sums)]

            totals = vectors.loop(b, num_k, [vectors.load(b, y, place) for place in places], add)
            for place, total in zip(places, totals, strict=True):
                vectors.store(b, total, y, place)
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
    kinds = number, x, number, number, w, number, number, number, y, number, number
    return number(*kinds), generate


@jit
def add_product(x, x_at, ldx, num_m, num_k, w, w_at, ldw, num_n, y, y_at, ldy):
    """Add to y [M, N] the product of x [M, K] and w [K, N]; N is a multiple of 32.

    Each number of y becomes the sum of what it was and of K products, in order, whatever M is. Matrices are given by fp32
    array, start and row stride in elements.
    """
    if num_k > 0:
        for n in range(0, num_n, PANEL):
            done = 0
            while done < num_m:
                left = min(num_m - done, ROWS)
                done += _add_products(
                    left, x, x_at + done * ldx, ldx, w, w_at + n, ldw, num_k, y, y_at + done * ldy + n, ldy
                )
