"""The loops of a step over the rows of the running table, compiled: what the rows want and lack, what is scheduled of them, and
what was sampled.

Shape letters as in `row_loops`, and P ranks, B new entries of block tables, O sampled tokens, V vocabulary.
"""

from typing import NamedTuple, Self

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler.block_loops import extend, fetch_bucket, forget_name, prefetch, take_block, upper_halves
from expertwire.scheduler.row_loops import name_rows

jit = compiler(__file__, sources="*_loops.py", _nrt=False)  # see block_loops

ASK = 255  # a reason to end, perhaps; the others are `plan.FinishReason`s
_STOP, _LENGTH = 1, 2
_SAMPLED, _GOING = 1, 2  # marks of rows
_AHEAD = 8  # how many blocks before its turn one is fetched


class Scheduled(NamedTuple):
    """What a step computes of which rows, ascending, and what is new in their block tables, in the order of the rows. And where
    each rank's part of both begins."""

    offsets_P1: np.ndarray  # i32, as all but those named
    row_S: np.ndarray  # i64
    order_S: np.ndarray  # i64
    slot_S: np.ndarray
    start_S: np.ndarray  # tokens computed before
    num_S: np.ndarray
    sample_S: np.ndarray  # u8, whether it then samples
    tokens_P1: np.ndarray  # where each rank's tokens would begin
    block_offsets_P1: np.ndarray
    block_slot_B: np.ndarray
    block_cache_B: np.ndarray
    block_index_B: np.ndarray
    block_id_B: np.ndarray

    @classmethod
    def empty(cls, num_ranks: int, num_rows: int, num_blocks: int) -> Self:
        """To be filled in."""
        ints_S, ints_B = np.empty((3, num_rows), np.int32), np.empty((4, num_blocks), np.int32)
        offsets_P1, tokens_P1, block_offsets_P1 = np.zeros((3, num_ranks + 1), np.int32)
        return cls(
            offsets_P1,
            *np.empty((2, num_rows), np.int64),
            *ints_S,
            np.empty(num_rows, np.uint8),
            tokens_P1,
            block_offsets_P1,
            *ints_B,
        )


class Sampled(NamedTuple):
    """Sampled tokens, rank by rank."""

    slot_O: np.ndarray  # i32, as the rest but one
    token_O: np.ndarray
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray


class Known(NamedTuple):
    """Those that belong to requests that run on, with what there is to say of them."""

    at_O: np.ndarray  # i64, which of the sampled ones
    row_O: np.ndarray  # i64
    key_O: np.ndarray  # i64
    token_O: np.ndarray  # i32
    finish_O: np.ndarray  # u8: why the request ends, 0, or `ASK` if this is perhaps one of its stop ids
    num_cached_O: np.ndarray  # i32
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray  # i32

    @classmethod
    def empty(cls, count: int) -> Self:
        """To be filled in."""
        kinds = np.int64, np.int64, np.int64, np.int32, np.uint8, np.int32, np.float32, np.int32
        return cls(*(np.empty(count, kind) for kind in kinds))


