"""Products with bf16 weights by Intel's AMX instructions.

tdpbf16ps multiplies a tile of 16 rows and 32 columns of x, as it lies in memory, by a tile of 16 pairs of rows and 16
columns, which is half of 16 rows of a panel: nothing is rearranged in a call.

Each sum runs over K pair by pair in fp32, for any number of rows and any place of a row: its bits depend on nothing
else.

The tile unit runs slowly for half a microsecond after about as long without work. So the epilogue of a product in
vectors, if it takes that long, is interleaved row by row with the instructions of the next product.

M rows, K inputs.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from expertwire.kernels.cpu._llvm import panels, vectors
from expertwire.kernels.cpu._llvm.panels import PANEL
from expertwire.kernels.cpu._llvm.scalars import allocating_jit, jit
from expertwire.kernels.cpu._llvm.vectors import I8, I64, LINE_BYTES

TILE = 16
ROWS = 2 * TILE  # of x, multiplied at once
HEAD = TILE  # rows of products before the first requested one
_DEPTH = 32  # columns of a tile of x
_STRIDE = 4 * PANEL  # bytes of a row of a panel, and of one of products
_LINES = _DEPTH // 2 * _STRIDE // LINE_BYTES  # cache lines of a panel that are multiplied by one tile
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILE_DATA = 158, 0x1023, 18  # Linux, x86-64


def _allowed() -> bool:
    """Return whether the processor has AMX and the system grants this process its use, which must be requested."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    if not llvmlite.binding.get_host_cpu_features().get("amx-bf16", False):
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_TILE_DATA) == 0


AVAILABLE = _allowed()


class _Emitter:
    """Emit AMX instructions; tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def call(self, name: str, *args: ir.Value) -> None:
        function_type = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
        self.b.call(cgutils.get_or_insert_function(self.b.module, function_type, f"llvm.x86.{name}"), args)

    def products(
        self,
        xs: list[ir.Value],
        ldx: ir.Value,
        w: ir.Value,
        ahead: ir.Value,
        lines: tuple[ir.Value, ir.Value],
        num_k: ir.Value,
        between: Callable[[ir.Value], None],
    ) -> None:
        """Emit tile `2 i + j` = 16 rows from `xs[i]` on times half j of the panel at w; strides are in bytes.

        Each step prefetches cache lines `lines[0]` to `lines[1]` of those that the same step of the panel at `ahead`
        reads. `between` is emitted in each step with the step's number.
        """
        b = self.b
        for i in range(2 * len(xs)):
            self.call("tilezero", I8(i))

        def multiply(step: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            x_at, w_at = b.mul(step, I64(2 * _DEPTH)), b.mul(step, I64(_DEPTH // 2 * _STRIDE))
            for i, start in enumerate(xs):
                # Bypasses the first-level cache, which holds the panel until all rows have been multiplied.
                self.call("tileloaddt164", I8(4 + i), b.gep(start, [x_at]), ldx)
                for j in range(2):
                    if i == 0:
                        half = b.gep(w, [b.add(w_at, I64(j * _STRIDE // 2))])
                        self.call("tileloadd64", I8(6 + j), half, I64(_STRIDE))
                    self.call("tdpbf16ps", I8(2 * i + j), I8(4 + i), I8(6 + j))
            following = b.gep(ahead, [b.add(w_at, b.mul(lines[0], I64(LINE_BYTES)))])

            def fetch(line: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                vectors.prefetch(b, b.gep(following, [b.mul(line, I64(LINE_BYTES))]), 2)
                return []

            vectors.loop(b, b.sub(lines[1], lines[0]), [], fetch)
            between(step)
            return []

        vectors.loop(b, b.udiv(num_k, I64(_DEPTH)), [], multiply)


def _between(context: Any, b: ir.IRBuilder, kind: Any, value: ir.Value, num_k: ir.Value) -> Callable[[ir.Value], None]:
    """Return an emitter of a step's share of `store_gated_rows` with these arguments; of nothing for None."""
    if kind == types.none:
        return lambda step: None
    put, count = panels.emit_gated_row(context, b, kind, cgutils.unpack_tuple(b, value, len(kind)))
    steps = b.udiv(num_k, I64(_DEPTH))
    share = b.udiv(b.sub(b.add(count, steps), I64(1)), steps)

    def emit(step: ir.Value) -> None:
        first = b.mul(step, share)
        left = b.sub(count, first)
        with b.if_then(b.icmp_signed(">", left, I64(0))):
            vectors.loop(b, vectors.least(b, left, share), [], lambda i, _: put(b.add(first, i)))

    return emit


