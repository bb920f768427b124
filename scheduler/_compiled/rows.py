"""Loops over the rows of the running table, compiled: how requests come and go, and what of their blocks is named and dropped.
`table` makes the arrays and says what they mean; the loops of a step are in `step_loops`.

Shape letters as in `block_loops`, and A admitted requests, N rows, S scheduled rows, R rows.
"""

from typing import NamedTuple

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import (
    NOBODY,
    UNNAMED,
    drop_block,
    fetch_name,
    find_block,
    first_seen,
    make_room,
    name_block,
    prefetch,
    share_block,
)

jit = compiler(__file__, _nrt=False)  # see blocks


# What the loops of a step read and write of a row: together, in half a cache line, as memory is what they wait for.
ROW = np.dtype(
    [
        ("num_known", np.int32),  # the prompt's and the sampled tokens
        ("num_tail", np.int32),  # of them, those behind the last whole block
        ("num_tokens", np.int32),
        ("num_computed", np.int32),
        ("num_held", np.int32),  # tokens for which it has blocks that its rank knows of, in every cache
        ("num_named", np.int32),  # blocks
        ("limit", np.int32),  # of num_known
        ("in_flight", np.int32),  # steps
    ]
)

# What else there is to know of the request in a row.
FIXED = np.dtype(
    [
        ("key", np.int64),
        ("first_step", np.int64),  # since it was admitted
        ("rank", np.int32),
        ("num_cached", np.int32),  # prompt tokens found in the cache when first admitted
        ("stop_from", np.int32),  # stop and end-of-sequence ids count from this num_known on
        ("eos_stops", np.bool_),
        ("has_stop_ids", np.bool_),
        ("reserved", np.int8, 2),
    ]
)

# A row's blocks are those at [num_dropped, num_blocks) of its table: a window's first ones are given back. Its rank knows of
# those before num_sent.
BLOCK_TABLE = np.dtype(
    [("num_blocks", np.int32), ("num_dropped", np.int32), ("num_sent", np.int32), ("reserved", np.int32)]
)


class Rows(NamedTuple):
    """What the loops need of the running table; see there."""

    block_size: int
    per_rank: int
    occupied_N: np.ndarray
    running_N: np.ndarray
    draining_N: np.ndarray
    row_N: np.ndarray  # ROW
    fixed_N: np.ndarray  # FIXED
    table_GN: np.ndarray  # BLOCK_TABLE
    block_ids_GNW: np.ndarray
    tail_Ns: np.ndarray
    tokens_NL: np.ndarray
    name_NW2: np.ndarray
    sum_N4: np.ndarray


