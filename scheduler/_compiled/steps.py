"""The loops of a step over the rows of the running table, compiled: what the rows want and lack, what is scheduled of them, and
what was sampled.

Shape letters as in `row_loops`, and P ranks, B new entries of block tables, O sampled tokens, V vocabulary.
"""

from typing import NamedTuple, Self

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import (
    NOBODY,
    extend,
    fetch_bucket,
    fetch_chain,
    fetch_free,
    forget_name,
    prefetch,
    take_block,
    upper_halves,
)
from expertwire.scheduler._compiled.rows import name_rows

jit = compiler(__file__, _nrt=False)  # see blocks

ASK = 255  # a reason to end, perhaps; the others are `plan.FinishReason`s
_STOP, _LENGTH = 1, 2
_SAMPLED, _GOING = 1, 2  # marks of rows
_MANY = 2**31 - 1  # tokens
_AHEAD = 8  # how many blocks before its turn one is fetched


class Scheduled(NamedTuple):
    """What a step computes in which slots, rank by rank, ascending, and what is new in their block tables, in the same order. And
    where each rank's part of both begins. All are i32 but one."""

    offsets_P1: np.ndarray
    slot_S: np.ndarray
    start_S: np.ndarray  # tokens computed before
    num_S: np.ndarray
    sample_S: np.ndarray  # u8, whether it then samples
    tokens_P1: np.ndarray  # where each rank's tokens would begin
    block_offsets_P1: np.ndarray
    block_4B: np.ndarray  # new entries: slot, cache, index in the block table, block

    @classmethod
    def empty(cls, num_ranks: int, num_rows: int, num_blocks: int) -> Self:
        """To be filled in."""
        offsets_P1, tokens_P1, block_offsets_P1 = np.zeros((3, num_ranks + 1), np.int32)
        ints_S, sample_S = np.empty((3, num_rows), np.int32), np.empty(num_rows, np.uint8)
        return cls(offsets_P1, *ints_S, sample_S, tokens_P1, block_offsets_P1, np.empty((4, num_blocks), np.int32))


class Sampled(NamedTuple):
    """Sampled tokens, rank by rank."""

    slot_O: np.ndarray  # i32, as the rest but one
    token_O: np.ndarray
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray


class Known(NamedTuple):
    """Those that belong to requests that run on, with what there is to say of them."""

    at_O: np.ndarray  # i32, which of the sampled ones
    row_O: np.ndarray  # i32
    key_O: np.ndarray  # i64
    token_O: np.ndarray  # i32
    finish_O: np.ndarray  # u8: why the request ends, 0, or `ASK` if this is perhaps one of its stop ids
    num_cached_O: np.ndarray  # i32
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray  # i32

    @classmethod
    def empty(cls, count: int) -> Self:
        """To be filled in."""
        kinds = np.int32, np.int32, np.int64, np.int32, np.uint8, np.int32, np.float32, np.int32
        return cls(*(np.empty(count, kind) for kind in kinds))


@jit
def want(caches, rows, max_num_batched_tokens, chunked_prefill_size, row_S, num_S, budget_P, lacking_GP):
    """The rows to compute, tokens for each, the budget that every rank has left, and the blocks that it lacks for them: see
    `RunningTable.want`. How many rows."""
    count = 0
    for rank in range(len(budget_P)):
        num_single, begin = 0, count
        for at in range(rank * rows.per_rank, (rank + 1) * rows.per_rank):
            row = rows.row_N[at]
            if rows.running_N[at] and not rows.draining_N[at] and row.num_tokens < row.limit:
                num = row.num_tokens - row.num_computed
                assert num > 0, "nothing to compute in a running row"
                num_single += num == 1
                row_S[count], num_S[count] = at, num
                count += 1
        budget = max_num_batched_tokens - num_single
        if num_single:
            budget = min(budget, chunked_prefill_size)
        assert budget >= 0, "over budget"
        if num_single < count - begin:
            count, budget = _cut(row_S, num_S, begin, count, budget)
        budget_P[rank] = budget
        for i in range(begin, count):
            end = rows.row_N[row_S[i]].num_computed + num_S[i]
            if end > rows.row_N[row_S[i]].num_held:
                for group in range(len(caches.size_G)):
                    lacking_GP[group, rank] += _lacks(caches, rows, group, row_S[i], end)
    return count


@jit
def _cut(row_S, num_S, begin, end, budget):
    """Cut the tokens of a rank's rows to the budget that is left for those that want more than one, and leave out rows without
    any: where its rows end, and what is left then."""
    count = begin
    for i in range(begin, end):
        num = num_S[i]
        if num > 1:
            num = min(num, budget)
            budget -= num
        if num:
            row_S[count], num_S[count] = row_S[i], num
            count += 1
    return count, budget