def _multiply(num_blocks: int):
    @intrinsic
    def multiply(
        context, x, first, second, ldx, w, w_at, ahead_at, line, end_line, num_k, y, first_row, second_row, pending
    ):
        def generate(context, builder, signature, args):
            def start(array: int, offset: ir.Value) -> ir.Value:
                kind = context.get_data_type(signature.args[array].dtype)
                at = vectors.pointer(context, builder, signature.args[array], args[array], offset, kind)
                return builder.bitcast(at, I8.as_pointer())

            emitter = _Emitter(builder)
            xs = [start(0, args[1 + i]) for i in range(num_blocks)]
            between = _between(context, builder, signature.args[13], args[13], args[9])
            weights = start(4, args[5]), start(4, args[6]), (args[7], args[8]), args[9]
            emitter.products(xs, builder.mul(args[3], I64(2)), *weights, between)
            for i in range(num_blocks):
                for j in range(2):
                    place = builder.add(builder.mul(args[11 + i], I64(PANEL)), I64(j * TILE))
                    emitter.call("tilestored64", I8(2 * i + j), start(10, place), I64(_STRIDE))
            return context.get_dummy_value()

        n = types.int64
        return types.void(x, n, n, n, w, n, n, n, n, n, y, n, n, pending), generate

    return multiply


_one, _two = (_multiply(num_blocks) for num_blocks in (1, 2))


@intrinsic
def _configure(context, config):
    def generate(context, builder, signature, args):
        start = vectors.pointer(context, builder, signature.args[0], args[0], I64(0), I8)
        _Emitter(builder).call("ldtilecfg", start)
        return context.get_dummy_value()

    return types.void(config), generate


@intrinsic
def finish(context):
    """Release the tiles."""

    def generate(context, builder, signature, args):
        _Emitter(builder).call("tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


@allocating_jit
def begin():
    """Configure eight tiles of 16 rows and 64 bytes: before any `multiply_rows`; `finish` releases them."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    for i in range(8):
        config[16 + 2 * i], config[48 + i] = 64, TILE
    _configure(config)


@jit
def multiply_rows(x, m, num_m, num_k, w, at, ahead, products, pending):
    """Multiply rows m to m + 32 of x, bf16 [max(num_m, 16), >= K], by the panel of w from element `at` on.

    `products` fp32 [HEAD + 32, 32] receives them from row HEAD on. The last 16 rows of x form one tile, wherever it
    begins, so that x is read in place. All calls for a panel together prefetch the one at `ahead`. `pending`: arguments
    of `panels.store_gated_rows` for earlier products, run on the way; or None.
    """
    width, last = x.shape[1], max(num_m - TILE, 0)
    first, second = min(m, last), min(m + TILE, last)
    first_row, second_row = HEAD + first - m, HEAD + second - m
    first, second = first * width, second * width
    # A prefetch of the whole panel at once would delay the reads behind it.
    block, num_blocks = m // ROWS, (num_m - 1) // ROWS + 1
    line, end_line = _LINES * block // num_blocks, _LINES * (block + 1) // num_blocks
    if m + TILE >= num_m:
        _one(x, first, 0, width, w, at, ahead, line, end_line, num_k, products, first_row, 0, pending)
    else:
        _two(x, first, second, width, w, at, ahead, line, end_line, num_k, products, first_row, second_row, pending)
