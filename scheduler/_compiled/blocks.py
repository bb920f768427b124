"""Compiled loops over cache blocks: reference counts and free queues. `BlockPool` makes the arrays, `prefixes` has the hashes.

Blocks are numbered, cache and rank included: owner * num_blocks + block id, where owner = cache *
num_ranks + rank.

C KV cache groups, P ranks, A admitted requests, B blocks (of a request, or of all owners), s tokens
in a block.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from expertwire.compiled import compiler
from expertwire.scheduler._compiled import heap

END = -1  # of a bucket's chain
UNHASHED = -2  # a block's `chain`: it has no hash, so it is in no bucket
IN_USE = -1  # a block's `place`: it is not in the free queue
NONE = -1  # no rank, no block, no row
LEADER = -2  # instead of a row: that of a request that is only now admitted
EVERYTHING = 2**60  # window of a cache without a window, in tokens

# `_nrt=False`: no reference counts. These functions keep and make no arrays, and numba's atomic
# reference counting of every array of a tuple, wherever a tuple is passed on, takes half of the
# time of some loops.
jit = compiler(__file__, _nrt=False)

# Half a cache line a block, because these loops wait for memory.
BLOCK = np.dtype(
    [
        ("refs", np.int32),
        ("place", np.int32),  # in the free queue or heap, or `IN_USE`
        ("chain", np.int32),  # the next block in the same bucket, `END`, or `UNHASHED`
        ("reserved", np.int32),
        ("hash0", np.uint64),  # the halves of its hash
        ("hash1", np.uint64),
    ]
)

# One array of records: all arrays of a tuple are passed on, one by one, wherever it is.
OWNER = np.dtype(
    [
        ("num_free", np.int64),
        ("head", np.int64),  # of its queue, modulo the queue's length
        ("tail", np.int64),
        ("num_evicted", np.int64),  # blocks that were allocated while they had a hash
        ("weighs", np.int64),  # 1: its free blocks are in a heap
        ("level", np.int64),  # the worth of the last wanted block that was evicted
        ("clock", np.int64),  # blocks that were freed
        ("reserved", np.int64),
    ]
)


@intrinsic
def prefetch(context, array, index):
    """Prefetch the item at `index`, a tuple, into the processor's cache."""

    def generate(context, builder, signature, values):
        of = context.make_array(signature.args[0])(context, builder, values[0])
        parts = zip(cgutils.unpack_tuple(builder, values[1]), signature.args[1], strict=True)
        at = [context.cast(builder, part, kind, types.intp) for part, kind in parts]
        item = builder.bitcast(cgutils.get_item_pointer(context, builder, signature.args[0], of, at), cgutils.voidptr_t)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(fetch, [item, word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


class Caches(NamedTuple):
    """Sizes of the caches, i64 [C]."""

    size_C: np.ndarray  # tokens of an entry of a block table
    window_C: np.ndarray  # tokens that a token attends to, itself included
    hashes_C: (
        np.ndarray
    )  # block hashes in an entry of a block table: more than 1 where it is larger than the block size
    every_C: np.ndarray  # entries after which a snapshot is kept; 1 where each entry has a block of its own
    extra_C: np.ndarray  # `CacheSpec.num_extra`
    most_C: np.ndarray  # blocks that one request can hold
    max_misses: int  # consecutive blocks of a prefix that may be missing from `Blocks.holders`


class Blocks(NamedTuple):
    """The blocks of all owners, see `BlockPool`.

    An owner's free queue is a ring: its entries from `head` to `tail` that equal their blocks'
    `place` are its free blocks. Other entries are left over from blocks that were taken out of the
    middle. An owner that weighs its blocks has a heap there instead, of `num_free` blocks.
    """

    num_blocks: int
    num_ranks: int
    block_B: np.ndarray  # BLOCK
    owners: np.ndarray  # OWNER
    queues: np.ndarray  # i32 [owners, a power of two]
    worth_B: np.ndarray  # `heap.WORTH`, of owners that weigh
    buckets: np.ndarray  # i32 [a power of two], the first block of each bucket's chain
    holders: np.ndarray  # u64: the upper 32 bits of a hash, and below them the rank that used it last, less `NONE`


@jit(inner=True)
def take_block(blocks, owner):
    """Return the number of the next free block, now with one reference.

    It keeps its hash: the caller clears the hashes of many blocks at once, so that their cache
    misses overlap.
    """
    assert blocks.owners[owner].num_free > 0, "no block is free"
    if blocks.owners[owner].weighs:
        number = blocks.queues[owner, 0]
        blocks.owners[owner].level = max(blocks.owners[owner].level, blocks.worth_B[number].rank - heap.WANTED)
        share_block(blocks, owner, number)
        return number
    last_place = blocks.queues.shape[1] - 1
    while True:
        place = blocks.owners[owner].head & last_place
        number = blocks.queues[owner, place]
        blocks.owners[owner].head += 1
        if blocks.block_B[number].place == place:
            break
    blocks.block_B[number].refs = 1
    blocks.block_B[number].place = IN_USE
    blocks.owners[owner].num_free -= 1
    return number


@jit(inner=True)
def prefetch_free(blocks, owner, ahead, count):
    """Prefetch what `take_block` will touch for `count` blocks, after `ahead` others."""
    if blocks.owners[owner].weighs:
        return
    last_place = blocks.queues.shape[1] - 1
    for at in range(blocks.owners[owner].head + ahead, blocks.owners[owner].head + ahead + count):
        prefetch(blocks.block_B, (blocks.queues[owner, at & last_place],))


@jit(inner=True)
def share_block(blocks, owner, number):
    """Add a reference. A free block's entry stays in the queue, but is no longer valid."""
    if blocks.block_B[number].refs == 0:
        if blocks.owners[owner].weighs:
            heap.remove(blocks.queues[owner], blocks.block_B, blocks.worth_B, blocks.owners[owner].num_free, number)
        blocks.block_B[number].place = IN_USE
        blocks.owners[owner].num_free -= 1
    blocks.block_B[number].refs += 1


@jit(inner=True)
def drop_block(blocks, owner, number):
    """Drop a reference; free the block if it was the last: to the queue's end with a hash, else to its head.

    Call `compact_queues` first, so that the queue has a place for it.
    """
    assert blocks.block_B[number].refs > 0, "freed too often"
    blocks.block_B[number].refs -= 1
    if blocks.block_B[number].refs > 0:
        return
    if blocks.owners[owner].weighs:
        blocks.worth_B[number].freed = blocks.owners[owner].clock
        blocks.owners[owner].clock += 1
        blocks.worth_B[number].rank = _rank(blocks, owner, number)
        heap.push(blocks.queues[owner], blocks.block_B, blocks.worth_B, blocks.owners[owner].num_free, number)
        blocks.owners[owner].num_free += 1
        return
    last_place = blocks.queues.shape[1] - 1
    if blocks.block_B[number].chain == UNHASHED:
        blocks.owners[owner].head -= 1
        place = blocks.owners[owner].head & last_place
    else:
        place = blocks.owners[owner].tail & last_place
        blocks.owners[owner].tail += 1
    blocks.queues[owner, place] = number
    blocks.block_B[number].place = place
    blocks.owners[owner].num_free += 1


@jit(inner=True)
def _rank(blocks, owner, number):
    """Return the rank of a block among the free ones of an owner that weighs; see `snapshots`."""
    if blocks.block_B[number].chain == UNHASHED:
        return heap.NO_HASH
    if blocks.worth_B[number].followers == 1:
        return heap.SUPERSEDED
    return heap.WANTED + blocks.owners[owner].level + blocks.worth_B[number].gain


@jit(inner=True)
def weigh_block(blocks, owner, number):
    """Find a block's place among the free ones anew, as its hash or its worth has changed, if it is one of them."""
    if blocks.owners[owner].weighs and blocks.block_B[number].place != IN_USE:
        blocks.worth_B[number].rank = _rank(blocks, owner, number)
        place = blocks.block_B[number].place
        heap.sift(blocks.queues[owner], blocks.block_B, blocks.worth_B, blocks.owners[owner].num_free, place)


@jit(inner=True)
def compact_queues(blocks):
    """Remove invalid entries from the free queues where there are many, so that every block finds a place."""
    num_places = blocks.queues.shape[1]
    for owner in range(len(blocks.owners)):
        if blocks.owners[owner].tail - blocks.owners[owner].head > num_places - blocks.num_blocks:
            end = blocks.owners[owner].head
            for at in range(blocks.owners[owner].head, blocks.owners[owner].tail):
                place = at & (num_places - 1)
                number = blocks.queues[owner, place]
                if blocks.block_B[number].place == place:
                    blocks.queues[owner, end & (num_places - 1)] = number
                    blocks.block_B[number].place = end & (num_places - 1)
                    end += 1
            blocks.owners[owner].tail = end


@jit
def drop(blocks, number_B):
    """Drop a reference to each block, in reverse order."""
    compact_queues(blocks)
    for number in number_B[::-1]:
        drop_block(blocks, number // blocks.num_blocks, number)


@jit
def walk_free(blocks, owner, number_B):
    """Write an owner's free blocks in order; return their number, or -1 if there are too many."""
    last_place, count = blocks.queues.shape[1] - 1, 0
    if blocks.owners[owner].weighs:
        for place in range(min(blocks.owners[owner].num_free, len(number_B))):
            number_B[place] = blocks.queues[owner, place]
        return -1 if blocks.owners[owner].num_free > len(number_B) else blocks.owners[owner].num_free
    for at in range(blocks.owners[owner].head, blocks.owners[owner].tail):
        number = blocks.queues[owner, at & last_place]
        if blocks.block_B[number].place == at & last_place:
            if count == len(number_B):
                return -1
            number_B[count] = number
            count += 1
    return count
