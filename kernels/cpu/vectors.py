"""LLVM's instructions on vectors of sixteen numbers, for kernels that are written in them and compiled by numba for the machine
at hand; but for `add_pair_products` nothing in them is particular to an instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
LINE_BYTES = 64  # of the cache
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, BITS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
HIGH = 0xFFFF0000  # the upper of two bf16


def each(value: float) -> ir.Constant:
    """fp32 in every lane."""
    return VECTOR([F32(value)] * LANES)


def each_bits(value: int) -> ir.Constant:
    return BITS([I32(value)] * LANES)


def pointer(context: Any, b: ir.IRBuilder, array_type: Any, array: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
    """To element `at` of an array, seen as elements of `kind`."""
    view = context.make_array(array_type)(context, b, array)
    return b.gep(b.bitcast(view.data, kind.as_pointer()), [at])


def load(b: ir.IRBuilder, start: ir.Value, at: ir.Value, kind: ir.Type = VECTOR) -> ir.Value:
    """A vector from element `at` on, wherever it lies."""
    return b.load(b.bitcast(b.gep(start, [at]), kind.as_pointer()), align=2)


def load_numbers(b: ir.IRBuilder, start: ir.Value, at: ir.Value, *, bits: int) -> ir.Value:
    """Sixteen numbers of 32 bits, of 16 (bf16) or of 8 (fp8) as fp32."""
    if bits == 32:
        return load(b, start, at)
    stored = load(b, start, at, ir.VectorType(ir.IntType(bits), LANES))
    return from_bf16(b, stored) if bits == 16 else from_fp8(b, stored)


def store_numbers(b: ir.IRBuilder, value: ir.Value, start: ir.Value, at: ir.Value, *, bits: int) -> None:
    """Sixteen numbers of fp32, rounded to what `load_numbers` reads."""
    rounded = {32: lambda: value, 16: lambda: to_bf16(b, value), 8: lambda: to_fp8(b, value)}[bits]()
    store(b, rounded, start, at)


def store(b: ir.IRBuilder, vector: ir.Value, start: ir.Value, at: ir.Value) -> None:
    b.store(vector, b.bitcast(b.gep(start, [at]), vector.type.as_pointer()), align=2)


def splat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, each_bits(0))


class _BF16(ir.types.Type):
    """What LLVM calls bfloat."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


def call(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """An intrinsic from vectors to a vector."""
    function_type = ir.FunctionType(VECTOR, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, f"llvm.{name}.v{LANES}f32"), args)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, "fma", x, y, z)


def add_pair_products(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """z plus the products of the two bf16 that each lane of x and y is made of: an instruction of AVX512-BF16."""
    pairs = [b.bitcast(vector, ir.VectorType(_BF16(), 2 * LANES)) for vector in (x, y)]
    function_type = ir.FunctionType(VECTOR, [VECTOR, pairs[0].type, pairs[1].type])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), [z, *pairs])


def prefetch(b: ir.IRBuilder, address: ir.Value, cache: int) -> None:
    """Ask for what will be read, into the first cache or the second."""
    byte = b.bitcast(address, I8.as_pointer())
    function_type = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, function_type, "llvm.prefetch.p0")
    b.call(function, [byte, I32(0), I32(4 - cache), I32(1)])


def rounded_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """As 32 bits, whose upper half is bf16, as `numbers.round_like`."""
    bits = b.bitcast(value, BITS)
    odd = b.and_(b.lshr(bits, each_bits(16)), each_bits(1))
    return b.add(b.add(bits, each_bits(0x7FFF)), odd)


def to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.trunc(b.lshr(rounded_bits(b, value), each_bits(16)), ir.VectorType(I16, LANES))


def from_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.zext(value, BITS), each_bits(16)), VECTOR)


