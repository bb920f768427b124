"""Compiled loops of a step over the running batch: token budget, schedule, sampled tokens.

Letters as in `rows`, and B new block table entries, O sampled tokens, P ranks, V vocabulary.
"""

from typing import NamedTuple, Self

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import NONE, UNHASHED, prefetch, prefetch_free, take_block
from expertwire.scheduler._compiled.prefixes import (
    clear_block_hash,
    extend,
    prefetch_bucket,
    prefetch_chain,
    upper_halves,
)
from expertwire.scheduler._compiled.rows import hash_rows, num_missing, share_row
from expertwire.scheduler._compiled.snapshots import begins_block

jit = compiler(__file__, _nrt=False)  # see blocks

# Instead of a `FinishReason`: the token may be one of the request's stop or pause ids; the request leaves its slot and has not
# ended.
CHECK_IDS, SUSPENDED = 255, 254
_STOP, _LENGTH = 1, 2
MAY_STOP, MAY_PAUSE = 1, 2  # bits of `special_V`
_SAMPLED, _RUNNING = 1, 2  # bits of `mark_Z`
_MANY = 2**31 - 1
_AHEAD = 8  # blocks, distance of prefetching
_ZERO = np.int64(0)  # a literal 0 is a type of its own: what it is passed to would be compiled twice


class StepSchedule(NamedTuple):
    """Scheduled slots and new block table entries of a step, sorted by rank and slot; i32."""

    offsets_P1: np.ndarray
    slot_S: np.ndarray
    start_S: np.ndarray  # tokens computed before this step
    num_S: np.ndarray
    sample_S: np.ndarray  # u8, 1: sample the next token
    source_S: np.ndarray  # the slot from whose last hidden states to sample
    tokens_P1: np.ndarray  # offsets of the ranks' tokens
    block_offsets_P1: np.ndarray
    block_4B: np.ndarray  # new entries: slot, cache, index in the block table, block

    @classmethod
    def empty(cls, num_ranks: int, num_rows: int, num_blocks: int) -> Self:
        """Return uninitialised arrays."""
        offsets_P1, tokens_P1, block_offsets_P1 = np.zeros((3, num_ranks + 1), np.int32)
        slot_S, start_S, num_S, source_S = np.empty((4, num_rows), np.int32)
        sample_S, block_4B = np.empty(num_rows, np.uint8), np.empty((4, num_blocks), np.int32)
        return cls(offsets_P1, slot_S, start_S, num_S, sample_S, source_S, tokens_P1, block_offsets_P1, block_4B)


class Sampled(NamedTuple):
    """Sampled tokens of all ranks, sorted by rank."""

    slot_O: np.ndarray  # i32, as the rest but one
    token_O: np.ndarray  # -1: the logits are not finite
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray


class Accepted(NamedTuple):
    """Sampled tokens of requests that are still running; where there is none, the request is left out."""

    at_O: np.ndarray  # i32, index into `Sampled`
    row_O: np.ndarray  # i32
    key_O: np.ndarray  # i64
    token_O: np.ndarray  # i32
    finish_O: np.ndarray  # u8, a `FinishReason`, `CHECK_IDS` or `SUSPENDED`
    num_cached_O: np.ndarray  # i32
    logprob_O: np.ndarray  # f32
    token_rank_O: np.ndarray  # i32

    @classmethod
    def empty(cls, count: int) -> Self:
        """Return uninitialised arrays."""
        kinds = np.int32, np.int32, np.int64, np.int32, np.uint8, np.int32, np.float32, np.int32
        return cls(*(np.empty(count, kind) for kind in kinds))


