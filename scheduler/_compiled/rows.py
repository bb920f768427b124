"""Compiled loops over the rows of the running batch: start, release, hashes of full blocks.

`RunningBatch` makes the arrays. Letters as in `blocks`, and A admitted requests, S requests, T
tokens, Z slots of all ranks.
"""

from typing import NamedTuple

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import NONE, UNHASHED, compact_queues, drop_block, prefetch, share_block
from expertwire.scheduler._compiled.prefixes import (
    clear_block_hash,
    find_block,
    first_seen,
    prefetch_hash,
    set_block_hash,
)
from expertwire.scheduler._compiled.snapshots import (
    begins_block,
    choose_snapshots,
    count_blocks,
    leave_snapshot,
)

jit = compiler(__file__, _nrt=False)  # see blocks


# The counters of a row that every step reads and writes: half a cache line, because the loops wait
# for memory. Two run ahead of what is known: num_tokens includes tokens that steps in flight will
# sample, num_computed those they will compute.
COUNTERS = np.dtype(
    [
        ("num_known", np.int32),  # the prompt's and the sampled tokens
        ("num_tail", np.int32),  # of num_known, those after the last full block
        ("num_tokens", np.int32),
        ("num_computed", np.int32),
        ("num_held", np.int32),  # tokens whose blocks are allocated and known to its rank, in every cache
        ("num_hashed", np.int32),  # blocks that are in the prefix cache
        ("limit", np.int32),  # of num_known: there it ends or is suspended
        ("in_flight", np.int32),  # steps
    ]
)

# Other data of the request in a row, in half a cache line, too.
ROW_INFO = np.dtype(
    [
        ("key", np.int64),
        ("first_step", np.int64),  # that was planned for it
        ("rank", np.int32),
        ("num_cached", np.int32),  # prompt tokens found in the cache when first admitted
        ("stop_from", np.int32),  # stop and end-of-sequence ids count from this num_known on
        ("eos_stops", np.bool_),
        ("has_stop_ids", np.bool_),
        ("suspends", np.bool_),  # at its limit it leaves the row, and has not ended
        ("has_pause_ids", np.bool_),
    ]
)

# Where snapshots of a row's recurrent states are kept, see `snapshots`; tokens.
SNAPSHOTS = np.dtype(
    [("num_begun", np.int32), ("branch", np.int32), ("last_prompt", np.int32), ("last_kept", np.int32)]
)

# A row's blocks are entries [num_dropped, num_blocks) of its block table, where states repeat (see `snapshots`); those
# that left a window were freed. Its rank knows the entries before num_sent.
BLOCK_TABLE = np.dtype(
    [("num_blocks", np.int32), ("num_dropped", np.int32), ("num_sent", np.int32), ("reserved", np.int32)]
)


class BatchArrays(NamedTuple):
    """The arrays of the running batch that the loops use; see `RunningBatch`."""

    block_size: int
    per_rank: int
    occupied_Z: np.ndarray
    running_Z: np.ndarray
    draining_Z: np.ndarray
    paused_Z: np.ndarray
    counters_Z: np.ndarray  # COUNTERS
    info_Z: np.ndarray  # ROW_INFO
    snapshots_Z: np.ndarray  # SNAPSHOTS
    tables_CZ: np.ndarray  # BLOCK_TABLE
    block_ids_CZW: np.ndarray
    tail_Zs: np.ndarray
    tokens_ZT: np.ndarray
    hash_ZB2: np.ndarray
    sum_Z4: np.ndarray