@jit
def begin(caches, blocks, rows, row_A, parent_A, num_cached_A, fact_A, tokens, token_offsets_A1, first_A, name_W2):
    """Give new rows the facts of their requests, the ends of their tokens, their names, each request's followed by its sum, and
    the blocks that they begin with: those of their parents, or those with their names."""
    size = rows.block_size
    for i in range(len(row_A)):
        row, num_tokens = row_A[i], token_offsets_A1[i + 1] - token_offsets_A1[i]
        whole = num_tokens // size
        behind = token_offsets_A1[i] + whole * size
        state, fixed, fact = rows.row_N[row], rows.fixed_N[row], fact_A[i]
        rows.occupied_N[row] = rows.running_N[row] = True
        fixed.key, state.limit, fixed.stop_from = fact.key, fact.limit, fact.stop_from
        fixed.eos_stops, fixed.has_stop_ids, fixed.num_cached = fact.eos_stops, fact.has_stop_ids, fact.num_cached
        state.num_known = state.num_tokens = num_tokens
        state.num_computed, state.num_named = num_cached_A[i], num_cached_A[i] // size
        state.num_tail = token_offsets_A1[i + 1] - behind
        for j in range(state.num_tail):
            rows.tail_Ns[row, j] = tokens[behind + j]
        if len(name_W2):
            first, end = first_A[i], first_A[i] + whole
            for w in range(whole):
                rows.name_NW2[row, w, 0], rows.name_NW2[row, w, 1] = name_W2[first + w, 0], name_W2[first + w, 1]
            rows.sum_N4[row, 0], rows.sum_N4[row, 1] = name_W2[end, 0], name_W2[end, 1]
            rows.sum_N4[row, 2], rows.sum_N4[row, 3] = name_W2[end + 1, 0], name_W2[end + 1, 1]
        if parent_A[i] >= 0:
            _share_row(caches, blocks, rows, row, parent_A[i], num_cached_A[i])
        elif num_cached_A[i] > 0:
            _share_prefix(caches, blocks, rows, row, num_cached_A[i] // size)


@jit
def _share_prefix(caches, blocks, rows, row, depth):
    """Begin an empty row with the blocks of its first `depth` names, which its rank has."""
    for group in range(len(caches.size_G)):
        names, owner = caches.names_G[group], group * blocks.num_ranks + rows.fixed_N[row].rank
        first = first_seen(caches, group, depth * rows.block_size)
        for index in range(first, depth // names):
            last = (index + 1) * names - 1
            number = find_block(blocks, owner, rows.name_NW2[row, last, 0], rows.name_NW2[row, last, 1])
            assert number != NOBODY, "a block that was found is gone"
            share_block(blocks, owner, number)
            rows.block_ids_GNW[group, row, index] = number - owner * blocks.num_blocks
        table = rows.table_GN[group, row]
        table.num_dropped = table.num_sent = first
        table.num_blocks = depth // names


@jit
def _share_row(caches, blocks, rows, row, parent, num_cached):
    """Begin an empty row with the blocks of another one's first tokens."""
    for group in range(len(caches.size_G)):
        owner, first = group * blocks.num_ranks + rows.fixed_N[row].rank, rows.table_GN[group, parent].num_dropped
        end = -(-num_cached // caches.size_G[group])
        for index in range(first, end):
            block = rows.block_ids_GNW[group, parent, index]
            share_block(blocks, owner, owner * blocks.num_blocks + block)
            rows.block_ids_GNW[group, row, index] = block
        table = rows.table_GN[group, row]
        table.num_dropped = table.num_sent = first
        table.num_blocks = end


@jit
def _unnamed(caches, rows, group, row, whole):
    """Which of a row's first `whole` blocks' worth of tokens have blocks still to be named: the blocks' indices."""
    names = caches.names_G[group]
    return range(max(rows.row_N[row].num_named // names, rows.table_GN[group, row].num_dropped), whole // names)


@jit
def _fetch_row(caches, blocks, rows, row, whole):
    """What `_name_row` will touch."""
    for group in range(len(caches.size_G)):
        names, owner = caches.names_G[group], group * blocks.num_ranks + rows.fixed_N[row].rank
        ids_W, name_W2 = rows.block_ids_GNW[group, row], rows.name_NW2[row]
        for index in _unnamed(caches, rows, group, row, whole):
            last = (index + 1) * names - 1
            prefetch(blocks.block_B, (owner * blocks.num_blocks + ids_W[index],))
            fetch_name(blocks, owner, name_W2[last, 0], name_W2[last, 1])


@jit
def _name_row(caches, blocks, rows, row, whole):
    for group in range(len(caches.size_G)):
        names, owner = caches.names_G[group], group * blocks.num_ranks + rows.fixed_N[row].rank
        ids_W, name_W2 = rows.block_ids_GNW[group, row], rows.name_NW2[row]
        for index in _unnamed(caches, rows, group, row, whole):
            number, last = owner * blocks.num_blocks + ids_W[index], (index + 1) * names - 1
            if blocks.block_B[number].chain == UNNAMED:
                name_block(blocks, owner, number, name_W2[last, 0], name_W2[last, 1])
    rows.row_N[row].num_named = whole


@jit
def _num_whole(rows, row):
    """How many blocks' worth of a row's tokens are known, and computed when the steps in flight are done."""
    return min(rows.row_N[row].num_computed, rows.row_N[row].num_known) // rows.block_size


@jit
def name_rows(caches, blocks, rows, row_S):
    """Name these rows' blocks that are whole, or will be when the steps in flight are done."""
    for row in row_S:
        _fetch_row(caches, blocks, rows, row, _num_whole(rows, row))
    for row in row_S:
        _name_row(caches, blocks, rows, row, _num_whole(rows, row))


@jit
def _give_back(blocks, rows, group, row, end):
    """Drop a row's blocks before `end`, the last one first."""
    owner = group * blocks.num_ranks + rows.fixed_N[row].rank
    for index in range(end - 1, rows.table_GN[group, row].num_dropped - 1, -1):
        drop_block(blocks, owner, owner * blocks.num_blocks + rows.block_ids_GNW[group, row, index])


@jit
def _fetch_blocks(blocks, rows, group, row):
    owner = group * blocks.num_ranks + rows.fixed_N[row].rank
    for index in range(rows.table_GN[group, row].num_dropped, rows.table_GN[group, row].num_blocks):
        prefetch(blocks.block_B, (owner * blocks.num_blocks + rows.block_ids_GNW[group, row, index],))


@jit
def release(caches, blocks, rows, naming, row_R):
    """Empty these rows and drop all their blocks; if `naming`, the whole ones get names first."""
    if naming:
        name_rows(caches, blocks, rows, row_R)
    make_room(blocks)
    for row in row_R:
        for group in range(len(caches.size_G)):
            _fetch_blocks(blocks, rows, group, row)
    for row in row_R[::-1]:
        for group in range(len(caches.size_G)):
            table = rows.table_GN[group, row]
            _give_back(blocks, rows, group, row, table.num_blocks)
            table.num_blocks = table.num_dropped = table.num_sent = 0
        rows.occupied_N[row] = rows.running_N[row] = rows.draining_N[row] = False
        rows.row_N[row].in_flight = rows.row_N[row].num_held = 0


@jit
def drop_unseen(caches, blocks, rows, row_S):
    """Drop what lies before the rows' windows."""
    make_room(blocks)
    for row in row_S[::-1]:
        for group in range(len(caches.size_G)):
            table = rows.table_GN[group, row]
            first = min(first_seen(caches, group, rows.row_N[row].num_computed), table.num_blocks)
            if first > table.num_dropped:
                _give_back(blocks, rows, group, row, first)
                table.num_dropped = first
