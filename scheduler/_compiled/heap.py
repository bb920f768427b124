"""A binary heap of an owner's free blocks, the least worth keeping first.

Free snapshots of recurrent states are evicted by what it would cost to do without them (see `snapshots`); free blocks of other
caches wait in a ring (see `blocks`). `heap` holds numbers of blocks in its first `count` places; a block's `place` is its place
there, so that any block can be taken out in O(log count).

Letters as in `blocks`.
"""

import numpy as np

from expertwire.compiled import compiler

jit = compiler(__file__, _nrt=False)  # see blocks

# What decides which free block is evicted: the one of the least rank, of these the one freed first.
WORTH = np.dtype(
    [
        (
            "rank",
            np.int64,
        ),  # `NO_HASH`, `SUPERSEDED`, or `WANTED` and the level of its owner when it was freed and `gain`
        ("freed", np.int64),  # time
        ("gain", np.int32),  # tokens to compute anew if it is evicted
        ("followers", np.int32),  # snapshots that were left right behind this one
    ]
)
NO_HASH, SUPERSEDED, WANTED = 0, 1, 2


@jit(inner=True, inline="always")
def _before(worth_B, first, second):
    if worth_B[first].rank != worth_B[second].rank:
        return worth_B[first].rank < worth_B[second].rank
    return worth_B[first].freed < worth_B[second].freed


@jit(inner=True)
def _put(heap, block_B, place, number):
    heap[place] = number
    block_B[number].place = place


@jit(inner=True)
def sift(heap, block_B, worth_B, count, place):
    """Move the block at `place`, whose worth has changed, to where it belongs."""
    number = heap[place]
    while place > 0 and _before(worth_B, number, heap[(place - 1) // 2]):
        _put(heap, block_B, place, heap[(place - 1) // 2])
        place = (place - 1) // 2
    while 2 * place + 1 < count:
        child = 2 * place + 1
        if child + 1 < count and _before(worth_B, heap[child + 1], heap[child]):
            child += 1
        if not _before(worth_B, heap[child], number):
            break
        _put(heap, block_B, place, heap[child])
        place = child
    _put(heap, block_B, place, number)


@jit(inner=True)
def push(heap, block_B, worth_B, count, number):
    """Add a block to `count` others."""
    _put(heap, block_B, count, number)
    sift(heap, block_B, worth_B, count + 1, count)


@jit(inner=True)
def remove(heap, block_B, worth_B, count, number):
    """Take a block out of the `count` that there are."""
    place, last = block_B[number].place, heap[count - 1]
    if last != number:
        _put(heap, block_B, place, last)
        sift(heap, block_B, worth_B, count - 1, place)
