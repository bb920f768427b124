"""Products with bf16 weights on processors that multiply matrices (AMX), reading the weights as they lie.

The instruction multiplies a tile of 16 rows and 32 columns by one of 16 pairs of rows and 16 columns. Here the first are weights,
which need no other layout for that, and the second are rows of x, in pairs, transposed (`put_pairs`); little x is rearranged
instead of much w, and the product is transposed too. A library, whose weights are the second tile, rearranges them in every call.

A sum over K runs pair by pair, in fp32, whatever the number of rows and wherever a row stands: its bits depend on nothing else.

Pairs are u32, two bf16 of one row; [blocks of 16 rows, K / 2, 16]. M rows, N outputs, K inputs.
"""

from __future__ import annotations

import ctypes
import platform

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from expertwire.kernels.cpu.numbers import jit

TILE = 16
_K = 32  # of a tile
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILE_DATA = 158, 0x1023, 18  # Linux, x86-64

_I8, _I32, _I64, _VOID = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.VoidType()


def _allowed() -> bool:
    """Whether this processor has the instructions and the system lets this process use them, which it wants to be asked."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    if not llvmlite.binding.get_host_cpu_features().get("amx-bf16", False):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILE_DATA) == 0


AVAILABLE = _allowed()


@jit
def blocks_of(num_rows):
    """How many blocks hold so many rows."""
    return (num_rows + TILE - 1) // TILE


class _Emitter:
    """Emits instructions; tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 rows of x."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def call(self, name: str, *args: ir.Value) -> None:
        function_type = ir.FunctionType(_VOID, [arg.type for arg in args])
        self.b.call(cgutils.get_or_insert_function(self.b.module, function_type, f"llvm.x86.{name}"), args)

    def prefetch(self, address: ir.Value) -> None:
        function_type = ir.FunctionType(_VOID, [address.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(self.b.module, function_type, "llvm.prefetch.p0")
        self.b.call(function, [address, _I32(0), _I32(2), _I32(1)])  # to be read, into the second cache

    def products(
        self, weights: list[ir.Value], ahead: ir.Value | None, ldw: ir.Value, xs: list[ir.Value], num_k: ir.Value
    ) -> None:
        """Tile `2 j + i` becomes the product of 16 rows from `weights[i]` on and the block `xs[j]`. All in bytes, but `num_k`."""
        b = self.b
        for i in range(2 * len(xs)):
            self.call("tilezero", _I8(i))
        before, loop, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
        b.branch(loop)
        b.position_at_end(loop)
        k = b.phi(_I64)
        w_at, x_at = b.mul(k, _I64(2)), b.mul(k, _I64(2 * TILE))
        for i, start in enumerate(weights):
            self.call("tileloadd64", _I8(4 + i), b.gep(start, [w_at]), ldw)
        for j, start in enumerate(xs):
            self.call("tileloadd64", _I8(6 + j), b.gep(start, [x_at]), _I64(4 * TILE))
            for i in range(2):
                self.call("tdpbf16ps", _I8(2 * j + i), _I8(4 + i), _I8(6 + j))
        if ahead is not None:
            for start in weights:
                for row in range(TILE):
                    self.prefetch(b.gep(start, [b.add(b.add(w_at, ahead), b.mul(ldw, _I64(row)))]))
        following = b.add(k, _I64(_K))
        b.cbranch(b.icmp_signed("<", following, num_k), loop, after)
        k.add_incoming(_I64(0), before)
        k.add_incoming(following, b.block)
        b.position_at_end(after)


def _multiply(num_blocks: int, prefetches: bool):
    @intrinsic
    def multiply(context, w, first, second, ahead, x, x_at, y, num_k):
        def generate(context, builder, signature, args):
            def start(array: int, offset: ir.Value) -> ir.Value:
                view = context.make_array(signature.args[array])(context, builder, args[array])
                return builder.bitcast(builder.gep(view.data, [offset]), _I8.as_pointer())

            emitter = _Emitter(builder)
            block = builder.mul(args[7], _I64(TILE // 2))  # elements of x
            ldw = builder.mul(args[7], _I64(2))
            xs = [start(4, builder.add(args[5], builder.mul(block, _I64(j)))) for j in range(num_blocks)]
            far = builder.mul(args[3], _I64(2)) if prefetches else None
            emitter.products([start(0, args[1]), start(0, args[2])], far, ldw, xs, args[7])
            for i in range(2 * num_blocks):
                emitter.call("tilestored64", _I8(i), start(6, _I64(i * TILE * TILE)), _I64(4 * TILE))
            return context.get_dummy_value()

        number = types.int64
        return types.void(w, number, number, number, x, number, y, number), generate

    return multiply


_one, _one_ahead, _two, _two_ahead = (
    _multiply(num_blocks, prefetches) for num_blocks in (1, 2) for prefetches in (False, True)
)


@intrinsic
def transpose(context, x, x_at, ldx, y, y_at, ldy):
    """16 by 16 numbers of 32 bits; of x and y: the array, where to start, and from row to row, in elements of 32 bits."""

    def generate(context, builder, signature, args):
        b, vector = builder, ir.VectorType(_I32, TILE)

        def places(array: int) -> list[ir.Value]:
            view = context.make_array(signature.args[array])(context, b, args[array])
            start = b.bitcast(view.data, _I32.as_pointer())
            spots = [b.add(args[array + 1], b.mul(args[array + 2], _I64(i))) for i in range(TILE)]
            return [b.bitcast(b.gep(start, [spot]), vector.as_pointer()) for spot in spots]

        rows = [b.load(place, align=2) for place in places(0)]
        for size in (1, 2, 4, 8):  # of the blocks that change places
            low = [lane + TILE - size if lane & size else lane for lane in range(TILE)]
            high = [lane + TILE if lane & size else lane + size for lane in range(TILE)]
            for i in (i for i in range(TILE) if not i & size):
                pair = rows[i], rows[i + size]
                for j, lanes in ((i, low), (i + size, high)):
                    rows[j] = b.shuffle_vector(*pair, ir.Constant(vector, lanes))
        for row, place in zip(rows, places(3), strict=True):
            b.store(row, place, align=2)
        return context.get_dummy_value()

    number = types.int64
    return types.void(x, number, number, y, number, number), generate


@jit
def put_pairs(x, index, start, num_rows, rows, pairs):
    """Put the rows `index[start : start + num_rows]` of x, bf16, into `pairs`, sixteen at a time by way of `rows` [16, K]."""
    num_k = x.shape[1]
    for block in range(blocks_of(num_rows)):
        first = start + block * TILE
        for m in range(min(TILE, start + num_rows - first)):
            rows[m] = x[index[first + m]]
        at = block * num_k // 2 * TILE
        for k in range(0, num_k // 2, TILE):
            transpose(rows, k, num_k // 2, pairs, at + k * TILE, TILE)


@intrinsic
def _configure(context, config):
    def generate(context, builder, signature, args):
        view = context.make_array(signature.args[0])(context, builder, args[0])
        _Emitter(builder).call("ldtilecfg", builder.bitcast(view.data, _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(config), generate


@intrinsic
def finish(context):
    """Give the tiles back."""

    def generate(context, builder, signature, args):
        _Emitter(builder).call("tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@jit
def begin():
    """Take the tiles, eight of 16 rows and 64 bytes: before any `multiply`, and `finish` after them."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for i in range(8):
        config[16 + 2 * i], config[48 + i] = 64, TILE
    _configure(config)


@jit
def multiply(w, first, second, ahead, pairs, block, num_blocks, products):
    """16 rows of w from element `first` on, and 16 from `second` on, times block `block` of `pairs` and perhaps the next one.

    `products` fp32 [4, 16 outputs, 16 rows]: the first weights' with the first block, the second's with it, then with the next.
    The first pass over weights asks for those `ahead`, in elements.
    """
    num_k = 2 * pairs.shape[1]
    x_at = block * pairs.shape[1] * TILE
    if block + 1 < num_blocks:
        if block == 0:
            _two_ahead(w, first, second, ahead, pairs, x_at, products, num_k)
        else:
            _two(w, first, second, ahead, pairs, x_at, products, num_k)
    elif block == 0:
        _one_ahead(w, first, second, ahead, pairs, x_at, products, num_k)
    else:
        _one(w, first, second, ahead, pairs, x_at, products, num_k)
