"""Helpers that emit LLVM IR on vectors of sixteen numbers, for numba intrinsics compiled for the host's processor.

Only `add_pair_products` is specific to an instruction set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
LINE_BYTES = 64  # of a cache line
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
VECTOR, BITS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
HIGH = 0xFFFF0000  # mask of the upper of two bf16


def constant(value: float) -> ir.Constant:
    """Return an fp32 number in every lane."""
    return VECTOR([F32(value)] * LANES)


def constant_bits(value: int) -> ir.Constant:
    return BITS([I32(value)] * LANES)


def pointer(context: Any, b: ir.IRBuilder, array_type: Any, array: ir.Value, at: ir.Value, kind: ir.Type) -> ir.Value:
    """Return the address of element `at` of an array viewed as elements of `kind`."""
    view = context.make_array(array_type)(context, b, array)
    return b.gep(b.bitcast(view.data, kind.as_pointer()), [at])


def load(b: ir.IRBuilder, start: ir.Value, at: ir.Value, kind: ir.Type = VECTOR) -> ir.Value:
    """Load a vector from element `at` on, at any alignment."""
    return b.load(b.bitcast(b.gep(start, [at]), kind.as_pointer()), align=2)


def load_numbers(b: ir.IRBuilder, start: ir.Value, at: ir.Value, *, bits: int) -> ir.Value:
    """Load sixteen numbers of 32 bits, of 16 (bf16) or of 8 (fp8) as fp32."""
    if bits == 32:
        return load(b, start, at)
    stored = load(b, start, at, ir.VectorType(ir.IntType(bits), LANES))
    return from_bf16(b, stored) if bits == 16 else from_fp8(b, stored)


def store_numbers(b: ir.IRBuilder, value: ir.Value, start: ir.Value, at: ir.Value, *, bits: int) -> None:
    """Store sixteen fp32 numbers, rounded to what `load_numbers` reads."""
    rounded = {32: lambda: value, 16: lambda: to_bf16(b, value), 8: lambda: to_fp8(b, value)}[bits]()
    store(b, rounded, start, at)


def store(b: ir.IRBuilder, vector: ir.Value, start: ir.Value, at: ir.Value) -> None:
    b.store(vector, b.bitcast(b.gep(start, [at]), vector.type.as_pointer()), align=2)


def splat(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(VECTOR, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, constant_bits(0))


class _BF16(ir.types.Type):
    """LLVM's type `bfloat`."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BF16)

    def __hash__(self) -> int:
        return hash(_BF16)


