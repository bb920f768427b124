"""Attention on a CPU, and what comes before it.

The keys of a head are packed as weights are (`panel`), and so are its values, transposed: both products are those of linear
layers (`multiply`), with rows of queries, each a token's and a head's, and a softmax row by row between them. A row's bits depend
on the keys that it sees alone: not on how many queries there are, nor on how many keys lie behind.

T tokens, H query heads, G key/value heads, d head size, B sequences, b blocks, s block size.
"""

from __future__ import annotations

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload
from torch import Tensor

from expertwire.kernels.attention import PagedSequences
from expertwire.kernels.cpu import amx, vectors
from expertwire.kernels.cpu.multiply import HEAD, begin, finish, multiply, operand, products, put_row, rows_at_once
from expertwire.kernels.cpu.numbers import as_array, jit, load, round_like, sum_squares
from expertwire.kernels.cpu.panel import LINE, PANEL, pack_half, put_rows
from expertwire.kernels.cpu.vectors import BITS, F32, I16, I32, I64, LANES

_AHEAD = 64  # positions
_LINE_BYTES = 64


@jit
def rotate_and_store_rows(
    qkv_Thd: np.ndarray,
    norm_hd: np.ndarray,
    eps: float,
    cos_Pd: np.ndarray,
    sin_Pd: np.ndarray,
    positions_T: np.ndarray,
    slots_T: np.ndarray,
    k_NGd: np.ndarray,
    v_NGd: np.ndarray,
    q_THd: np.ndarray,
) -> None:
    num_heads, num_kv, dim = q_THd.shape[1], k_NGd.shape[1], q_THd.shape[2]
    half = dim // 2
    row = np.empty(dim, np.float32)
    for t in range(qkv_Thd.shape[0]):
        position, slot = positions_T[t], slots_T[t]
        for h in range(num_heads + num_kv):
            for i in range(dim):
                row[i] = load(qkv_Thd[t, h, i])
            if norm_hd.shape[0] > 0:
                scale = np.float32(1) / np.sqrt(sum_squares(row) / np.float32(dim) + np.float32(eps))
                for i in range(dim):
                    row[i] = row[i] * scale * load(norm_hd[h, i])
            target = q_THd[t, h] if h < num_heads else k_NGd[slot, h - num_heads]
            for i in range(half):
                first, second = row[i], row[i + half]
                cos, sin = cos_Pd[position, i + half], sin_Pd[position, i + half]
                target[i] = round_like(first * cos - second * sin, target[i])
                target[i + half] = round_like(second * cos + first * sin, target[i])
        for h in range(num_kv):
            for i in range(dim):
                v_NGd[slot, h, i] = qkv_Thd[t, num_heads + num_kv + h, i]