@jit
def want(caches, rows, max_num_tokens, chunk_tokens, row_S, num_S, budget_P, lacking_GP):
    """The rows to compute, tokens for each, the budget that every rank has left, and the blocks that it lacks for them: see
    `RunningTable.want`. How many rows."""
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
        if num_single < count - begin:
            count, budget = _cut(row_S, num_S, begin, count, budget)
        budget_P[rank] = budget
        for group in range(len(caches.size_G)):
            for i in range(begin, count):
                end = rows.num_computed_N[row_S[i]] + num_S[i]
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
    """Blocks that a row lacks to hold `end` tokens, with one for a shared block that it must copy."""
    size, num_blocks = caches.size_G[group], rows.num_blocks_GN[group, row]
    if end <= num_blocks * size:  # which is quicker than to divide
        return np.int64(rows.shares_tail_N[row])
    return -(-end // size) - num_blocks + rows.shares_tail_N[row]


@jit
def lacking(caches, rows, row_S, num_S, lacking_GS):
    """Blocks that each row lacks to compute `num_S` tokens more."""
    for group in range(len(caches.size_G)):
        for i in range(len(row_S)):
            lacking_GS[group, i] = _lacks(caches, rows, group, row_S[i], rows.num_computed_N[row_S[i]] + num_S[i])


@jit
def promised(caches, rows, group, row):
    """How many blocks a running row will still take for the tokens that it has."""
    held = rows.num_blocks_GN[group, row] - rows.num_dropped_GN[group, row]
    return min(_lacks(caches, rows, group, row, rows.num_tokens_N[row]), caches.most_G[group] - held + 1)


@jit
def count_new(caches, rows, row_S, num_S):
    """How many entries of block tables `schedule` will report of new rows."""
    count = 0
    for i in range(len(row_S)):
        row, end = row_S[i], rows.num_computed_N[row_S[i]] + num_S[i]
        for group in range(len(caches.size_G)):
            num_blocks = max(-(-end // caches.size_G[group]), rows.num_blocks_GN[group, row])
            count += num_blocks - rows.num_sent_GN[group, row]
    return count


@jit
def _grow(caches, blocks, rows, row, end, taken_B, num_taken, step, n):
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
            assert n < len(step.block_slot_B), "new blocks were counted wrong"
            step.block_slot_B[n], step.block_cache_B[n], step.block_index_B[n] = rows.slot_N[row], group, index
            step.block_id_B[n] = rows.block_ids_GNW[group, row, index]
            n += 1
        rows.num_sent_GN[group, row] = rows.num_blocks_GN[group, row]
    return num_taken, n


@jit
def _compute(rows, row, num, step, i):
    """A row computes `num` tokens more: scheduled row number `i`."""
    start = rows.num_computed_N[row]
    samples = start + num == rows.num_tokens_N[row]
    step.row_S[i], step.order_S[i], step.slot_S[i] = row, rows.order_N[row], rows.slot_N[row]
    step.start_S[i], step.num_S[i], step.sample_S[i] = start, num, samples
    rows.num_computed_N[row] = start + num
    rows.num_tokens_N[row] += samples
    rows.in_flight_N[row] += 1


@jit
def schedule(caches, blocks, rows, naming, row_R, num_R, row_A, num_A, step, taken_B, due_S):
    """Let two lists of rows, each ascending, compute `num_R` and `num_A` tokens more, and fill in the `Scheduled` step: how many
    entries of block tables are new. If `naming`, blocks that are whole then get their names. `taken_B` and `due_S` are for its
    own use."""
    n, num_taken, num_due, num_tokens, r, a = 0, 0, 0, 0, 0, 0
    for i in range(len(step.row_S)):
        if a == len(row_A) or (r < len(row_R) and row_R[r] < row_A[a]):
            row, num = row_R[r], num_R[r]
            r += 1
        else:
            row, num = row_A[a], num_A[a]
            a += 1
        _compute(rows, row, num, step, i)
        end, grows = rows.num_computed_N[row], False
        for group in range(len(caches.size_G)):
            sent = rows.num_sent_GN[group, row]
            grows |= sent * caches.size_G[group] < end or sent < rows.num_blocks_GN[group, row]
        if grows:
            num_taken, n = _grow(caches, blocks, rows, row, end, taken_B, num_taken, step, n)
        if min(end, rows.num_known_N[row]) >= (rows.num_named_N[row] + 1) * rows.block_size:
            due_S[num_due] = row
            num_due += 1
        num_tokens += num
        rank = rows.rank_N[row]
        step.offsets_P1[rank + 1], step.block_offsets_P1[rank + 1], step.tokens_P1[rank + 1] = i + 1, n, num_tokens
    for offsets_P1 in (step.offsets_P1, step.block_offsets_P1, step.tokens_P1):
        for rank in range(1, len(offsets_P1)):  # those without any
            offsets_P1[rank] = max(offsets_P1[rank], offsets_P1[rank - 1])
    for i in range(num_taken):
        if i + _AHEAD < num_taken:
            fetch_bucket(blocks, taken_B[i + _AHEAD])
        forget_name(blocks, taken_B[i])
    if naming:
        name_rows(caches, blocks, rows, due_S[:num_due])
    return n


@jit
def _mark(rows, step, mark_N):
    """A step is done: mark which of its rows sampled, and which still belong to the requests that it was planned for, and run.
    How many sampled."""
    num_sampled = 0
    for i in range(len(step.row_S)):
        row, mark = step.row_S[i], 0
        if step.sample_S[i]:
            num_sampled += 1
            mark = _SAMPLED
        if rows.running_N[row] and rows.order_N[row] == step.order_S[i]:
            mark |= _GOING
            rows.in_flight_N[row] -= 1
        mark_N[row] = mark
    return num_sampled


@jit
def _reason(rows, eos_ids, may_stop_V, row, token):
    """Why a row ends with this token, its last one."""
    reason = _LENGTH if rows.num_known_N[row] >= rows.limit_N[row] else 0
    if rows.num_known_N[row] >= rows.stop_from_N[row]:
        if rows.has_stop_ids_N[row] and may_stop_V[token]:
            reason = ASK
        if rows.eos_stops_N[row]:
            for j in range(len(eos_ids)):
                if token == eos_ids[j]:
                    reason = _STOP
    return reason


@jit
def take_in(rows, factors_W4s, eos_ids, may_stop_V, step, offsets_P1, sampled, mark_N, known, whole_O):
    """A step is done, with the tokens that each rank has sampled: which are `known` now, as their requests run on, and how many.
    -1: others were sampled than should have been. Whole blocks of tokens get their names, if there are any factors.
    `mark_N`, zeros, is true in the end where a request of the step runs on. `whole_O` is for its own use."""
    size, count, num_whole = rows.block_size, 0, 0
    if _mark(rows, step, mark_N) != len(sampled.slot_O):
        return -1
    per_rank = len(rows.rank_N) // (len(offsets_P1) - 1)
    for rank in range(len(offsets_P1) - 1):
        for o in range(offsets_P1[rank], offsets_P1[rank + 1]):
            slot = sampled.slot_O[o]
            row = rank * per_rank + slot
            if not 0 <= slot < per_rank or not mark_N[row] & _SAMPLED:
                return -1
            mark_N[row] &= ~_SAMPLED
            if not mark_N[row]:
                continue
            token, num_known = sampled.token_O[o], rows.num_known_N[row]
            within = num_known % size
            rows.tail_Ns[row, within] = token
            rows.num_known_N[row] += 1
            if within == size - 1:
                prefetch(rows.tokens_NL, (row, num_known))
                prefetch(rows.name_NW2, (row, num_known // size, 0))
                prefetch(rows.sum_N4, (row, 0))
                whole_O[num_whole] = row
                num_whole += 1
            known.at_O[count], known.row_O[count] = o, row
            known.key_O[count], known.token_O[count] = rows.key_N[row], token
            known.finish_O[count] = _reason(rows, eos_ids, may_stop_V, row, token)
            known.num_cached_O[count] = rows.num_cached_N[row]
            known.logprob_O[count], known.token_rank_O[count] = sampled.logprob_O[o], sampled.token_rank_O[o]
            count += 1
    for row in whole_O[:num_whole]:
        _append_block(rows, factors_W4s, row)
    return count


@jit
def _append_block(rows, factors_W4s, row):
    """A row's tail is a whole block now."""
    size = rows.block_size
    block = rows.num_known_N[row] // size - 1
    for j in range(size):
        rows.tokens_NL[row, block * size + j] = rows.tail_Ns[row, j]
    if len(factors_W4s):
        extend(factors_W4s, block, rows.tail_Ns[row], 0, rows.sum_N4, row)
        rows.name_NW2[row, block, 0], rows.name_NW2[row, block, 1] = upper_halves(rows.sum_N4, row)