@jit
def select_rows(caches, batch, max_num_batched_tokens, chunked_prefill_size, row_S, num_S, tokens_P, missing_CP):
    """Write the rows to compute and their tokens, and return their number; see `RunningBatch.select`."""
    count = _ZERO
    for rank in range(len(tokens_P)):
        num_decodes, begin = 0, count
        for at in range(rank * batch.per_rank, (rank + 1) * batch.per_rank):
            row = batch.counters_Z[at]
            waits = batch.draining_Z[at] or batch.paused_Z[at]
            if batch.running_Z[at] and not waits and row.num_tokens < row.limit:
                num = row.num_tokens - row.num_computed
                assert num > 0, "nothing to compute in a running row"
                num_decodes += num == 1
                row_S[count], num_S[count] = at, num
                count += 1
        budget = max_num_batched_tokens - num_decodes
        if num_decodes:
            budget = min(budget, chunked_prefill_size)
        assert budget >= 0, "over budget"
        if num_decodes < count - begin:
            count, budget = _cut_to_budget(row_S, num_S, begin, count, budget)
        tokens_P[rank] = budget
        for i in range(begin, count):
            end = batch.counters_Z[row_S[i]].num_computed + num_S[i]
            if end > batch.counters_Z[row_S[i]].num_held:
                for cache in range(len(caches.size_C)):
                    missing_CP[cache, rank] += num_missing(caches, batch, cache, row_S[i], end)
    return count


@jit(inner=True)
def _cut_to_budget(row_S, num_S, begin, end, budget):
    """Limit the prefill tokens of a rank's rows to `budget`; return the new end and budget."""
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
def missing_blocks(caches, batch, row_S, num_S, missing_CS):
    """Compute the number of blocks that each row lacks to compute `num_S` more tokens."""
    for cache in range(len(caches.size_C)):
        for i in range(len(row_S)):
            end = batch.counters_Z[row_S[i]].num_computed + num_S[i]
            missing_CS[cache, i] = num_missing(caches, batch, cache, row_S[i], end)


