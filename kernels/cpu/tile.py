"""The inner tiles of products on a CPU, in two forms:

    tile        up to six rows of x times four rows of w      y[m, n] = sum over k of x[m, k] w[n, k]
    accumulate  up to six rows of x times rows of v           y[m, i] += sum over r of x[m, r] v[r, i], i of 64 at most

Written in LLVM's vector types and compiled for the machine at hand by numba; nothing in it is particular to an instruction set.
With few rows a product reads each weight once and does little with it, and waits for memory. So a tile asks for what its caller
will need: the next tile into the first cache, a later one into the second, which doubles its speed (measured at 1 to 8 rows).

bf16 weights are widened 32 at a time, by a shift and a mask, which yields those of even and those of odd place: rows of x for a
`tile` of bf16, and rows of y for an `accumulate`, are fp32 in that order (`place`).

A sum over K is sixteen partial sums over k, k + 16, ... in x's order, added as a tree: one order for every M, N and position, so
a row's bits do not depend on how many rows there are.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from expertwire.kernels.cpu.numbers import jit, load

LANES = 16
LINE = 32  # K is a multiple of it: 64 bytes of bf16
TILE_N = 4  # rows of w in a tile
TILE_M = 6  # rows of x, at most: 24 sums, four weights and a row of x fill 32 registers
_WIDE = 64  # elements of y that one accumulation holds at once
_MASK = 0xFFFF0000

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _BITS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


def place(i, like):
    """Where element i of a row stands that meets weights of `like`'s type."""


@overload(place, inline="always")
def _place_overload(i, like):
    if like == types.uint16:
        return lambda i, like: (i & ~31) | ((i & 1) << 4) | ((i & 31) >> 1)
    return lambda i, like: i


@jit
def spread(x, wide, like):
    """A row of x, as long as a multiple of 32, in fp32 and in the order that weights of `like`'s type need."""
    for start in range(0, len(x), LINE):
        for i in range(LINE):
            wide[start + place(i, like)] = load(x[start + i])