@jit
def start_rows(
    caches, blocks, batch, row_A, parent_A, num_cached_A, record_A, tokens, token_offsets_A1, first_A, hash_B2
):
    """Fill new rows with their requests' records, last tokens, block hashes and cached blocks.

    The blocks are shared with the row `parent_A`, or if that is `NONE` found in the prefix cache. A row whose parent
    is `LEADER` has none before `schedule` shares those of its leader.
    """
    size = batch.block_size
    for i in range(len(row_A)):
        row, num_tokens = row_A[i], token_offsets_A1[i + 1] - token_offsets_A1[i]
        whole = num_tokens // size
        tail_start = token_offsets_A1[i] + whole * size
        state, info, record = batch.counters_Z[row], batch.info_Z[row], record_A[i]
        batch.occupied_Z[row] = batch.running_Z[row] = True
        info.key, state.limit, info.stop_from = record.key, record.limit, record.stop_from
        info.eos_stops, info.has_stop_ids, info.num_cached = record.eos_stops, record.has_stop_ids, record.num_cached
        info.suspends, info.has_pause_ids = record.suspends, record.has_pause_ids
        state.num_known = state.num_tokens = num_tokens
        state.num_computed, state.num_hashed = num_cached_A[i], num_cached_A[i] // size
        state.num_tail = token_offsets_A1[i + 1] - tail_start
        for j in range(state.num_tail):
            batch.tail_Zs[row, j] = tokens[tail_start + j]
        if len(hash_B2):
            first, end = first_A[i], first_A[i] + whole
            for b in range(whole):
                batch.hash_ZB2[row, b, 0], batch.hash_ZB2[row, b, 1] = hash_B2[first + b, 0], hash_B2[first + b, 1]
            batch.sum_Z4[row, 0], batch.sum_Z4[row, 1] = hash_B2[end, 0], hash_B2[end, 1]
            batch.sum_Z4[row, 2], batch.sum_Z4[row, 3] = hash_B2[end + 1, 0], hash_B2[end + 1, 1]
        choose_snapshots(caches, blocks, batch, row, num_cached_A[i], parent_A[i] != NONE)
        if parent_A[i] >= 0:
            share_row(caches, blocks, batch, row, parent_A[i], num_cached_A[i], True)
        elif num_cached_A[i] > 0 and parent_A[i] == NONE:
            _share_prefix(caches, blocks, batch, row, num_cached_A[i] // size)


@jit(inner=True)
def _share_prefix(caches, blocks, batch, row, depth):
    """Start an empty row with the cached blocks of its first `depth` block hashes."""
    for cache in range(len(caches.size_C)):
        per_block, owner = caches.hashes_C[cache], cache * blocks.num_ranks + batch.info_Z[row].rank
        first = first_seen(caches, cache, depth * batch.block_size)
        for index in range(first, depth // per_block):
            last = (index + 1) * per_block - 1
            number = find_block(blocks, owner, batch.hash_ZB2[row, last, 0], batch.hash_ZB2[row, last, 1])
            assert number != NONE, "a block that was found is gone"
            share_block(blocks, owner, np.int64(number))
            batch.block_ids_CZW[cache, row, index] = number - owner * blocks.num_blocks
        table = batch.tables_CZ[cache, row]
        table.num_dropped = table.num_sent = first
        table.num_blocks = depth // per_block


@jit(inner=True)
def share_row(caches, blocks, batch, row, parent, num_cached, with_tail):
    """Start an empty row with the blocks of another row's first tokens.

    `with_tail`: also with the last one if it is not full. Without, the row follows the other one, whose table its rank copies.
    """
    for cache in range(len(caches.size_C)):
        owner, first = cache * blocks.num_ranks + batch.info_Z[row].rank, first_seen(caches, cache, num_cached)
        end = num_cached // caches.size_C[cache]
        if with_tail and num_cached % caches.size_C[cache]:
            end += 1
        for index in range(first, end):
            block = batch.block_ids_CZW[cache, parent, index]
            share_block(blocks, owner, owner * blocks.num_blocks + block)
            batch.block_ids_CZW[cache, row, index] = block
        table = batch.tables_CZ[cache, row]
        table.num_dropped = first
        table.num_sent = first if with_tail else end
        table.num_blocks = end


@jit(inner=True)
def _unhashed(caches, batch, cache, row, whole):
    """Return the indices of a row's first `whole` blocks that are not yet in the prefix cache."""
    per_block = caches.hashes_C[cache]
    return range(
        max(batch.counters_Z[row].num_hashed // per_block, batch.tables_CZ[cache, row].num_dropped), whole // per_block
    )


@jit(inner=True)
def _prefetch_row(caches, blocks, batch, row, whole):
    """Prefetch what `_hash_row` will touch."""
    for cache in range(len(caches.size_C)):
        per_block, owner = caches.hashes_C[cache], cache * blocks.num_ranks + batch.info_Z[row].rank
        ids_B, hash_B2 = batch.block_ids_CZW[cache, row], batch.hash_ZB2[row]
        for index in _unhashed(caches, batch, cache, row, whole):
            if not begins_block(caches, batch, cache, row, index + 1):
                continue
            last = (index + 1) * per_block - 1
            prefetch(blocks.block_B, (owner * blocks.num_blocks + ids_B[index],))
            prefetch_hash(blocks, owner, hash_B2[last, 0], hash_B2[last, 1])


@jit(inner=True)
def _hash_row(caches, blocks, batch, row, whole):
    """Put a row's first `whole` blocks into the prefix cache."""
    for cache in range(len(caches.size_C)):
        per_block, owner = caches.hashes_C[cache], cache * blocks.num_ranks + batch.info_Z[row].rank
        ids_B, hash_B2 = batch.block_ids_CZW[cache, row], batch.hash_ZB2[row]
        for index in _unhashed(caches, batch, cache, row, whole):
            if not begins_block(caches, batch, cache, row, index + 1):
                continue  # the state goes on
            number, last = owner * blocks.num_blocks + ids_B[index], (index + 1) * per_block - 1
            if blocks.block_B[number].chain == UNHASHED:
                if blocks.owners[owner].weighs:
                    leave_snapshot(caches, blocks, batch, cache, row, index, number)
                set_block_hash(blocks, owner, number, hash_B2[last, 0], hash_B2[last, 1])
    batch.counters_Z[row].num_hashed = whole


@jit(inner=True)
def _num_whole(batch, row):
    """Return the number of a row's blocks whose tokens are known, and computed once the steps in flight are done."""
    return min(batch.counters_Z[row].num_computed, batch.counters_Z[row].num_known) // batch.block_size


@jit(inner=True)
def hash_rows(caches, blocks, batch, row_S):
    """Put these rows' full blocks into the prefix cache, including those that the steps in flight will fill."""
    for row in row_S:
        _prefetch_row(caches, blocks, batch, row, _num_whole(batch, row))
    for row in row_S:
        _hash_row(caches, blocks, batch, row, _num_whole(batch, row))


@jit
def forget_rows(caches, blocks, batch, row_S):
    """Remove these rows' tokens from the prefix caches, whoever computed them; the rows are to be released next."""
    for row in row_S:
        whole = batch.counters_Z[row].num_known // batch.block_size
        for cache in range(len(caches.size_C)):
            per_block, owner = caches.hashes_C[cache], cache * blocks.num_ranks + batch.info_Z[row].rank
            for index in range(whole // per_block):
                last = (index + 1) * per_block - 1
                hash0, hash1 = batch.hash_ZB2[row, last, 0], batch.hash_ZB2[row, last, 1]
                number = find_block(blocks, owner, hash0, hash1)
                while number != NONE:
                    clear_block_hash(blocks, number)
                    number = find_block(blocks, owner, hash0, hash1)
        batch.counters_Z[row].num_hashed = whole  # so that the release hashes none of them


@jit(inner=True)
def _free_before(blocks, batch, cache, row, end):
    """Drop a row's blocks before index `end` that no later entry repeats, the last one first."""
    owner, table, ids_W = (
        cache * blocks.num_ranks + batch.info_Z[row].rank,
        batch.tables_CZ[cache, row],
        batch.block_ids_CZW[cache, row],
    )
    for index in range(end - 1, table.num_dropped - 1, -1):
        if index + 1 == table.num_blocks or ids_W[index] != ids_W[index + 1]:
            drop_block(blocks, owner, owner * blocks.num_blocks + ids_W[index])


@jit(inner=True)
def _prefetch_blocks(blocks, batch, cache, row):
    owner = cache * blocks.num_ranks + batch.info_Z[row].rank
    for index in range(batch.tables_CZ[cache, row].num_dropped, batch.tables_CZ[cache, row].num_blocks):
        prefetch(blocks.block_B, (owner * blocks.num_blocks + batch.block_ids_CZW[cache, row, index],))


@jit
def release_rows(caches, blocks, batch, hashing, row_S):
    """Empty these rows and drop their blocks; with `hashing`, put the full ones into the prefix cache first."""
    if hashing:
        hash_rows(caches, blocks, batch, row_S)
    compact_queues(blocks)
    for row in row_S:
        for cache in range(len(caches.size_C)):
            _prefetch_blocks(blocks, batch, cache, row)
    for row in row_S[::-1]:
        for cache in range(len(caches.size_C)):
            table = batch.tables_CZ[cache, row]
            _free_before(blocks, batch, cache, row, np.int64(table.num_blocks))
            table.num_blocks = table.num_dropped = table.num_sent = 0
        batch.occupied_Z[row] = batch.running_Z[row] = batch.draining_Z[row] = batch.paused_Z[row] = False
        batch.counters_Z[row].in_flight = batch.counters_Z[row].num_held = 0


@jit
def free_outside_windows(caches, blocks, batch, row_S):
    """Drop the blocks that have left the rows' windows."""
    compact_queues(blocks)
    for row in row_S[::-1]:
        for cache in range(len(caches.size_C)):
            table = batch.tables_CZ[cache, row]
            first = min(first_seen(caches, cache, batch.counters_Z[row].num_computed), table.num_blocks)
            if first > table.num_dropped:
                _free_before(blocks, batch, cache, row, first)
                table.num_dropped = first


@jit(inner=True)
def num_missing(caches, batch, cache, row, end):
    """Return the number of blocks that a row lacks to hold `end` tokens."""
    first = batch.tables_CZ[cache, row].num_blocks
    return count_blocks(caches, batch, cache, row, first, -(-end // caches.size_C[cache]))


@jit(inner=True)
def num_blocks_due(caches, batch, cache, row):
    """Return the number of blocks that a running row will still take for the tokens that it has."""
    table = batch.tables_CZ[cache, row]
    held = table.num_blocks - table.num_dropped
    if caches.every_C[cache] > 1:
        held = 1  # it holds more for the tokens of a step only
    return min(
        num_missing(caches, batch, cache, row, batch.counters_Z[row].num_tokens), caches.most_C[cache] - held + 1
    )
