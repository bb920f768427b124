"""Keys and values of a sequence, gathered from the paged cache and packed into panels as the weights of products.

An fp8 cache is converted exactly on the way; the caller applies its scales.

B blocks, s block size, G key/value heads, d head size.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from expertwire.kernels.cpu._llvm import vectors
from expertwire.kernels.cpu._llvm.panels import K_STEP, PANEL, pack_half
from expertwire.kernels.cpu._llvm.products import MULTIPLIES_PAIRS
from expertwire.kernels.cpu._llvm.rows import copy_row
from expertwire.kernels.cpu._llvm.scalars import empty, jit
from expertwire.kernels.cpu._llvm.vectors import BITS, I16, I32, I64, LANES, LINE_BYTES

_AHEAD = 64  # positions between the one that is packed and the one that is prefetched


def empty_panels(queries, num_panels, depth):
    """Return panels of K = `depth`: of pairs if queries are bf16 and the processor multiplies pairs, else fp32."""


@overload(empty_panels)
def empty_panels_overload(queries, num_panels, depth):
    if queries.dtype == types.uint16 and MULTIPLIES_PAIRS:
        return lambda queries, num_panels, depth: empty((num_panels, depth // 2, PANEL), np.uint32)
    return lambda queries, num_panels, depth: empty((num_panels, depth, PANEL), np.float32)


def keys_in_row(panels):
    """Return the number of keys in a row of a panel of values: 2 for pairs, else 1."""


@overload(keys_in_row, inline="always")
def keys_in_row_overload(panels):
    num = 2 if panels.dtype == types.uint32 else 1
    return lambda panels: num


def _has_bits_of(cache, panels):
    """Return whether an element of panels is one element of the cache, or a pair of them."""


@overload(_has_bits_of, inline="always")
def _has_bits_of_overload(cache, panels):
    same = cache.dtype.bitwidth * (2 if panels.dtype == types.uint32 else 1) == panels.dtype.bitwidth
    return lambda cache, panels: same


@intrinsic
def _prefetch(context, cache, at):
    """Prefetch element `at`."""

    def generate(context, builder, signature, args):
        kind = context.get_data_type(signature.args[0].dtype)
        address = vectors.pointer(context, builder, signature.args[0], args[0], args[1], kind)
        vectors.prefetch(builder, address, 1)
        return context.get_dummy_value()

    return types.void(cache, types.int64), generate


@jit
def _place(cache_BsGd, table, g, position):
    """Return the element of a cache at which head g of a position begins."""
    block_size, num_kv, dim = cache_BsGd.shape[1:]
    return ((table[position // block_size] * block_size + position % block_size) * num_kv + g) * dim


@jit
def _prefetch_ahead(cache_BsGd, table, g, start, length):
    """Prefetch sixteen positions, from a multiple of sixteen on, `_AHEAD` positions before they are packed."""
    block_size, num_kv, dim = cache_BsGd.shape[1:]
    at, line = 0, LINE_BYTES // cache_BsGd.itemsize
    for position in range(start + _AHEAD, min(start + _AHEAD + LANES, length)):
        if position % LANES == 0 or block_size % LANES > 0:
            at = _place(cache_BsGd, table, g, position)
        for i in range(0, dim, line):
            _prefetch(cache_BsGd, at + i)
        at += num_kv * dim


@jit
def pack_keys(k_BsGd, table, g, base, begin, length, rows, keys):
    """Pack a sequence's keys of head g from position `begin` on, each as the weights of one output.

    The first panel is that of position `base`; those before `begin`, a whole number of panels behind it, stay as they are.
    `rows` [16, d] is scratch with zeros beyond the head's dimensions. Panels before the first and behind the last
    visible key hold arbitrary numbers.
    """
    block_size, num_kv, dim = k_BsGd.shape[1:]
    num = keys_in_row(keys)
    in_place = _has_bits_of(k_BsGd, keys) and block_size % LANES == 0 and dim % K_STEP == 0
    for start in range(begin, length, LANES):
        i, half = (start - base) // PANEL, (start - base) // LANES % 2
        _prefetch_ahead(k_BsGd, table, g, start, length)
        if in_place:
            at = _place(k_BsGd, table, g, start)
            pack_half(k_BsGd, at // num, num_kv * dim // num, keys, i, half)
        else:
            for j in range(min(LANES, length - start)):
                position = start + j
                copy_row(k_BsGd[table[position // block_size], position % block_size, g], rows[j])
            pack_half(rows, 0, rows.shape[1] // num, keys, i, half)


@intrinsic
def _join(context, v, low_at, high_at, values, at):
    """Write 32 elements of v from `low_at` on, with those from `high_at` on as upper halves of pairs, to `values`."""

    def generate(context, builder, signature, args):
        b, kind = builder, context.get_data_type(signature.args[0].dtype)
        pairs, stored_bits = signature.args[3].dtype == types.uint32, signature.args[0].dtype.bitwidth
        low, high = (vectors.pointer(context, b, signature.args[0], args[0], args[i], kind) for i in (1, 2))
        target = vectors.pointer(context, b, signature.args[3], args[3], args[4], I32)

        def part(start: ir.Value, column: int) -> ir.Value:
            if stored_bits == 16:
                return b.zext(vectors.load(b, start, I64(column), ir.VectorType(I16, LANES)), BITS)
            bits = b.bitcast(vectors.load_numbers(b, start, I64(column), bits=stored_bits), BITS)
            return b.lshr(bits, vectors.constant_bits(16)) if pairs else bits

        for column in (0, LANES):
            bits = part(low, column)
            if pairs:
                bits = b.or_(bits, b.shl(part(high, column), vectors.constant_bits(16)))
            elif stored_bits == 16:
                bits = b.shl(bits, vectors.constant_bits(16))
            vectors.store(b, bits, target, I64(column))
        return context.get_dummy_value()

    number = types.int64
    return types.void(v, number, number, values, number), generate


@jit
def pack_values(v_BsGd, dim, table, g, base, begin, first, length, rows, values):
    """Pack a sequence's values of head g, the first `dim` numbers, from position `begin` on: [d / 32, K', 32].

    Row 0 of a panel belongs to position `base`; rows before `begin`, a multiple of `PANEL` positions behind it, stay as they
    are. Zeros stand before position `first` and behind the last one. `rows` [2, d] is scratch with zeros beyond the head's
    dimensions.
    """
    num, depth = keys_in_row(values), values.shape[1]
    end, origin = -(-(length - base) // PANEL) * PANEL // num, (begin - base) // num
    start, whole = max(-(-(first - base) // num), origin), (length - base) // num
    if dim % K_STEP > 0 or start > whole:
        start = whole = end
    _pack_some_values(v_BsGd, dim, table, g, base, first, length, origin, start, rows, values)
    block_size, size = v_BsGd.shape[1], v_BsGd.shape[2] * v_BsGd.shape[3]
    position, left, at = base + start * num, 0, 0
    for k in range(start, whole):
        if position % LANES == 0:
            _prefetch_ahead(v_BsGd, table, g, position, length)
        for j in range(num):
            if left == 0:
                at, left = _place(v_BsGd, table, g, position), block_size - position % block_size
            if j == 0:
                low_at = at
            high_at, at, position, left = at, at + size, position + 1, left - 1
        for i in range(len(values)):
            _join(v_BsGd, low_at + i * PANEL, high_at + i * PANEL, values, (i * depth + k) * PANEL)
    _pack_some_values(v_BsGd, dim, table, g, base, first, length, whole, end, rows, values)


@jit
def _pack_some_values(v_BsGd, dim, table, g, base, first, length, start, end, rows, values):
    """Pack rows `start` to `end` of each panel, number by number."""
    num, block_size, depth, size = keys_in_row(values), v_BsGd.shape[1], values.shape[1], rows.shape[1]
    for k in range(start, end):
        for j in range(num):
            position = base + k * num + j
            if first <= position < length:
                copy_row(v_BsGd[table[position // block_size], position % block_size, g, :dim], rows[j])
            else:
                rows[j] = 0
        for i in range(len(values)):
            _join(rows, i * PANEL, size + i * PANEL, values, (i * depth + k) * PANEL)