@jit
def _lacks(caches, rows, group, row, end):
    """Blocks that a row lacks to hold `end` tokens."""
    return max(-(-end // caches.size_G[group]) - rows.table_GN[group, row].num_blocks, 0)


@jit
def lacking(caches, rows, row_S, num_S, lacking_GS):
    """Blocks that each row lacks to compute `num_S` tokens more."""
    for group in range(len(caches.size_G)):
        for i in range(len(row_S)):
            end = rows.row_N[row_S[i]].num_computed + num_S[i]
            lacking_GS[group, i] = _lacks(caches, rows, group, row_S[i], end)


@jit
def promised(caches, rows, group, row):
    """How many blocks a running row will still take for the tokens that it has."""
    held = rows.table_GN[group, row].num_blocks - rows.table_GN[group, row].num_dropped
    return min(_lacks(caches, rows, group, row, rows.row_N[row].num_tokens), caches.most_G[group] - held + 1)


@jit
def count_new(caches, rows, row_S, num_S):
    """How many entries of block tables `schedule` will report of new rows."""
    count = 0
    for i in range(len(row_S)):
        end = rows.row_N[row_S[i]].num_computed + num_S[i]
        for group in range(len(caches.size_G)):
            table = rows.table_GN[group, row_S[i]]
            count += max(-(-end // caches.size_G[group]), table.num_blocks) - table.num_sent
    return count


@jit
def _fetch_table(caches, rows, row, end):
    """What giving a row blocks will touch of its block tables."""
    for group in range(len(caches.size_G)):
        prefetch(rows.table_GN, (group, row))
        prefetch(rows.block_ids_GNW, (group, row, (end - 1) // caches.size_G[group]))


@jit
def _grow(caches, blocks, rows, row, taken_B, num_taken, step, n):
    """Give a row the blocks to hold what it has computed, and write down what its rank does not know of: the two counts, gone
    on."""
    rank, num_held = rows.fixed_N[row].rank, _MANY
    for group in range(len(caches.size_G)):
        owner, table = group * blocks.num_ranks + rank, rows.table_GN[group, row]
        for index in range(table.num_blocks, -(-rows.row_N[row].num_computed // caches.size_G[group])):
            number = take_block(blocks, owner)
            taken_B[num_taken] = number
            num_taken += 1
            rows.block_ids_GNW[group, row, index] = number - owner * blocks.num_blocks
            table.num_blocks = index + 1
        for index in range(table.num_sent, table.num_blocks):
            assert n < step.block_4B.shape[1], "new blocks were counted wrong"
            step.block_4B[0, n], step.block_4B[1, n] = row - rank * rows.per_rank, group
            step.block_4B[2, n], step.block_4B[3, n] = index, rows.block_ids_GNW[group, row, index]
            n += 1
        table.num_sent = table.num_blocks
        num_held = min(num_held, table.num_blocks * caches.size_G[group])
    rows.row_N[row].num_held = num_held
    return num_taken, n


@jit
def _fetch_free(caches, blocks, rows, row_S):
    """The free blocks that these rows will take."""
    for group in range(len(caches.size_G)):
        rank, ahead = np.int32(NOBODY), 0
        for row in row_S:
            if rows.fixed_N[row].rank != rank:
                rank, ahead = rows.fixed_N[row].rank, 0
            num = _lacks(caches, rows, group, row, rows.row_N[row].num_computed)
            fetch_free(blocks, group * blocks.num_ranks + rank, ahead, num)
            ahead += num


@jit
def _grow_all(caches, blocks, rows, row_S, taken_B, step):
    """`_grow` these rows, ascending, and say where each rank's new entries begin: the two counts."""
    _fetch_free(caches, blocks, rows, row_S)
    i, num_taken, n = 0, 0, 0
    for rank in range(len(step.block_offsets_P1) - 1):
        while i < len(row_S) and row_S[i] < (rank + 1) * rows.per_rank:
            num_taken, n = _grow(caches, blocks, rows, row_S[i], taken_B, num_taken, step, n)
            i += 1
        step.block_offsets_P1[rank + 1] = n
    return num_taken, n


@jit
def schedule(caches, blocks, rows, naming, number, row_R, num_R, row_A, num_A, step, taken_B, grows_S, due_S):
    """Let two lists of rows, each ascending, compute `num_R` and `num_A` tokens more, the second for the first time, and fill in
    the `Scheduled` step, which has this number: how many entries of block tables are new. If `naming`, blocks that are whole then
    get their names. `taken_B`, `grows_S` and `due_S` are for its own use."""
    i, num_growing, num_due, num_tokens, r, a = 0, 0, 0, 0, 0, 0
    for row in row_A:
        rows.fixed_N[row].first_step = number
    for rank in range(len(step.offsets_P1) - 1):
        first, last = rank * rows.per_rank, (rank + 1) * rows.per_rank
        while True:
            row, num = last, 0
            if r < len(row_R) and row_R[r] < row:
                row, num = row_R[r], num_R[r]
            if a < len(row_A) and row_A[a] < row:
                row, num = row_A[a], num_A[a]
                a += 1
            elif row < last:
                r += 1
            else:
                break
            state = rows.row_N[row]
            end = state.num_computed + num
            step.slot_S[i], step.start_S[i], step.num_S[i] = row - first, state.num_computed, num
            samples = end == state.num_tokens
            step.sample_S[i] = samples
            state.num_computed = end
            state.num_tokens += samples
            state.in_flight += 1
            if end > state.num_held:
                _fetch_table(caches, rows, row, end)
                grows_S[num_growing] = row
                num_growing += 1
            if min(end, state.num_known) >= (state.num_named + 1) * rows.block_size:
                prefetch(rows.name_NW2, (row, state.num_named, 0))
                due_S[num_due] = row
                num_due += 1
            num_tokens += num
            i += 1
        step.offsets_P1[rank + 1], step.tokens_P1[rank + 1] = i, num_tokens
    num_taken, n = _grow_all(caches, blocks, rows, grows_S[:num_growing], taken_B, step)
    for b in range(num_taken):
        if b + 2 * _AHEAD < num_taken:
            fetch_bucket(blocks, taken_B[b + 2 * _AHEAD])
        if b + _AHEAD < num_taken:
            fetch_chain(blocks, taken_B[b + _AHEAD])
        forget_name(blocks, taken_B[b])
    if naming:
        name_rows(caches, blocks, rows, due_S[:num_due])
    return n


@jit
def _mark(rows, number, step, mark_N):
    """Step `number` is done: mark which of its rows sampled, and which still belong to the requests that it was planned for, and
    run. How many sampled."""
    num_sampled = 0
    for rank in range(len(step.offsets_P1) - 1):
        for i in range(step.offsets_P1[rank], step.offsets_P1[rank + 1]):
            at, mark = rank * rows.per_rank + step.slot_S[i], 0
            if step.sample_S[i]:
                num_sampled += 1
                mark = _SAMPLED
            if rows.running_N[at] and rows.fixed_N[at].first_step <= number:
                mark |= _GOING
                rows.row_N[at].in_flight -= 1
            mark_N[at] = mark
    return num_sampled


@jit(inline="always")
def _reason(row, fixed, eos_ids, may_stop_V, token):
    """Why a row ends with this token, its last one."""
    reason = _LENGTH if row.num_known >= row.limit else 0
    if row.num_known >= fixed.stop_from:
        if fixed.has_stop_ids and may_stop_V[token]:
            reason = ASK
        if fixed.eos_stops:
            for j in range(len(eos_ids)):
                if token == eos_ids[j]:
                    reason = _STOP
    return reason


@jit
def take_in(rows, factors_W4s, eos_ids, may_stop_V, number, step, offsets_P1, sampled, mark_N, known, whole_O):
    """Step `number` is done, with the tokens that each rank has sampled: which are `known` now, as their requests run on, and how
    many. -1: others were sampled than should have been. Whole blocks of tokens get their names, if there are any factors.
    `mark_N`, zeros, is true in the end where a request of the step runs on. `whole_O` is for its own use."""
    size, count, num_whole = rows.block_size, 0, 0
    if _mark(rows, number, step, mark_N) != len(sampled.slot_O):
        return -1
    for rank in range(len(offsets_P1) - 1):
        for o in range(offsets_P1[rank], offsets_P1[rank + 1]):
            slot = sampled.slot_O[o]
            at = rank * rows.per_rank + slot
            if not 0 <= slot < rows.per_rank or not mark_N[at] & _SAMPLED:
                return -1
            mark_N[at] &= ~_SAMPLED
            if not mark_N[at]:
                continue
            row, fixed, token = rows.row_N[at], rows.fixed_N[at], sampled.token_O[o]
            rows.tail_Ns[at, row.num_tail] = token
            row.num_known += 1
            row.num_tail += 1
            if row.num_tail == size:
                row.num_tail = 0
                prefetch(rows.tokens_NL, (at, row.num_known - 1))
                prefetch(rows.name_NW2, (at, row.num_known // size - 1, 0))
                prefetch(rows.sum_N4, (at, 0))
                whole_O[num_whole] = at
                num_whole += 1
            known.at_O[count], known.row_O[count] = o, at
            known.key_O[count], known.token_O[count] = fixed.key, token
            known.finish_O[count] = _reason(row, fixed, eos_ids, may_stop_V, token)
            known.num_cached_O[count] = fixed.num_cached
            known.logprob_O[count], known.token_rank_O[count] = sampled.logprob_O[o], sampled.token_rank_O[o]
            count += 1
    for at in whole_O[:num_whole]:
        _append_block(rows, factors_W4s, at)
    return count


@jit
def _append_block(rows, factors_W4s, row):
    """A row's tail is a whole block now."""
    size = rows.block_size
    block = rows.row_N[row].num_known // size - 1
    for j in range(size):
        rows.tokens_NL[row, block * size + j] = rows.tail_Ns[row, j]
    if len(factors_W4s):
        extend(factors_W4s, block, rows.tail_Ns[row], 0, rows.sum_N4, row)
        rows.name_NW2[row, block, 0], rows.name_NW2[row, block, 1] = upper_halves(rows.sum_N4, row)
