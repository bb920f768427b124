"""Loops over the rows of the running table, compiled: how requests come and go, and what of their blocks is named and dropped.
`table` makes the arrays and says what they mean; the loops of a step are in `step_loops`.

Shape letters as in `block_loops`, and A admitted requests, N rows, S scheduled rows, R rows.
"""

from typing import NamedTuple

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler.block_loops import (
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

jit = compiler(__file__, sources="*_loops.py", _nrt=False)  # see block_loops


class Rows(NamedTuple):
    """What the loops need of the running table; see there."""

    block_size: int
    rank_N: np.ndarray
    slot_N: np.ndarray
    occupied_N: np.ndarray
    running_N: np.ndarray
    draining_N: np.ndarray
    in_flight_N: np.ndarray
    num_known_N: np.ndarray
    num_tokens_N: np.ndarray
    num_computed_N: np.ndarray
    key_N: np.ndarray
    priority_N: np.ndarray
    num_cached_N: np.ndarray
    limit_N: np.ndarray
    stop_from_N: np.ndarray
    eos_stops_N: np.ndarray
    has_stop_ids_N: np.ndarray
    order_N: np.ndarray
    shares_tail_N: np.ndarray
    num_named_N: np.ndarray
    num_blocks_GN: np.ndarray
    num_dropped_GN: np.ndarray
    num_sent_GN: np.ndarray
    block_ids_GNW: np.ndarray
    tail_Ns: np.ndarray
    tokens_NL: np.ndarray
    name_NW2: np.ndarray
    sum_N4: np.ndarray


@jit
def begin(caches, blocks, rows, row_A, parent_A, num_cached_A, fact_A, tokens, token_offsets_A1, name_W2):
    """Give new rows the facts of their requests, the ends of their tokens, their names, each request's followed by its sum, and
    the blocks that they begin with: those of their parents, or those with their names."""
    size, name = rows.block_size, 0
    for i in range(len(row_A)):
        row, num_tokens = row_A[i], token_offsets_A1[i + 1] - token_offsets_A1[i]
        whole = num_tokens // size
        behind = token_offsets_A1[i] + whole * size
        rows.occupied_N[row] = rows.running_N[row] = True
        rows.key_N[row], rows.order_N[row] = fact_A[i].key, fact_A[i].order
        rows.priority_N[row], rows.limit_N[row] = fact_A[i].priority, fact_A[i].limit
        rows.stop_from_N[row], rows.eos_stops_N[row] = fact_A[i].stop_from, fact_A[i].eos_stops
        rows.has_stop_ids_N[row], rows.num_cached_N[row] = fact_A[i].has_stop_ids, fact_A[i].num_cached
        rows.num_known_N[row] = rows.num_tokens_N[row] = num_tokens
        rows.num_computed_N[row], rows.num_named_N[row] = num_cached_A[i], num_cached_A[i] // size
        for group in range(len(caches.size_G)):
            rows.shares_tail_N[row] |= num_cached_A[i] % caches.size_G[group] > 0
        for j in range(token_offsets_A1[i + 1] - behind):
            rows.tail_Ns[row, j] = tokens[behind + j]
        if len(name_W2):
            for w in range(whole):
                rows.name_NW2[row, w, 0], rows.name_NW2[row, w, 1] = name_W2[name + w, 0], name_W2[name + w, 1]
            name += whole + 2
            rows.sum_N4[row, 0], rows.sum_N4[row, 1] = name_W2[name - 2, 0], name_W2[name - 2, 1]
            rows.sum_N4[row, 2], rows.sum_N4[row, 3] = name_W2[name - 1, 0], name_W2[name - 1, 1]
        if parent_A[i] >= 0:
            _share_row(caches, blocks, rows, row, parent_A[i], num_cached_A[i])
        elif num_cached_A[i] > 0:
            _share_prefix(caches, blocks, rows, row, num_cached_A[i] // size)


@jit
def _share_prefix(caches, blocks, rows, row, depth):
    """Begin an empty row with the blocks of its first `depth` names, which its rank has."""
    for group in range(len(caches.size_G)):
        names, owner = caches.names_G[group], group * blocks.num_ranks + rows.rank_N[row]
        first = first_seen(caches, group, depth * rows.block_size)
        for index in range(first, depth // names):
            last = (index + 1) * names - 1
            number = find_block(blocks, owner, rows.name_NW2[row, last, 0], rows.name_NW2[row, last, 1])
            assert number != NOBODY, "a block that was found is gone"
            share_block(blocks, owner, number)
            rows.block_ids_GNW[group, row, index] = number - owner * blocks.num_blocks
        rows.num_dropped_GN[group, row] = rows.num_sent_GN[group, row] = first
        rows.num_blocks_GN[group, row] = depth // names


@jit
def _share_row(caches, blocks, rows, row, parent, num_cached):
    """Begin an empty row with the blocks of another one's first tokens."""
    for group in range(len(caches.size_G)):
        owner, first = group * blocks.num_ranks + rows.rank_N[row], rows.num_dropped_GN[group, parent]
        end = -(-num_cached // caches.size_G[group])
        for index in range(first, end):
            block = rows.block_ids_GNW[group, parent, index]
            share_block(blocks, owner, owner * blocks.num_blocks + block)
            rows.block_ids_GNW[group, row, index] = block
        rows.num_dropped_GN[group, row] = rows.num_sent_GN[group, row] = first
        rows.num_blocks_GN[group, row] = end


@jit
def _unnamed(caches, rows, group, row, whole):
    """Which of a row's first `whole` blocks' worth of tokens have blocks still to be named: the blocks' indices."""
    names = caches.names_G[group]
    return range(max(rows.num_named_N[row] // names, rows.num_dropped_GN[group, row]), whole // names)


@jit
def _fetch_row(caches, blocks, rows, row, whole):
    """What `_name_row` will touch."""
    for group in range(len(caches.size_G)):
        names, owner = caches.names_G[group], group * blocks.num_ranks + rows.rank_N[row]
        for index in _unnamed(caches, rows, group, row, whole):
            last = (index + 1) * names - 1
            prefetch(blocks.block_B, (owner * blocks.num_blocks + rows.block_ids_GNW[group, row, index],))
            fetch_name(blocks, owner, rows.name_NW2[row, last, 0], rows.name_NW2[row, last, 1])


@jit
def _name_row(caches, blocks, rows, row, whole):
    for group in range(len(caches.size_G)):
        names, owner = caches.names_G[group], group * blocks.num_ranks + rows.rank_N[row]
        for index in _unnamed(caches, rows, group, row, whole):
            number, last = owner * blocks.num_blocks + rows.block_ids_GNW[group, row, index], (index + 1) * names - 1
            if blocks.block_B[number].chain == UNNAMED:
                name_block(blocks, owner, number, rows.name_NW2[row, last, 0], rows.name_NW2[row, last, 1])
    rows.num_named_N[row] = whole


@jit
def _num_whole(rows, row):
    """How many blocks' worth of a row's tokens are known, and computed when the steps in flight are done."""
    return min(rows.num_computed_N[row], rows.num_known_N[row]) // rows.block_size


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
    owner = group * blocks.num_ranks + rows.rank_N[row]
    for index in range(end - 1, rows.num_dropped_GN[group, row] - 1, -1):
        drop_block(blocks, owner, owner * blocks.num_blocks + rows.block_ids_GNW[group, row, index])


@jit
def _fetch_blocks(blocks, rows, group, row):
    owner = group * blocks.num_ranks + rows.rank_N[row]
    for index in range(rows.num_dropped_GN[group, row], rows.num_blocks_GN[group, row]):
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
            _give_back(blocks, rows, group, row, rows.num_blocks_GN[group, row])
            rows.num_blocks_GN[group, row] = rows.num_dropped_GN[group, row] = rows.num_sent_GN[group, row] = 0
        rows.occupied_N[row] = rows.running_N[row] = rows.draining_N[row] = rows.shares_tail_N[row] = False
        rows.in_flight_N[row] = 0


@jit
def drop_unseen(caches, blocks, rows, row_S):
    """Drop what lies before the rows' windows."""
    make_room(blocks)
    for row in row_S[::-1]:
        for group in range(len(caches.size_G)):
            first = first_seen(caches, group, rows.num_computed_N[row])
            first = min(first, rows.num_blocks_GN[group, row])
            if first > rows.num_dropped_GN[group, row]:
                _give_back(blocks, rows, group, row, first)
                rows.num_dropped_GN[group, row] = first
