"""Loops over the rows of the running table, compiled: what is done thousands of times a step. `table` makes the arrays and says
what they mean.

Shape letters as in `block_loops`, and A admitted requests, N rows, S scheduled rows, R rows, B new entries of block tables, O
sampled tokens, V vocabulary.
"""

from typing import NamedTuple

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler.block_loops import (
    NOBODY,
    UNNAMED,
    drop_block,
    extend,
    find_block,
    first_seen,
    forget_name,
    make_room,
    name_block,
    share_block,
    take_block,
    upper_halves,
)

jit = compiler(__file__, sources="*_loops.py", _nrt=False)  # see block_loops


class Rows(NamedTuple):
    """What the loops need of the running table; see there."""

    block_size: int
    rank_N: np.ndarray
    occupied_N: np.ndarray
    running_N: np.ndarray
    draining_N: np.ndarray
    in_flight_N: np.ndarray
    num_known_N: np.ndarray
    num_tokens_N: np.ndarray
    num_computed_N: np.ndarray
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
def begin(caches, blocks, rows, row_A, parent_A, num_cached_A, tokens, token_offsets_A1, name_W2):
    """Give new rows the ends of their tokens, their names, and the blocks that they begin with: those of their parents, or those
    with their names."""
    size, name = rows.block_size, 0
    for i in range(len(row_A)):
        row, whole = row_A[i], (token_offsets_A1[i + 1] - token_offsets_A1[i]) // size
        behind = token_offsets_A1[i] + whole * size
        for j in range(token_offsets_A1[i + 1] - behind):
            rows.tail_Ns[row, j] = tokens[behind + j]
        if len(name_W2):
            for w in range(whole):
                rows.name_NW2[row, w, 0], rows.name_NW2[row, w, 1] = name_W2[name + w, 0], name_W2[name + w, 1]
            name += whole
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
def _name_row(caches, blocks, rows, row, whole):
    for group in range(len(caches.size_G)):
        names, owner = caches.names_G[group], group * blocks.num_ranks + rows.rank_N[row]
        for index in range(max(rows.num_named_N[row] // names, rows.num_dropped_GN[group, row]), whole // names):
            number, last = owner * blocks.num_blocks + rows.block_ids_GNW[group, row, index], (index + 1) * names - 1
            if blocks.block_B[number].chain == UNNAMED:
                name_block(blocks, owner, number, rows.name_NW2[row, last, 0], rows.name_NW2[row, last, 1])
    rows.num_named_N[row] = whole


@jit
def name_rows(caches, blocks, rows, row_S):
    """Name these rows' blocks that are whole, or will be when the steps in flight are done."""
    for row in row_S:
        known = min(rows.num_computed_N[row], rows.num_known_N[row])
        if known >= (rows.num_named_N[row] + 1) * rows.block_size:
            _name_row(caches, blocks, rows, row, known // rows.block_size)


@jit
def _give_back(blocks, rows, group, row, end):
    """Drop a row's blocks before `end`, the last one first."""
    owner = group * blocks.num_ranks + rows.rank_N[row]
    for index in range(end - 1, rows.num_dropped_GN[group, row] - 1, -1):
        drop_block(blocks, owner, owner * blocks.num_blocks + rows.block_ids_GNW[group, row, index])


@jit
def release(blocks, rows, row_R):
    """Drop all blocks of these rows."""
    make_room(blocks)
    for row in row_R[::-1]:
        for group in range(len(rows.num_blocks_GN)):
            _give_back(blocks, rows, group, row, rows.num_blocks_GN[group, row])
            rows.num_blocks_GN[group, row] = rows.num_dropped_GN[group, row] = rows.num_sent_GN[group, row] = 0


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


@jit
def want(rows, max_num_tokens, chunk_tokens, row_S, num_S, budget_P):
    """The rows to compute, tokens for each, and the budget that every rank has left: see `RunningTable.want`. How many rows."""
    per_rank, count = len(rows.rank_N) // len(budget_P), 0
    for rank in range(len(budget_P)):
        num_single, begin = 0, count
        for row in range(rank * per_rank, (rank + 1) * per_rank):
            if rows.running_N[row] and not rows.draining_N[row] and rows.num_tokens_N[row] < rows.limit_N[row]:
                num = rows.num_tokens_N[row] - rows.num_computed_N[row]
                assert num > 0, "nothing to compute in a running row"
                num_single += num == 1
                row_S[count], num_S[count] = row, num
                count += 1
        budget = max_num_tokens - num_single
        if num_single:
            budget = min(budget, chunk_tokens)
        assert budget >= 0, "over budget"
        end, count = count, begin
        for i in range(begin, end):
            num = num_S[i]
            if num > 1:
                num = min(num, budget)
                budget -= num
            if num:
                row_S[count], num_S[count] = row_S[i], num
                count += 1
        budget_P[rank] = budget
    return count


@jit
def _lacks(caches, rows, group, row, end):
    """Blocks that a row lacks to hold `end` tokens, with one for a shared block that it must copy."""
    lacking = -(-end // caches.size_G[group]) - rows.num_blocks_GN[group, row]
    return max(lacking, 0) + rows.shares_tail_N[row]


@jit
def lacking(caches, rows, row_S, num_S, lacking_GS, lacking_GP):
    """Blocks that each row lacks to compute `num_S` tokens more, and each rank."""
    for group in range(len(caches.size_G)):
        for i in range(len(row_S)):
            row = row_S[i]
            lacking_GS[group, i] = _lacks(caches, rows, group, row, rows.num_computed_N[row] + num_S[i])
            lacking_GP[group, rows.rank_N[row]] += lacking_GS[group, i]


@jit
def promised(caches, rows, promised_GP):
    """Add up the blocks that the running requests will still take for the tokens that they have."""
    for row in range(len(rows.rank_N)):
        if rows.running_N[row] and rows.num_tokens_N[row] > rows.num_computed_N[row]:
            for group in range(len(caches.size_G)):
                held = rows.num_blocks_GN[group, row] - rows.num_dropped_GN[group, row]
                lacks = _lacks(caches, rows, group, row, rows.num_tokens_N[row])
                promised_GP[group, rows.rank_N[row]] += min(lacks, caches.most_G[group] - held + 1)


@jit
def count_new(caches, rows, row_S, num_S):
    """How many entries of block tables `schedule` will report."""
    count = 0
    for i in range(len(row_S)):
        row, end = row_S[i], rows.num_computed_N[row_S[i]] + num_S[i]
        for group in range(len(caches.size_G)):
            num_blocks = max(-(-end // caches.size_G[group]), rows.num_blocks_GN[group, row])
            count += num_blocks - rows.num_sent_GN[group, row]
    return count


@jit
def _grow(caches, blocks, rows, row, end, taken_B, num_taken, new_row_B, new_cache_B, new_index_B, new_id_B, n):
    """Give a row the blocks to hold `end` tokens, and write down what its rank does not know of: the two counts, gone on."""
    for group in range(len(caches.size_G)):
        owner = group * blocks.num_ranks + rows.rank_N[row]
        for index in range(rows.num_blocks_GN[group, row], -(-end // caches.size_G[group])):
            number = take_block(blocks, owner)
            taken_B[num_taken] = number
            num_taken += 1
            rows.block_ids_GNW[group, row, index] = number - owner * blocks.num_blocks
            rows.num_blocks_GN[group, row] = index + 1
        for index in range(rows.num_sent_GN[group, row], rows.num_blocks_GN[group, row]):
            new_row_B[n], new_cache_B[n], new_index_B[n] = row, group, index
            new_id_B[n] = rows.block_ids_GNW[group, row, index]
            n += 1
        rows.num_sent_GN[group, row] = rows.num_blocks_GN[group, row]
    return num_taken, n


@jit
def schedule(
    caches, blocks, rows, row_S, num_S, start_S, sample_S, new_row_B, new_cache_B, new_index_B, new_id_B, taken_B
):
    """Let these rows, ascending, compute `num_S` tokens more: where each starts, whether it then samples, and what is new in
    the block tables. `taken_B` is for its own use."""
    n, num_taken = 0, 0
    for i in range(len(row_S)):
        row = row_S[i]
        start = rows.num_computed_N[row]
        end = start + num_S[i]
        grows = False
        for group in range(len(caches.size_G)):
            grows |= rows.num_sent_GN[group, row] * caches.size_G[group] < end
            grows |= rows.num_sent_GN[group, row] < rows.num_blocks_GN[group, row]
        if grows:
            num_taken, n = _grow(
                caches, blocks, rows, row, end, taken_B, num_taken, new_row_B, new_cache_B, new_index_B, new_id_B, n
            )
        start_S[i], sample_S[i] = start, end == rows.num_tokens_N[row]
        rows.num_computed_N[row] = end
        rows.num_tokens_N[row] += sample_S[i]
        rows.in_flight_N[row] += 1
    for i in range(num_taken):
        forget_name(blocks, taken_B[i])
    assert n == len(new_row_B), "new blocks were counted wrong"


@jit
def settle(rows, row_S, order_S, going_N):
    """A step is done: which of its rows still belong to the requests that it was planned for, and run."""
    for i in range(len(row_S)):
        row = row_S[i]
        if rows.running_N[row] and rows.order_N[row] == order_S[i]:
            going_N[row] = True
            rows.in_flight_N[row] -= 1


@jit
def finish(rows, eos_ids, may_stop_V, row_O, token_O, ask, finish_O, stop, length):
    """Why each row ends with this token of it: `stop`, `length`, 0, or `ask` if it is perhaps one of the row's own stop ids."""
    for i in range(len(row_O)):
        row, token = row_O[i], token_O[i]
        finish_O[i] = length if rows.num_known_N[row] >= rows.limit_N[row] else 0
        if rows.num_known_N[row] >= rows.stop_from_N[row]:
            if rows.has_stop_ids_N[row] and may_stop_V[token]:
                finish_O[i] = ask
            if rows.eos_stops_N[row]:
                for j in range(len(eos_ids)):
                    if token == eos_ids[j]:
                        finish_O[i] = stop


@jit
def _append_block(rows, factors_W4s, row, block):
    """A row's tail is a whole block now."""
    size = rows.block_size
    for j in range(size):
        rows.tokens_NL[row, block * size + j] = rows.tail_Ns[row, j]
    if len(factors_W4s):
        extend(factors_W4s, block, rows.tokens_NL[row], block * size, rows.sum_N4, row)
        rows.name_NW2[row, block, 0], rows.name_NW2[row, block, 1] = upper_halves(rows.sum_N4, row)


@jit
def append_tokens(rows, factors_W4s, row_O, token_O):
    """One more token of each row is known; whole blocks of them get their names, if there are any factors."""
    for i in range(len(row_O)):
        row = row_O[i]
        block = rows.num_known_N[row] // rows.block_size
        within = rows.num_known_N[row] - block * rows.block_size
        rows.tail_Ns[row, within] = token_O[i]
        rows.num_known_N[row] += 1
        if within == rows.block_size - 1:
            _append_block(rows, factors_W4s, row, block)