def call(b: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic from vectors to a vector."""
    function_type = ir.FunctionType(VECTOR, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, function_type, f"llvm.{name}.v{LANES}f32"), args)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return call(b, "fma", x, y, z)


def add_pair_products(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """Return z plus, in each lane, both products of the two bf16 of x and y: AVX512-BF16's vdpbf16ps."""
    pairs = [b.bitcast(vector, ir.VectorType(_BF16(), 2 * LANES)) for vector in (x, y)]
    function_type = ir.FunctionType(VECTOR, [VECTOR, pairs[0].type, pairs[1].type])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    return b.call(cgutils.get_or_insert_function(b.module, function_type, name), [z, *pairs])


def prefetch(b: ir.IRBuilder, address: ir.Value, cache: int) -> None:
    """Prefetch an address into the first- or second-level cache."""
    byte = b.bitcast(address, I8.as_pointer())
    function_type = ir.FunctionType(ir.VoidType(), [byte.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, function_type, "llvm.prefetch.p0")
    b.call(function, [byte, I32(0), I32(4 - cache), I32(1)])


def rounded_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return 32 bits whose upper half is the rounded bf16, as `scalars.round_like`."""
    bits = b.bitcast(value, BITS)
    odd = b.and_(b.lshr(bits, constant_bits(16)), constant_bits(1))
    return b.add(b.add(bits, constant_bits(0x7FFF)), odd)


def to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.trunc(b.lshr(rounded_bits(b, value), constant_bits(16)), ir.VectorType(I16, LANES))


def from_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.zext(value, BITS), constant_bits(16)), VECTOR)


def from_fp8(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Convert e4m3 exactly.

    Let x have the exponent plus one, and the mantissa read as that of a normal number: a normal number is x - x / 2, a
    subnormal one, whose exponent is stored one too low, x - 2^-6.
    """
    code = b.zext(value, BITS)
    rest = b.and_(code, constant_bits(0x7F))
    doubled = b.bitcast(b.add(b.shl(rest, constant_bits(20)), constant_bits(121 << 23)), VECTOR)
    size = b.fsub(doubled, maximum(b, b.fmul(doubled, constant(0.5)), constant(2**-6)))
    size = b.select(b.icmp_unsigned("==", rest, constant_bits(0x7F)), constant(math.nan), size)
    sign = b.shl(b.and_(code, constant_bits(0x80)), constant_bits(24))
    return b.bitcast(b.or_(b.bitcast(size, BITS), sign), VECTOR)


def to_fp8(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Convert to e4m3, saturating at 448, NaN to NaN. For subnormals, adding 2^14 rounds to multiples of 2^-9."""
    bits = b.bitcast(value, BITS)
    size = minimum(b, b.bitcast(b.and_(bits, constant_bits(0x7FFFFFFF)), VECTOR), constant(448.0))
    small = b.sub(b.bitcast(b.fadd(size, constant(2.0**14)), BITS), constant_bits(0x46800000))
    rest = b.bitcast(size, BITS)
    odd = b.and_(b.lshr(rest, constant_bits(20)), constant_bits(1))
    normal = b.lshr(b.add(b.add(rest, constant_bits(0x7FFFF)), odd), constant_bits(20))
    code = b.select(b.fcmp_ordered("<", size, constant(2**-6)), small, b.sub(normal, constant_bits(120 << 3)))
    code = b.select(b.icmp_unsigned("<", code, constant_bits(0x7F)), code, constant_bits(0x7F))
    return b.trunc(b.or_(code, b.and_(b.lshr(bits, constant_bits(24)), constant_bits(0x80))), ir.VectorType(I8, LANES))


def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def minimum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), y, x)


def least(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return the smaller of two integers."""
    return b.select(b.icmp_signed("<", x, y), x, y)


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """As `scalars.exp`, bit for bit."""
    x = maximum(b, x, constant(-87.0))
    n = call(b, "floor", fma(b, x, constant(1.44269504088896341), constant(0.5)))
    r = fma(b, n, constant(2.12194440e-4), fma(b, n, constant(-0.693359375), x))
    p = constant(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(b, p, r, constant(c))
    p = b.fadd(fma(b, p, b.fmul(r, r), r), constant(1.0))
    power = b.shl(b.add(b.fptosi(n, BITS), constant_bits(127)), constant_bits(23))
    return b.fmul(p, b.bitcast(power, VECTOR))


def reduce_lanes(b: ir.IRBuilder, vector: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
    """Combine all lanes as a tree; return the result in every lane."""
    for distance in (8, 4, 2, 1):
        other = [lane ^ distance for lane in range(LANES)]
        vector = combine(vector, b.shuffle_vector(vector, vector, ir.Constant(BITS, other)))
    return vector


def silu_mul(
    b: ir.IRBuilder, gate: ir.Value, up: ir.Value, alpha: ir.Value, limit: ir.Value, offset: ir.Value, bf16: bool
) -> ir.Value:
    """As `experts.gate_reference`, of fp32 products and in fp32.

    With alpha 1, limit inf and offset 0 it has the bits of `elementwise.silu_mul_of`.
    """

    def rounded(value: ir.Value) -> ir.Value:
        return from_bf16(b, to_bf16(b, value)) if bf16 else value

    gate, up = minimum(b, rounded(gate), limit), minimum(b, rounded(up), limit)
    up = b.fadd(maximum(b, b.fsub(constant(-0.0), limit), up), offset)
    minus = minimum(b, constant(88.0), b.fsub(constant(-0.0), b.fmul(alpha, gate)))
    silu = rounded(b.fdiv(gate, b.fadd(constant(1.0), exp(b, minus))))
    return rounded(b.fmul(silu, up))


def loop(
    b: ir.IRBuilder,
    count: ir.Value,
    starts: Sequence[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> list[ir.Value]:
    """Emit `values = body(i, values)` for i = 0, ..., `count` - 1, from `starts` on; `count` is at least one."""
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