def rotate_and_store(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """`kernels.attention.rotate_and_store`."""
    num_kv, dim = k_cache.shape[2:]
    q_THd = qkv_Thd.new_empty(qkv_Thd.shape[0], qkv_Thd.shape[1] - 2 * num_kv, dim)
    norm = qkv_Thd.new_empty(0, dim) if norm_hd is None else norm_hd
    rotate_and_store_rows(
        as_array(qkv_Thd),
        as_array(norm),
        eps,
        tables[0].numpy(),
        tables[1].numpy(),
        positions_T.numpy(),
        slot_mapping_T.numpy(),
        as_array(k_cache.flatten(0, 1)),
        as_array(v_cache.flatten(0, 1)),
        as_array(q_THd),
    )
    return q_THd


@intrinsic
def _softmax(context, scores, scores_at, visible, scale, weights, weights_at, width):
    """Of a row, in fp32: the softmax of the first `visible` scores times `scale`, rounded to the type of weights, then zeros to
    `width`, a multiple of 16. The scores are lost. Of the arrays: where the row starts."""

    def generate(context, builder, signature, args):
        b, kind = builder, signature.args[4].dtype
        source = vectors.pointer(context, b, signature.args[0], args[0], args[1], F32)
        target = vectors.pointer(context, b, signature.args[4], args[4], args[5], context.get_data_type(kind))
        count, lanes = b.trunc(args[2], I32), BITS([I32(lane) for lane in range(LANES)])
        factor = vectors.splat(b, args[3])

        def score(i: ir.Value) -> tuple[ir.Value, ir.Value]:
            """And which of the sixteen are visible."""
            at = b.mul(i, I64(LANES))
            index = b.add(_splat_bits(b, b.trunc(at, I32)), lanes)
            return b.fmul(vectors.load(b, source, at), factor), b.icmp_signed("<", index, _splat_bits(b, count))

        def largest(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
            value, seen = score(i)
            return [vectors.maximum(b, b.select(seen, value, values[0]), values[0])]

        def weigh(i: ir.Value, values: list[ir.Value]) -> list[ir.Value]:
            value, seen = score(i)
            weight = b.select(seen, vectors.exp(b, b.fsub(value, top)), vectors.each(0.0))
            vectors.store(b, weight, source, b.mul(i, I64(LANES)))
            return [b.fadd(values[0], weight)]

        def divide(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            at = b.mul(i, I64(LANES))
            weight = b.fmul(vectors.load(b, source, at), inverse)
            vectors.store(b, vectors.to_bf16(b, weight) if kind == types.uint16 else weight, target, at)
            return []

        steps = b.udiv(b.add(args[2], I64(LANES - 1)), I64(LANES))
        [top] = vectors.loop(b, steps, [vectors.each(float("-inf"))], largest)
        top = vectors.folded(b, top, lambda x, y: vectors.maximum(b, x, y))
        steps = b.udiv(args[6], I64(LANES))
        [total] = vectors.loop(b, steps, [vectors.each(0.0)], weigh)
        inverse = b.fdiv(vectors.each(1.0), vectors.folded(b, total, b.fadd))
        vectors.loop(b, steps, [], divide)
        return context.get_dummy_value()

    number = types.int64
    return types.void(scores, number, number, types.float32, weights, number, number), generate


def _splat_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(BITS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undefined, value, I32(0)), undefined, vectors.each_bits(0))


def _panels(cache, num_panels, depth):
    """Panels of a depth, for what is in a cache: pairs, if they are multiplied by matrices."""


@overload(_panels)
def _panels_overload(cache, num_panels, depth):
    if cache.dtype == types.uint16 and amx.AVAILABLE:
        return lambda cache, num_panels, depth: np.empty((num_panels, depth // 2, PANEL), np.uint32)
    return lambda cache, num_panels, depth: np.empty((num_panels, depth, PANEL), np.float32)


def _keys_in_row(panels):
    """How many keys a row of a panel of values stands for, and how many elements of a cache an element of a panel."""


@overload(_keys_in_row, inline="always")
def _keys_in_row_overload(panels):
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
    """At which element of a cache a position's head begins."""
    block_size, num_kv, dim = cache_NsGd.shape[1:]
    return ((table[position // block_size] * block_size + position % block_size) * num_kv + g) * dim


@jit
def _ask_ahead(cache_NsGd, table, g, start, length):
    """For sixteen positions, some time before they are packed."""
    line = _LINE_BYTES // cache_NsGd.itemsize
    for position in range(start + _AHEAD, min(start + _AHEAD + LANES, length)):
        at = _place(cache_NsGd, table, g, position)
        for i in range(0, cache_NsGd.shape[3], line):
            _ask(cache_NsGd, at + i)


@jit
def _pack_keys(k_NsGd, table, g, length, rows, keys):
    """A sequence's keys of head g as the weights of one output each; `rows` [16, d] holds zeros behind the head's dimensions.

    What is packed behind the last key is not looked at.
    """
    block_size, num_kv, dim = k_NsGd.shape[1:]
    num = _keys_in_row(keys)
    in_place = _is_stored_as(k_NsGd, keys) and block_size % LANES == 0 and dim % LINE == 0
    for start in range(0, length, LANES):
        i, half = start // PANEL, start // LANES % 2
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
        pairs, bf16 = signature.args[3].dtype == types.uint32, signature.args[0].dtype == types.uint16
        low, high = (vectors.pointer(context, b, signature.args[0], args[0], args[i], kind) for i in (1, 2))
        target = vectors.pointer(context, b, signature.args[3], args[3], args[4], I32)

        def part(start: ir.Value, column: int) -> ir.Value:
            if not bf16:
                return vectors.load(b, start, I64(column), BITS)
            return b.zext(vectors.load(b, start, I64(column), ir.VectorType(I16, LANES)), BITS)

        for column in (0, LANES):
            bits = part(low, column)
            if pairs:
                bits = b.or_(bits, b.shl(part(high, column), vectors.each_bits(16)))
            elif bf16:
                bits = b.shl(bits, vectors.each_bits(16))
            vectors.store(b, bits, target, I64(column))
        return context.get_dummy_value()

    number = types.int64
    return types.void(v, number, number, values, number), generate


@jit
def _pack_values(v_NsGd, table, g, length, rows, values):
    """A sequence's values of head g, [d / 32, K', 32], zeros behind the last one.

    `rows` [2, d] holds zeros behind the head's dimensions.
    """
    block_size, dim = v_NsGd.shape[1], v_NsGd.shape[3]
    num, depth, size = _keys_in_row(values), values.shape[1], rows.shape[1]
    whole = length // num if dim % LINE == 0 else 0
    for k in range(whole):
        low, high = k * num, k * num + num - 1
        if low % LANES == 0:
            _ask_ahead(v_NsGd, table, g, low, length)
        low_at, high_at = _place(v_NsGd, table, g, low), _place(v_NsGd, table, g, high)
        for i in range(len(values)):
            _join(v_NsGd, low_at + i * PANEL, high_at + i * PANEL, values, (i * depth + k) * PANEL)
    for k in range(whole, -(-length // PANEL) * PANEL // num):
        for j in range(num):
            position = k * num + j
            if position < length:
                rows[j, :dim] = v_NsGd[table[position // block_size], position % block_size, g]
            else:
                rows[j] = 0
        for i in range(len(values)):
            _join(rows, i * PANEL, size + i * PANEL, values, (i * depth + k) * PANEL)


@jit
def attend_rows(q_THd, k_NsGd, v_NsGd, tables_Bb, cu_queries, lengths_B, scale, out_THd):
    """`kernels.attention.reference`; `cu_queries` as in `PagedSequences`."""
    num_kv, dim = k_NsGd.shape[2:]
    longest, depth = -(-max(lengths_B) // PANEL) * PANEL, -(-dim // LINE) * LINE
    keys, values = _panels(k_NsGd, longest // PANEL, depth), _panels(v_NsGd, depth // PANEL, longest)
    step = min(rows_at_once(keys), np.diff(cu_queries).max() * (q_THd.shape[1] // num_kv))
    rows, queries = operand(LANES, depth, keys), operand(step, depth, keys)
    two_rows = np.zeros((2, depth), v_NsGd.dtype)
    rows[:], queries[:] = 0, 0
    scores, weights = np.empty((step, longest), np.float32), operand(step, longest, values)
    found = products()
    begin(keys)
    for b in range(len(lengths_B)):
        first, last, length = cu_queries[b], cu_queries[b + 1], lengths_B[b]
        for g in range(num_kv):
            _pack_keys(k_NsGd, tables_Bb[b], g, length, rows, keys)
            _pack_values(v_NsGd, tables_Bb[b], g, length, two_rows, values)
            _attend_head(
                q_THd[first:last],
                g,
                q_THd.shape[1] // num_kv,
                length,
                keys,
                values,
                np.float32(scale),
                queries,
                scores,
                weights,
                found,
                out_THd[first:last],
            )
    finish(keys)


@jit
def _attend_head(q_THd, g, group, length, keys, values, scale, queries, scores, weights, found, out_THd):
    """The last tokens of a sequence, with the `group` heads that share key head g; rows are token by token, head by head."""
    num, (step, width) = len(q_THd), scores.shape
    depth, unbiased = queries.shape[1], np.zeros(PANEL, np.float32)
    for start in range(0, num * group, step):
        count = min(step, num * group - start)
        for i in range(count):
            put_row(q_THd[(start + i) // group, g * group + (start + i) % group], queries[i])
        seen = -(-(length - num + (start + count - 1) // group + 1) // PANEL) * PANEL
        for i in range(seen // PANEL):
            multiply(queries, 0, count, depth, keys, i, found)
            put_rows(found, HEAD, count, unbiased, 0, scores, i * PANEL, width)
        for i in range(count):
            visible, at = length - num + (start + i) // group + 1, i * width
            _softmax(scores, at, visible, scale, weights, at, seen)
        for i in range(len(values)):
            multiply(weights, 0, count, seen, values, i, found)
            _put_outputs(found, start, count, g, group, i * PANEL, out_THd)


@jit
def _put_outputs(found, start, count, g, group, column, out_THd):
    """Products with up to 32 dimensions of the values, from `column` on, of rows from `start` on, token by token."""
    num_heads, dim = out_THd.shape[1:]
    unbiased, i = np.zeros(PANEL, np.float32), 0
    while i < count:
        token, head = (start + i) // group, g * group + (start + i) % group
        rows = min(count - i, (g + 1) * group - head)
        if column + PANEL <= dim:
            at = (token * num_heads + head) * dim + column
            put_rows(found, HEAD + i, rows, unbiased, 0, out_THd, at, dim)
        else:
            for j in range(rows):
                for k in range(column, dim):
                    out_THd[token, head + j, k] = round_like(
                        found[HEAD + i + j, k - column], out_THd[token, head + j, k]
                    )
        i += rows


@jit
def _attend(q_THd, k_NsGd, v_NsGd, tables_Bb, cu_queries, lengths_B, scale, out_THd):
    if len(lengths_B) > 0:
        attend_rows(q_THd, k_NsGd, v_NsGd, tables_Bb, cu_queries, lengths_B, scale, out_THd)


def attend(q_THd: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences) -> Tensor:
    """`kernels.attention.reference`."""
    out_THd = torch.empty_like(q_THd)
    q, k, v, out = (as_array(tensor) for tensor in (q_THd, k_cache, v_cache, out_THd))
    _attend(q, k, v, seqs.block_table.numpy(), seqs.cu_queries, seqs.lengths, q.shape[2] ** -0.5, out)
    return out_THd