def from_fp8(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Of e4m3, exactly. With x the number whose exponent is one more, and mantissa taken as that of a normal number, a normal
    number is x - x / 2, and one below them, whose exponent is stored one too low, x - 2^-6."""
    code = b.zext(value, BITS)
    rest = b.and_(code, each_bits(0x7F))
    doubled = b.bitcast(b.add(b.shl(rest, each_bits(20)), each_bits(121 << 23)), VECTOR)
    size = b.fsub(doubled, maximum(b, b.fmul(doubled, each(0.5)), each(2**-6)))
    size = b.select(b.icmp_unsigned("==", rest, each_bits(0x7F)), each(math.nan), size)
    sign = b.shl(b.and_(code, each_bits(0x80)), each_bits(24))
    return b.bitcast(b.or_(b.bitcast(size, BITS), sign), VECTOR)


def to_fp8(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """As e4m3, saturating at 448; what is no number stays none. Below the normal numbers, 2^14 more leaves multiples of 2^-9."""
    bits = b.bitcast(value, BITS)
    size = minimum(b, b.bitcast(b.and_(bits, each_bits(0x7FFFFFFF)), VECTOR), each(448.0))
    small = b.sub(b.bitcast(b.fadd(size, each(2.0**14)), BITS), each_bits(0x46800000))
    rest = b.bitcast(size, BITS)
    odd = b.and_(b.lshr(rest, each_bits(20)), each_bits(1))
    normal = b.lshr(b.add(b.add(rest, each_bits(0x7FFFF)), odd), each_bits(20))
    code = b.select(b.fcmp_ordered("<", size, each(2**-6)), small, b.sub(normal, each_bits(120 << 3)))
    code = b.select(b.icmp_unsigned("<", code, each_bits(0x7F)), code, each_bits(0x7F))
    return b.trunc(b.or_(code, b.and_(b.lshr(bits, each_bits(24)), each_bits(0x80))), ir.VectorType(I8, LANES))


def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def minimum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), y, x)


def least(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Of two integers."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """`numbers.exp`, bit for bit."""
    x = maximum(b, x, each(-87.0))
    n = call(b, "floor", fma(b, x, each(1.44269504088896341), each(0.5)))
    r = fma(b, n, each(2.12194440e-4), fma(b, n, each(-0.693359375), x))
    p = each(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(b, p, r, each(c))
    p = b.fadd(fma(b, p, b.fmul(r, r), r), each(1.0))
    power = b.shl(b.add(b.fptosi(n, BITS), each_bits(127)), each_bits(23))
    return b.fmul(p, b.bitcast(power, VECTOR))


def folded(b: ir.IRBuilder, vector: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """All lanes combined, as a tree, in every lane."""
    for distance in (8, 4, 2, 1):
        other = [lane ^ distance for lane in range(LANES)]
        vector = combine(vector, b.shuffle_vector(vector, vector, ir.Constant(BITS, other)))
    return vector


def silu_mul(
    b: ir.IRBuilder, gate: ir.Value, up: ir.Value, alpha: ir.Value, limit: ir.Value, offset: ir.Value, bf16: bool
) -> ir.Value:
    """`experts.gate_reference` of fp32 products, in fp32; of alpha 1, limit inf and offset 0 `elementwise.silu_mul_of`, bit for
    bit."""

    def rounded(value: ir.Value) -> ir.Value:
        return from_bf16(b, to_bf16(b, value)) if bf16 else value

    gate, up = minimum(b, rounded(gate), limit), minimum(b, rounded(up), limit)
    up = b.fadd(maximum(b, b.fsub(each(-0.0), limit), up), offset)
    minus = minimum(b, each(88.0), b.fsub(each(-0.0), b.fmul(alpha, gate)))
    silu = rounded(b.fdiv(gate, b.fadd(each(1.0), exp(b, minus))))
    return rounded(b.fmul(silu, up))


def loop(
    b: ir.IRBuilder,
    count: ir.Value,
    starts: Sequence[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """`values = body(i, values)` from `starts` on for i below `count`, at least once."""
    before, inside, after = b.block, b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(inside)
    b.position_at_end(inside)
    i, values = b.phi(I64), [b.phi(start.type) for start in starts]
    new = body(i, list(values))
    following = b.add(i, I64(1))
    for phi, start, value in zip([i, *values], [I64(0), *starts], [following, *new], strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, count), inside, after)
    b.position_at_end(after)
    return new