class _TileEmitter:
    """Emits tiles for `rows` rows of x (fp32), weights in fp32 or bf16, and y in fp32."""

    def __init__(self, builder: ir.IRBuilder, rows: int, bf16: bool) -> None:
        self.b, self.rows, self.bf16 = builder, rows, bf16
        self.module = builder.function.module
        self.vectors = 2 if bf16 else 1  # of a load of weights
        self.step = LANES * self.vectors

    def emit_tile(
        self,
        w: ir.Value,
        soon: ir.Value,
        later: ir.Value,
        ldw: ir.Value,
        x: ir.Value,
        ldx: ir.Value,
        y: ir.Value,
        ldy: ir.Value,
        num_k: ir.Value,
    ) -> None:
        b = self.b
        w_rows, soon_rows, later_rows = (self._rows(start, ldw, TILE_N) for start in (w, soon, later))
        x_rows, y_rows = self._rows(x, ldx, self.rows), self._rows(y, ldy, self.rows)
        zeros = [_VECTOR([_F32(0.0)] * LANES)] * (self.rows * TILE_N)

        def body(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            for soon_row, later_row in zip(soon_rows, later_rows, strict=True):
                self._prefetch(soon_row, k, 1)
                self._prefetch(later_row, k, 2)
            weights = [self._weights(row, k) for row in w_rows]
            for part in range(self.vectors):
                # Row by row: all rows of x at once would not fit into the registers.
                for m, row in enumerate(x_rows):
                    value = self._load(row, b.add(k, _I64(part * LANES)))
                    for n in range(TILE_N):
                        sums[m * TILE_N + n] = self._fma(weights[n][part], value, sums[m * TILE_N + n])
            return sums

        sums = self._scalars(self._loop(num_k, self.step, zeros, body))
        for i, total in enumerate(sums):
            b.store(total, b.gep(y_rows[i // TILE_N], [_I64(i % TILE_N)]))

    def emit_accumulate(
        self,
        v: ir.Value,
        soon: ir.Value,
        later: ir.Value,
        ldv: ir.Value,
        x: ir.Value,
        ldx: ir.Value,
        y: ir.Value,
        ldy: ir.Value,
        num_rows: ir.Value,
        width: int,
    ) -> None:
        b, per_row = self.b, width // LANES
        x_rows = self._rows(x, ldx, self.rows)
        spots = [(row, _I64(i)) for row in self._rows(y, ldy, self.rows) for i in range(0, width, LANES)]

        def body(r: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            at = b.mul(ldv, r)
            row, soon_row, later_row = b.gep(v, [at]), b.gep(soon, [at]), b.gep(later, [at])
            starts = [_I64(i) for i in range(0, width, self.step)]
            for start in starts:
                self._prefetch(soon_row, start, 1)
                self._prefetch(later_row, start, 2)
            values = list(chain(*(self._weights(row, start) for start in starts)))
            weights = [self._splat(b.load(b.gep(x_row, [r]))) for x_row in x_rows]
            return [self._fma(weights[i // per_row], values[i % per_row], total) for i, total in enumerate(sums)]

        sums = self._loop(num_rows, 1, [self._load(row, at) for row, at in spots], body)
        for (row, at), total in zip(spots, sums, strict=True):
            b.store(total, b.bitcast(b.gep(row, [at]), _VECTOR.as_pointer()), align=4)

    def _loop(self, count: ir.Value, step: int, starts: list[ir.Value], body: Any) -> list[ir.Value]:
        """`sums = body(i, sums)` from `starts` on for i = 0, step, ... below `count`, at least once."""
        b = self.b
        before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        i, sums = b.phi(_I64), [b.phi(_VECTOR) for _ in starts]
        new_sums = body(i, list(sums))
        next_i = b.add(i, _I64(step))
        for phi, start, value in zip([i, *sums], [_I64(0), *starts], [next_i, *new_sums], strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(value, loop)
        b.cbranch(b.icmp_signed("<", next_i, count), loop, after)
        b.position_at_end(after)
        return new_sums

    def _scalars(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """The sum of every vector as a tree: two vectors are halved side by side, until all sums lie in one vector or two."""
        width = LANES
        held = [(vector, [i]) for i, vector in enumerate(vectors)]  # and which sums a vector's parts belong to
        while width > 1:
            pairs = [held[i : i + 2] for i in range(0, len(held), 2)]
            held = [self._halve_pair(pair[0], pair[-1], width) for pair in pairs]
            width //= 2
        lanes = {
            i: (vector, lane) for vector, owners in reversed(held) for lane, i in reversed(list(enumerate(owners)))
        }
        return [self.b.extract_element(lanes[i][0], _I32(lanes[i][1])) for i in range(len(vectors))]

    def _halve_pair(self, first: tuple, second: tuple, width: int) -> tuple[ir.Value, list[int]]:
        """Adds the upper to the lower half of every part, `width` wide, of two vectors; the sums together fill one vector."""
        parts, half = range(0, 2 * LANES, width), width // 2
        lower = [start + i for start in parts for i in range(half)]
        low, high = (
            self.b.shuffle_vector(first[0], second[0], _BITS([_I32(i + shift) for i in lower])) for shift in (0, half)
        )
        return self.b.fadd(low, high), first[1] + second[1]

    def _rows(self, start: ir.Value, stride: ir.Value, count: int) -> list[ir.Value]:
        return [self.b.gep(start, [self.b.mul(stride, _I64(i))]) for i in range(count)]

    def _splat(self, value: ir.Value) -> ir.Value:
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        one = self.b.insert_element(undefined, value, _I32(0))
        return self.b.shuffle_vector(one, undefined, _BITS([_I32(0)] * LANES))

    def _load(self, row: ir.Value, k: ir.Value) -> ir.Value:
        return self.b.load(self.b.bitcast(self.b.gep(row, [k]), _VECTOR.as_pointer()), align=4)

    def _weights(self, row: ir.Value, k: ir.Value) -> list[ir.Value]:
        if not self.bf16:
            return [self._load(row, k)]
        b = self.b
        both = b.load(b.bitcast(b.gep(row, [k]), _BITS.as_pointer()), align=2)
        even, odd = b.shl(both, _BITS([_I32(16)] * LANES)), b.and_(both, _BITS([_I32(_MASK)] * LANES))
        return [b.bitcast(even, _VECTOR), b.bitcast(odd, _VECTOR)]

    def _prefetch(self, row: ir.Value, k: ir.Value, cache: int) -> None:
        b = self.b
        byte = b.bitcast(b.gep(row, [k]), ir.IntType(8).as_pointer())
        function_type = ir.FunctionType(ir.VoidType(), [byte.type, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(self.module, function_type, "llvm.prefetch.p0")
        b.call(prefetch, [byte, _I32(0), _I32(4 - cache), _I32(1)])

    def _fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        function_type = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        return self.b.call(
            cgutils.get_or_insert_function(self.module, function_type, f"llvm.fma.v{LANES}f32"), [a, b, c]
        )


@intrinsic
def tile(context, rows, w, w_at, soon_at, later_at, ldw, x, x_at, ldx, y, y_at, ldy, num_k):
    """The product of `min(rows, 6)` rows of x with four of w; asks for the four from `soon_at` and from `later_at` on.

    Of w, x and y: the array, where to start, and from row to row, in elements.
    """

    def generate(context, builder, signature, args):
        def emit(emitter, pointers):
            emitter.emit_tile(*pointers[:3], args[5], pointers[3], args[8], pointers[4], args[11], args[12])

        return _for_rows(context, builder, signature, args, emit)

    return _signature(w, x, y), generate


def _accumulate(width: int) -> Any:
    """accumulate(rows, v, start, soon, later, stride, x, start, stride, y, start, stride, rows of v >= 1), as `tile`."""

    @intrinsic
    def accumulate(context, rows, v, v_at, soon_at, later_at, ldv, x, x_at, ldx, y, y_at, ldy, num_rows):
        def generate(context, builder, signature, args):
            def emit(emitter, pointers):
                emitter.emit_accumulate(
                    *pointers[:3], args[5], pointers[3], args[8], pointers[4], args[11], args[12], width
                )

            return _for_rows(context, builder, signature, args, emit)

        return _signature(v, x, y), generate

    return accumulate


def _for_rows(context: Any, builder: ir.IRBuilder, signature: Any, args: Any, emit: Any) -> Any:
    """What `emit` makes, for 1, 2, ... 6 rows. It gets where the weights, those needed soon and later, x and y start."""

    def pointer(i: int, offset: int) -> ir.Value:
        array = context.make_array(signature.args[i])(context, builder, args[i])
        return builder.gep(array.data, [args[offset]])

    pointers = [pointer(1, 2), pointer(1, 3), pointer(1, 4), pointer(6, 7), pointer(9, 10)]
    blocks = [builder.append_basic_block(f"rows{rows}") for rows in range(1, TILE_M + 1)]
    done = builder.append_basic_block("done")
    switch = builder.switch(args[0], blocks[-1])
    for rows, block in enumerate(blocks, 1):
        if block is not blocks[-1]:
            switch.add_case(_I64(rows), block)
        builder.position_at_end(block)
        emit(_TileEmitter(builder, rows, bf16=signature.args[1].dtype == types.uint16), pointers)
        builder.branch(done)
    builder.position_at_end(done)
    return context.get_dummy_value()


def _signature(a: Any, b: Any, c: Any) -> Any:
    numbers = (types.int64, types.int64)
    return types.void(types.int64, a, *numbers, *numbers, b, *numbers, c, *numbers, types.int64)


_accumulate_wide, _accumulate_narrow = _accumulate(_WIDE), _accumulate(LINE)


@jit
def accumulate(rows, width, v, v_at, soon_at, later_at, ldv, x, x_at, ldx, y, y_at, ldy, num_rows):
    """Add to `min(rows, 6)` rows of y, `width` long, the products with `num_rows` >= 1 rows of v."""
    i = 0
    while i + _WIDE <= width:
        _accumulate_wide(rows, v, v_at + i, soon_at + i, later_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        i += _WIDE
    while i < width:
        _accumulate_narrow(rows, v, v_at + i, soon_at + i, later_at + i, ldv, x, x_at, ldx, y, y_at + i, ldy, num_rows)
        i += LINE
