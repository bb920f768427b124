"""Keys and values of a sequence, gathered from the paged cache and packed as the weights of products (`panel`).

A cache in fp8 is unpacked on the way, exactly; its scales are up to who multiplies.

G key/value heads, d head size, b blocks, s block size.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from expertwire.kernels.cpu import vectors
from expertwire.kernels.cpu.multiply import MULTIPLIES_PAIRS
from expertwire.kernels.cpu.numbers import empty, jit
from expertwire.kernels.cpu.panel import LINE, PANEL, pack_half
from expertwire.kernels.cpu.rows import put_row
from expertwire.kernels.cpu.vectors import BITS, I16, I32, I64, LANES, LINE_BYTES

_AHEAD = 64  # positions


def panels(queries, numpanels, depth):
    """Panels of a depth, for what such queries meet: pairs, if they are bf16 and the processor multiplies them."""


@overload(panels)
def panels_overload(queries, numpanels, depth):
    if queries.dtype == types.uint16 and MULTIPLIES_PAIRS:
        return lambda queries, numpanels, depth: empty((numpanels, depth // 2, PANEL), np.uint32)
    return lambda queries, numpanels, depth: empty((numpanels, depth, PANEL), np.float32)


def keys_in_row(panels):
    """How many keys a row of a panel of values stands for, and how many elements of a cache an element of a panel."""


@overload(keys_in_row, inline="always")
def keys_in_row_overload(panels):
    num = 2 if panels.dtype == types.uint32 else 1
    return lambda panels: num


def _is_stored_as(cache, panels):
    """Whether elements of panels are those of a cache, or two of them."""


@overload(_is_stored_as, inline="always")
def _is_stored_as_overload(cache, panels):
    same = cache.dtype.bitwidth * (2 if panels.dtype == types.uint32 else 1) == panels.dtype.bitwidth
    return lambda cache, panels: same


@intrinsic
def _ask(context, cache, at):
    """For the memory of element `at`, soon."""

    def generate(context, builder, signature, args):
        kind = context.get_data_type(signature.args[0].dtype)
        address = vectors.pointer(context, builder, signature.args[0], args[0], args[1], kind)
        vectors.prefetch(builder, address, 1)
        return context.get_dummy_value()

    return types.void(cache, types.int64), generate


@jit
def _place(cache_NsGd, table, g, position):
    """At which element of a cache a position's head bases."""
    block_size, num_kv, dim = cache_NsGd.shape[1:]
    return ((table[position // block_size] * block_size + position % block_size) * num_kv + g) * dim


@jit
def _ask_ahead(cache_NsGd, table, g, start, length):
    """For sixteen positions from a multiple of that on, some time before they are packed."""
    block_size, num_kv, dim = cache_NsGd.shape[1:]
    at, line = 0, LINE_BYTES // cache_NsGd.itemsize
    for position in range(start + _AHEAD, min(start + _AHEAD + LANES, length)):
        if position % LANES == 0 or block_size % LANES > 0:
            at = _place(cache_NsGd, table, g, position)
        for i in range(0, dim, line):
            _ask(cache_NsGd, at + i)
        at += num_kv * dim


@jit
def pack_keys(k_NsGd, table, g, base, length, rows, keys):
    """A sequence's keys of head g from position `base` on as the weights of one output each; `rows` [16, d] holds zeros behind
    the head's dimensions.

    What is packed before the first key that is seen, and behind the last one, is not looked at.
    """
    block_size, num_kv, dim = k_NsGd.shape[1:]
    num = keys_in_row(keys)
    in_place = _is_stored_as(k_NsGd, keys) and block_size % LANES == 0 and dim % LINE == 0
    for start in range(base, length, LANES):
        i, half = (start - base) // PANEL, (start - base) // LANES % 2
        _ask_ahead(k_NsGd, table, g, start, length)
        if in_place:
            at = _place(k_NsGd, table, g, start)
            pack_half(k_NsGd, at // num, num_kv * dim // num, keys, i, half)
        else:
            for j in range(min(LANES, length - start)):
                position = start + j
                put_row(k_NsGd[table[position // block_size], position % block_size, g], rows[j])
            pack_half(rows, 0, rows.shape[1] // num, keys, i, half)


@intrinsic
def _join(context, v, low_at, high_at, values, at):
    """32 elements of v from `low_at` on, and the upper halves of pairs from `high_at` on, into `values` from `at` on."""

    def generate(context, builder, signature, args):
        b, kind = builder, context.get_data_type(signature.args[0].dtype)
        pairs, stored_bits = signature.args[3].dtype == types.uint32, signature.args[0].dtype.bitwidth
        low, high = (vectors.pointer(context, b, signature.args[0], args[0], args[i], kind) for i in (1, 2))
        target = vectors.pointer(context, b, signature.args[3], args[3], args[4], I32)

        def part(start: ir.Value, column: int) -> ir.Value:
            if stored_bits == 16:
                return b.zext(vectors.load(b, start, I64(column), ir.VectorType(I16, LANES)), BITS)
            bits = b.bitcast(vectors.load_numbers(b, start, I64(column), bits=stored_bits), BITS)
            return b.lshr(bits, vectors.each_bits(16)) if pairs else bits

        for column in (0, LANES):
            bits = part(low, column)
            if pairs:
                bits = b.or_(bits, b.shl(part(high, column), vectors.each_bits(16)))
            elif stored_bits == 16:
                bits = b.shl(bits, vectors.each_bits(16))
            vectors.store(b, bits, target, I64(column))
        return context.get_dummy_value()

    number = types.int64
    return types.void(v, number, number, values, number), generate


@jit
def pack_values(v_NsGd, dim, table, g, base, first, length, rows, values):
    """A sequence's values of head g, the first `dim` numbers, from position `base` on: [d / 32, K', 32], zeros before the first
    one that is seen and behind the last one.

    `rows` [2, d] holds zeros behind the head's dimensions.
    """
    num, depth = keys_in_row(values), values.shape[1]
    end = -(-(length - base) // PANEL) * PANEL // num
    start, whole = -(-(first - base) // num), (length - base) // num
    if dim % LINE > 0 or start > whole:
        start = whole = end
    _pack_some_values(v_NsGd, dim, table, g, base, first, length, 0, start, rows, values)
    block_size, size = v_NsGd.shape[1], v_NsGd.shape[2] * v_NsGd.shape[3]
    position, left, at = base + start * num, 0, 0
    for k in range(start, whole):
        if position % LANES == 0:
            _ask_ahead(v_NsGd, table, g, position, length)
        for j in range(num):
            if left == 0:
                at, left = _place(v_NsGd, table, g, position), block_size - position % block_size
            if j == 0:
                low_at = at
            high_at, at, position, left = at, at + size, position + 1, left - 1
        for i in range(len(values)):
            _join(v_NsGd, low_at + i * PANEL, high_at + i * PANEL, values, (i * depth + k) * PANEL)
    _pack_some_values(v_NsGd, dim, table, g, base, first, length, whole, end, rows, values)


@jit
def _pack_some_values(v_NsGd, dim, table, g, base, first, length, start, end, rows, values):
    """Rows `start` to `end` of each panel, number by number."""
    num, block_size, depth, size = keys_in_row(values), v_NsGd.shape[1], values.shape[1], rows.shape[1]
    for k in range(start, end):
        for j in range(num):
            position = base + k * num + j
            if first <= position < length:
                put_row(v_NsGd[table[position // block_size], position % block_size, g, :dim], rows[j])
            else:
                rows[j] = 0
        for i in range(len(values)):
            _join(rows, i * PANEL, size + i * PANEL, values, (i * depth + k) * PANEL)