@jit
def count_new_entries(caches, batch, row_S, num_S):
    """Return the number of block table entries that `schedule` will report for rows."""
    count = 0
    for i in range(len(row_S)):
        end = batch.counters_Z[row_S[i]].num_computed + num_S[i]
        for cache in range(len(caches.size_C)):
            table = batch.tables_CZ[cache, row_S[i]]
            count += max(-(-end // caches.size_C[cache]), table.num_blocks) - table.num_sent
    return count


@jit(inner=True)
def _prefetch_table(caches, batch, row, end):
    """Prefetch what `_allocate` will touch of a row's block tables."""
    for cache in range(len(caches.size_C)):
        prefetch(batch.tables_CZ, (cache, row))
        prefetch(batch.block_ids_CZW, (cache, row, (end - 1) // caches.size_C[cache]))


@jit(inner=True)
def _allocate(caches, blocks, batch, row, taken_B, num_taken, step, n):
    """Allocate a row's missing blocks and report its new entries; return both running counts."""
    rank, num_held = batch.info_Z[row].rank, _MANY
    for cache in range(len(caches.size_C)):
        owner, table = cache * blocks.num_ranks + rank, batch.tables_CZ[cache, row]
        for index in range(table.num_blocks, -(-batch.counters_Z[row].num_computed // caches.size_C[cache])):
            if begins_block(caches, batch, cache, row, index):
                number = take_block(blocks, owner)
                taken_B[num_taken] = number
                num_taken += 1
                batch.block_ids_CZW[cache, row, index] = number - owner * blocks.num_blocks
            else:
                batch.block_ids_CZW[cache, row, index] = batch.block_ids_CZW[cache, row, index - 1]
            table.num_blocks = index + 1
        for index in range(table.num_sent, table.num_blocks):
            assert n < step.block_4B.shape[1], "new blocks were counted wrong"
            step.block_4B[0, n], step.block_4B[1, n] = row - rank * batch.per_rank, cache
            step.block_4B[2, n], step.block_4B[3, n] = index, batch.block_ids_CZW[cache, row, index]
            n += 1
        table.num_sent = table.num_blocks
        num_held = min(num_held, table.num_blocks * caches.size_C[cache])
    batch.counters_Z[row].num_held = num_held
    return num_taken, n


@jit(inner=True)
def _prefetch_free(caches, blocks, batch, row_S):
    """Prefetch the free blocks that these rows will take."""
    for cache in range(len(caches.size_C)):
        rank, ahead = np.int32(NONE), _ZERO
        for row in row_S:
            if batch.info_Z[row].rank != rank:
                rank, ahead = batch.info_Z[row].rank, _ZERO
            num = num_missing(caches, batch, cache, row, batch.counters_Z[row].num_computed)
            prefetch_free(blocks, cache * blocks.num_ranks + rank, ahead, num)
            ahead += num


@jit(inner=True)
def _allocate_all(caches, blocks, batch, row_S, row_A, leader_A, taken_B, step):
    """Allocate the missing blocks of these rows, ascending, and set the ranks' offsets; return both counts.

    The followers among `row_A`, which are not their own leaders, share the full blocks of these.
    """
    _prefetch_free(caches, blocks, batch, row_S)
    i, a, num_taken, n = 0, 0, _ZERO, _ZERO
    for rank in range(len(step.block_offsets_P1) - 1):
        while i < len(row_S) and row_S[i] < (rank + 1) * batch.per_rank:
            num_taken, n = _allocate(caches, blocks, batch, row_S[i], taken_B, num_taken, step, n)
            i += 1
        while a < len(row_A) and row_A[a] < (rank + 1) * batch.per_rank:
            if leader_A[a] != row_A[a]:
                share_row(caches, blocks, batch, row_A[a], leader_A[a], batch.counters_Z[row_A[a]].num_computed, False)
                num_taken, n = _allocate(caches, blocks, batch, row_A[a], taken_B, num_taken, step, n)
            a += 1
        step.block_offsets_P1[rank + 1] = n
    return num_taken, n


@jit
def schedule(
    caches, blocks, batch, hashing, number, row_S, num_S, row_A, num_A, leader_A, step, taken_B, growing_S, due_S
):
    """Schedule two lists of rows; return the number of new block table entries.

    Each list is ascending and has the number of tokens to compute beside it. `row_A` are new rows; a
    follower has its leader's row in `leader_A` and nothing to compute, others have their own.
    `step` is filled in, `number` is its number. With `hashing`, full blocks go to the prefix cache.
    `taken_B`, `growing_S` and `due_S` are scratch.
    """
    i, num_growing, num_due, num_tokens, r, a = 0, 0, 0, 0, 0, 0
    for row in row_A:
        batch.info_Z[row].first_step = number
    for rank in range(len(step.offsets_P1) - 1):
        first, last = rank * batch.per_rank, (rank + 1) * batch.per_rank
        while True:
            row, num, source = last, 0, NONE
            if r < len(row_S) and row_S[r] < row:
                row, num = row_S[r], num_S[r]
            if a < len(row_A) and row_A[a] < row:
                row, num, source = row_A[a], num_A[a], leader_A[a]
                a += 1
            elif row < last:
                r += 1
            else:
                break
            state = batch.counters_Z[row]
            end = state.num_computed + num
            step.slot_S[i], step.start_S[i], step.num_S[i] = row - first, state.num_computed, num
            samples = end == state.num_tokens
            step.sample_S[i] = samples
            follows = source >= 0 and source != row
            step.source_S[i] = source - first if follows else row - first
            state.num_computed = end
            state.num_tokens += samples
            state.in_flight += 1
            if end > state.num_held and not follows:
                _prefetch_table(caches, batch, row, end)
                growing_S[num_growing] = row
                num_growing += 1
            if min(end, state.num_known) >= (state.num_hashed + 1) * batch.block_size:
                prefetch(batch.hash_ZB2, (row, state.num_hashed, 0))
                due_S[num_due] = row
                num_due += 1
            num_tokens += num
            i += 1
        step.offsets_P1[rank + 1], step.tokens_P1[rank + 1] = i, num_tokens
    num_taken, n = _allocate_all(caches, blocks, batch, growing_S[:num_growing], row_A, leader_A, taken_B, step)
    for b in range(num_taken):
        if b + 2 * _AHEAD < num_taken:
            prefetch_bucket(blocks, taken_B[b + 2 * _AHEAD])
        if b + _AHEAD < num_taken:
            prefetch_chain(blocks, taken_B[b + _AHEAD])
        number = np.int64(taken_B[b])
        blocks.owners[number // blocks.num_blocks].num_evicted += blocks.block_B[number].chain != UNHASHED
        clear_block_hash(blocks, number)
    if hashing:
        hash_rows(caches, blocks, batch, due_S[:num_due])
    return n


@jit(inner=True)
def _mark_rows(batch, number, step, mark_Z):
    """Mark the rows of a step that sampled, and those whose request still runs; return how many sampled."""
    num_sampled = 0
    for rank in range(len(step.offsets_P1) - 1):
        for i in range(step.offsets_P1[rank], step.offsets_P1[rank + 1]):
            at, mark = rank * batch.per_rank + step.slot_S[i], 0
            if step.sample_S[i]:
                num_sampled += 1
                mark = _SAMPLED
            if batch.running_Z[at] and batch.info_Z[at].first_step <= number:
                mark |= _RUNNING
                batch.counters_Z[at].in_flight -= 1
            mark_Z[at] = mark
    return num_sampled


@jit(inner=True, inline="always")
def _finish_reason(row, info, eos_ids, special_V, token):
    """Return the finish reason of a row whose last token is `token`."""
    reason = 0
    if row.num_known >= row.limit:
        reason = SUSPENDED if info.suspends else _LENGTH
    if info.has_pause_ids and special_V[token] & MAY_PAUSE:
        reason = CHECK_IDS
    if row.num_known >= info.stop_from:
        if info.has_stop_ids and special_V[token] & MAY_STOP:
            reason = CHECK_IDS
        if info.eos_stops:
            for j in range(len(eos_ids)):
                if token == eos_ids[j]:
                    reason = _STOP
    return reason


@jit
def append_sampled(
    batch, factors_B4s, eos_ids, special_V, number, step, offsets_P1, sampled, mark_Z, accepted, whole_O
):
    """Append sampled tokens to their rows; return how many are `accepted`, or -1 for an unexpected slot.

    Full blocks get their hashes, if there are `factors_B4s`. `mark_Z`, zeros, is true at the end
    for rows of the step that still run. `whole_O` is scratch.
    """
    size, count, num_whole = batch.block_size, 0, 0
    if _mark_rows(batch, number, step, mark_Z) != len(sampled.slot_O):
        return -1
    for rank in range(len(offsets_P1) - 1):
        for o in range(offsets_P1[rank], offsets_P1[rank + 1]):
            slot = sampled.slot_O[o]
            at = rank * batch.per_rank + slot
            if not 0 <= slot < batch.per_rank or not mark_Z[at] & _SAMPLED:
                return -1
            mark_Z[at] &= ~_SAMPLED
            row, info, token = batch.counters_Z[at], batch.info_Z[at], sampled.token_O[o]
            if not mark_Z[at] or token < 0:
                continue
            batch.tail_Zs[at, row.num_tail] = token
            row.num_known += 1
            row.num_tail += 1
            if row.num_tail == size:
                row.num_tail = 0
                prefetch(batch.tokens_ZT, (at, row.num_known - 1))
                prefetch(batch.hash_ZB2, (at, row.num_known // size - 1, 0))
                prefetch(batch.sum_Z4, (at, 0))
                whole_O[num_whole] = at
                num_whole += 1
            accepted.at_O[count], accepted.row_O[count] = o, at
            accepted.key_O[count], accepted.token_O[count] = info.key, token
            accepted.finish_O[count] = _finish_reason(row, info, eos_ids, special_V, token)
            accepted.num_cached_O[count] = info.num_cached
            accepted.logprob_O[count], accepted.token_rank_O[count] = sampled.logprob_O[o], sampled.token_rank_O[o]
            count += 1
    for at in whole_O[:num_whole]:
        _append_block(batch, factors_B4s, at)
    return count


@jit(inner=True)
def _append_block(batch, factors_B4s, row):
    """Move a row's full tail to its tokens and compute the block's hash."""
    size = batch.block_size
    block = batch.counters_Z[row].num_known // size - 1
    for j in range(size):
        batch.tokens_ZT[row, block * size + j] = batch.tail_Zs[row, j]
    if len(factors_B4s):
        extend(factors_B4s, block, batch.tail_Zs[row], 0, batch.sum_Z4, row)
        batch.hash_ZB2[row, block, 0], batch.hash_ZB2[row, block, 1] = upper_halves(batch.sum_Z4, row)
