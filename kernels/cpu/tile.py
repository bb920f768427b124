"""The inner tiles of products on a CPU, in two forms:

    tile        up to four rows of x times four rows of w     y[m, n] = sum over k of x[m, k] w[n, k]
    accumulate  up to four rows of x times rows of v          y[m, i] += sum over r of x[m, r] v[r, i], i of 64 at most

Written in LLVM's vector types and compiled for the machine at hand by numba; nothing in it is particular to an instruction set.
With few rows a product reads each weight once and does little with it, and waits for memory: so the tile asks for the weights
some kilobytes ahead, which doubles its speed (measured at 1 to 8 rows).

A sum over K is sixteen partial sums over k, k + 16, ..., added as a tree: one order for every M, N and position, so a row's bits
do not depend on how many rows there are.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from expertwire.kernels.cpu.numbers import jit

LANES = 16  # K is a multiple of it
TILE_N = 4  # rows of w in a tile
TILE_M = 4  # rows of x, at most
_AHEAD_BYTES = 8192
_WIDE = 4  # vectors of y that one accumulation holds at once

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


class _TileEmitter:
    """Emits one tile: `rows` rows of x (fp32) times four rows of w (fp32 or bf16), K long, into y (fp32)."""

    def __init__(self, builder: ir.IRBuilder, rows: int, bf16: bool) -> None:
        self.b, self.rows, self.bf16 = builder, rows, bf16
        self.module = builder.function.module

    def emit(
        self, w: ir.Value, ldw: ir.Value, x: ir.Value, ldx: ir.Value, y: ir.Value, ldy: ir.Value, num_k: ir.Value
    ) -> None:
        b = self.b
        w_rows = [b.gep(w, [b.mul(ldw, _I64(n))]) for n in range(TILE_N)]
        x_rows = [b.gep(x, [b.mul(ldx, _I64(m))]) for m in range(self.rows)]
        before, loop, after = b.block, b.append_basic_block("k"), b.append_basic_block("sum")
        b.branch(loop)

        b.position_at_end(loop)
        k = b.phi(_I64)
        sums = [[b.phi(_VECTOR) for _ in range(TILE_N)] for _ in range(self.rows)]
        w_now = [self._weights(row, k) for row in w_rows]
        new_sums = [
            [self._fma(value, self._vector(row, k), total) for value, total in zip(w_now, totals, strict=True)]
            for row, totals in zip(x_rows, sums, strict=True)
        ]
        next_k = b.add(k, _I64(LANES))
        k.add_incoming(_I64(0), before)
        k.add_incoming(next_k, loop)
        for phi, value in zip(chain(*sums), chain(*new_sums), strict=True):
            phi.add_incoming(_VECTOR([_F32(0.0)] * LANES), before)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", next_k, num_k), loop, after)

        b.position_at_end(after)
        for m in range(self.rows):
            for n in range(TILE_N):
                b.store(self._tree_sum(new_sums[m][n]), b.gep(y, [b.add(b.mul(ldy, _I64(m)), _I64(n))]))

    def emit_accumulate(
        self,
        v: ir.Value,
        ldv: ir.Value,
        x: ir.Value,
        ldx: ir.Value,
        y: ir.Value,
        ldy: ir.Value,
        num_rows: ir.Value,
        chunks: int,
    ) -> None:
        b = self.b
        spots = [(b.gep(y, [b.mul(ldy, _I64(m))]), _I64(i * LANES)) for m in range(self.rows) for i in range(chunks)]
        loaded = [self._vector(row, at) for row, at in spots]
        before, loop, after = b.block, b.append_basic_block("r"), b.append_basic_block("store")
        b.branch(loop)

        b.position_at_end(loop)
        r = b.phi(_I64)
        sums = [b.phi(_VECTOR) for _ in spots]
        values = [self._weights(b.gep(v, [b.mul(ldv, r)]), _I64(i * LANES)) for i in range(chunks)]
        new_sums = []
        for m in range(self.rows):
            weight = self._splat(b.load(b.gep(x, [b.add(b.mul(ldx, _I64(m)), r)])))
            new_sums += [self._fma(weight, value, sums[m * chunks + i]) for i, value in enumerate(values)]
        next_r = b.add(r, _I64(1))
        r.add_incoming(_I64(0), before)
        r.add_incoming(next_r, loop)
        for phi, start, value in zip(sums, loaded, new_sums, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", next_r, num_rows), loop, after)

        b.position_at_end(after)
        for (row, at), value in zip(spots, new_sums, strict=True):
            b.store(value, b.bitcast(b.gep(row, [at]), _VECTOR.as_pointer()), align=4)

    def _splat(self, value: ir.Value) -> ir.Value:
        one = self.b.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _I32(0))
        return self.b.shuffle_vector(
            one, ir.Constant(_VECTOR, ir.Undefined), ir.VectorType(_I32, LANES)([_I32(0)] * LANES)
        )

    def _vector(self, row: ir.Value, k: ir.Value) -> ir.Value:
        return self.b.load(self.b.bitcast(self.b.gep(row, [k]), _VECTOR.as_pointer()), align=4)

    def _weights(self, row: ir.Value, k: ir.Value) -> ir.Value:
        b = self.b
        here = b.gep(row, [k])
        byte = b.bitcast(here, ir.IntType(8).as_pointer())
        prefetch_type = ir.FunctionType(ir.VoidType(), [byte.type, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(self.module, prefetch_type, "llvm.prefetch.p0")
        b.call(prefetch, [b.gep(byte, [_I64(_AHEAD_BYTES)]), _I32(0), _I32(3), _I32(1)])
        if not self.bf16:
            return self._vector(row, k)
        wide = ir.VectorType(_I32, LANES)
        stored = b.load(b.bitcast(here, ir.VectorType(_I16, LANES).as_pointer()), align=2)
        return b.bitcast(b.shl(b.zext(stored, wide), wide([_I32(16)] * LANES)), _VECTOR)

    def _fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        function_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return self.b.call(
            cgutils.get_or_insert_function(self.module, function_type, f"llvm.fma.v{LANES}f32"), [a, b, c]
        )

    def _tree_sum(self, vector: ir.Value) -> ir.Value:
        b, width = self.b, LANES
        while width > 1:
            width //= 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            low, high = (
                b.shuffle_vector(vector, undefined, ir.VectorType(_I32, width)([_I32(i + start) for i in range(width)]))
                for start in (0, width)
            )
            vector = b.fadd(low, high)
        return b.extract_element(vector, _I32(0))


def _tile(rows: int) -> Any:
    """tile(w, offset, stride, x, offset, stride, y, offset, stride, K): arrays, and i64 counts of their elements."""

    @intrinsic
    def tile(context, w, w_at, ldw, x, x_at, ldx, y, y_at, ldy, num_k):
        def generate(context, builder, signature, args):
            emitter = _TileEmitter(builder, rows, bf16=signature.args[0].dtype == types.uint16)
            w, x, y = (_pointer(context, builder, signature, args, i) for i in (0, 3, 6))
            emitter.emit(w, args[2], x, args[5], y, args[8], args[9])
            return context.get_dummy_value()

        return _signature(w, x, y), generate

    return tile


def _accumulate(rows: int, chunks: int) -> Any:
    """accumulate(v, offset, stride, x, offset, stride, y, offset, stride, rows of v >= 1): arrays, and i64 counts of elements."""

    @intrinsic
    def accumulate(context, v, v_at, ldv, x, x_at, ldx, y, y_at, ldy, num_rows):
        def generate(context, builder, signature, args):
            emitter = _TileEmitter(builder, rows, bf16=signature.args[0].dtype == types.uint16)
            v, x, y = (_pointer(context, builder, signature, args, i) for i in (0, 3, 6))
            emitter.emit_accumulate(v, args[2], x, args[5], y, args[8], args[9], chunks)
            return context.get_dummy_value()

        return _signature(v, x, y), generate

    return accumulate


def _pointer(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, i: int) -> ir.Value:
    """Where array argument i starts, given its offset in the next argument."""
    array = context.make_array(signature.args[i])(context, builder, args[i])
    return builder.gep(array.data, [args[i + 1]])


def _signature(a: Any, b: Any, c: Any) -> Any:
    numbers = (types.int64, types.int64)
    return types.void(a, *numbers, b, *numbers, c, *numbers, types.int64)


_tile1, _tile2, _tile3, _tile4 = (_tile(rows) for rows in range(1, TILE_M + 1))
_add1, _add2, _add3, _add4 = (_accumulate(rows, 1) for rows in range(1, TILE_M + 1))
_add1_wide, _add2_wide, _add3_wide, _add4_wide = (_accumulate(rows, _WIDE) for rows in range(1, TILE_M + 1))


@jit
def tile(rows, w, w_at, ldw, x, x_at, ldx, y, y_at, ldy, num_k):
    """The product of `min(rows, 4)` rows of x with four of w; arrays, and offsets and strides in elements."""
    if rows >= 4:
        _tile4(w, w_at, ldw, x, x_at, ldx, y, y_at, ldy, num_k)
    elif rows == 3:
        _tile3(w, w_at, ldw, x, x_at, ldx, y, y_at, ldy, num_k)
    elif rows == 2:
        _tile2(w, w_at, ldw, x, x_at, ldx, y, y_at, ldy, num_k)
    else:
        _tile1(w, w_at, ldw, x, x_at, ldx, y, y_at, ldy, num_k)


@jit
def accumulate(rows, width, v, v_at, ldv, x, x_at, ldx, y, y_at, ldy, num_rows):
    """Add to `min(rows, 4)` rows of y, `width` long, the products with `num_rows` >= 1 rows of v."""
    i = 0
    while i + _WIDE * LANES <= width:
        if rows >= 4:
            _add4_wide(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        elif rows == 3:
            _add3_wide(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        elif rows == 2:
            _add2_wide(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        else:
            _add1_wide(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        i += _WIDE * LANES
    while i < width:
        if rows >= 4:
            _add4(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        elif rows == 3:
            _add3(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        elif rows == 2:
            _add2(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        else:
            _add1(v, v_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        i += LANES
