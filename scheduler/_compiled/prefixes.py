"""Compiled loops over the hashes of blocks: the table in which prefixes are found, and the hashes of tokens.

Letters as in `blocks`, and 4 the lanes of a hash's running sum.
"""

import numpy as np
from numba import types

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import (
    END,
    NONE,
    UNHASHED,
    compact_queues,
    drop_block,
    prefetch,
    share_block,
    take_block,
    weigh_block,
)

jit = compiler(__file__, _nrt=False)  # see blocks

_LOW_HALF = np.uint64(2**32 - 1)
_HALF = np.uint64(32)
_OWNER_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads the owners over the buckets
TOKENS = types.Array(types.int32, 1, "C", readonly=True)


@jit(inner=True, inline="always")
def bucket_of(blocks, owner, hash0):
    """Return the bucket of an owner's blocks whose hash begins with `hash0`."""
    return (hash0 ^ (np.uint64(owner) * _OWNER_FACTOR)) & np.uint64(len(blocks.buckets) - 1)


@jit(inner=True, inline="always")
def _set_holder(blocks, hash1, rank):
    place = hash1 & np.uint64(len(blocks.holders) - 1)
    blocks.holders[place] = (hash1 & ~_LOW_HALF) | np.uint64(rank - NONE)


@jit(inner=True)
def prefetch_hash(blocks, owner, hash0, hash1):
    """Prefetch what `set_block_hash` and `find_block` will touch."""
    prefetch(blocks.buckets, (bucket_of(blocks, owner, hash0),))
    prefetch(blocks.holders, (hash1 & np.uint64(len(blocks.holders) - 1),))


@jit(inner=True)
def prefetch_bucket(blocks, number):
    """Prefetch the bucket that `clear_block_hash` will touch."""
    prefetch(blocks.buckets, (bucket_of(blocks, number // blocks.num_blocks, blocks.block_B[number].hash0),))


@jit(inner=True)
def prefetch_chain(blocks, number):
    """Prefetch the first block of that bucket; call `prefetch_bucket` some time before."""
    bucket = bucket_of(blocks, number // blocks.num_blocks, blocks.block_B[number].hash0)
    prefetch(blocks.block_B, (blocks.buckets[bucket],))


@jit(inner=True)
def set_block_hash(blocks, owner, number, hash0, hash1):
    """Put a block into the prefix cache under this hash."""
    bucket = bucket_of(blocks, owner, hash0)
    blocks.block_B[number].chain = blocks.buckets[bucket]
    blocks.buckets[bucket] = number
    blocks.block_B[number].hash0, blocks.block_B[number].hash1 = hash0, hash1
    _set_holder(blocks, hash1, owner % blocks.num_ranks)


@jit(inner=True)
def clear_block_hash(blocks, number):
    """Remove a block from the prefix cache, if it is there."""
    if blocks.block_B[number].chain == UNHASHED:
        return
    owner = number // blocks.num_blocks
    bucket = bucket_of(blocks, owner, blocks.block_B[number].hash0)
    other = blocks.buckets[bucket]
    if other == number:
        blocks.buckets[bucket] = blocks.block_B[number].chain
    else:
        while blocks.block_B[other].chain != number:
            other = blocks.block_B[other].chain
        blocks.block_B[other].chain = blocks.block_B[number].chain
    blocks.block_B[number].chain = UNHASHED
    weigh_block(blocks, owner, number)


@jit(inner=True)
def find_block(blocks, owner, hash0, hash1):
    """Return the number of a block of this owner with this hash, or `NONE`."""
    number = blocks.buckets[bucket_of(blocks, owner, hash0)]
    start = owner * blocks.num_blocks
    while number != END:
        same = blocks.block_B[number].hash0 == hash0 and blocks.block_B[number].hash1 == hash1
        if same and start <= number < start + blocks.num_blocks:
            _set_holder(blocks, hash1, owner % blocks.num_ranks)
            return number
        number = blocks.block_B[number].chain
    return np.int32(NONE)


@jit
def guess_prefix(blocks, hash_B2, max_misses):
    """Return how many leading blocks of a request some rank probably has, and that rank, or 0 and `NONE`.

    The search ends after more than `max_misses` consecutive unknown hashes.
    """
    depth, rank, misses = 0, np.int64(NONE), 0
    for b in range(len(hash_B2)):
        hash1 = hash_B2[b, 1]
        entry = blocks.holders[hash1 & np.uint64(len(blocks.holders) - 1)]
        misses += 1
        if (entry ^ hash1) <= _LOW_HALF and (entry & _LOW_HALF) != np.uint64(0):
            depth, rank, misses = b + 1, np.int64(entry & _LOW_HALF) + NONE, 0
        if misses > max_misses:
            break
    return depth, rank


@jit
def take(blocks, owner_B, ids_B):
    """Allocate one block for every entry of `owner_B`."""
    for i in range(len(owner_B)):
        ids_B[i] = take_block(blocks, owner_B[i]) - owner_B[i] * blocks.num_blocks
    for i in range(len(owner_B)):
        clear_block_hash(blocks, owner_B[i] * blocks.num_blocks + ids_B[i])


@jit(inner=True)
def forget_block(blocks, owner, number):
    """Remove a free block from the prefix cache, so that it is the next to be allocated."""
    compact_queues(blocks)
    share_block(blocks, owner, number)
    clear_block_hash(blocks, number)
    drop_block(blocks, owner, number)


@jit
def walk_chains(blocks, number_B):
    """Write the blocks that have hashes; return their number, or -1 if a chain is wrong."""
    count = 0
    for bucket in range(len(blocks.buckets)):
        number = blocks.buckets[bucket]
        while number != END:
            owner = number // blocks.num_blocks
            if count == len(number_B) or bucket_of(blocks, owner, blocks.block_B[number].hash0) != bucket:
                return -1
            number_B[count] = number
            number, count = blocks.block_B[number].chain, count + 1
    return count


@jit(inner=True, inline="always")
def first_seen(caches, cache, num_computed):
    """Return the index of the first block that the token at position `num_computed` attends to."""
    return max(num_computed - caches.window_C[cache] + 1, 0) // caches.size_C[cache]


@jit(inner=True, inline="always")
def extend(factors_B4s, block, tokens, start, sum_A4, at):
    """Add block `block` of a request, at `start` of `tokens`, to the running sum `sum_A4[at]`; see `prefix_cache`."""
    first, second, third, fourth = sum_A4[at, 0], sum_A4[at, 1], sum_A4[at, 2], sum_A4[at, 3]
    for i in range(factors_B4s.shape[2]):
        # Token + 1: with 0, a prefix and its continuation by tokens 0 would have the same hash.
        character = np.uint64(tokens[start + i]) + np.uint64(1)
        first += factors_B4s[block, 0, i] * character
        second += factors_B4s[block, 1, i] * character
        third += factors_B4s[block, 2, i] * character
        fourth += factors_B4s[block, 3, i] * character
    sum_A4[at, 0], sum_A4[at, 1], sum_A4[at, 2], sum_A4[at, 3] = first, second, third, fourth


@jit(inner=True, inline="always")
def upper_halves(sum_A4, at):
    """Return the two halves of the block hash of a running sum."""
    first = (sum_A4[at, 0] >> _HALF) | (sum_A4[at, 1] & ~_LOW_HALF)
    return first, (sum_A4[at, 2] >> _HALF) | (sum_A4[at, 3] & ~_LOW_HALF)


@jit(
    signature=types.void(
        types.Array(types.uint64, 3, "C"), TOKENS, types.Array(types.uint64, 1, "C"), types.Array(types.uint64, 2, "C")
    )
)
def hash_blocks(factors_B4s, tokens, empty_4, hash_B2):
    """Write the hashes of the full blocks of `tokens`, and after them the last running sum.

    `empty_4`: the running sum of no tokens.
    """
    num_blocks, size = len(hash_B2) - 2, factors_B4s.shape[2]
    sum_14 = hash_B2[num_blocks:].reshape(1, 4)
    for lane in range(4):
        sum_14[0, lane] = empty_4[lane]
    for block in range(num_blocks):
        extend(factors_B4s, block, tokens, block * size, sum_14, 0)
        hash_B2[block, 0], hash_B2[block, 1] = upper_halves(sum_14, 0)


@jit(inner=True)
def _has_tails(caches, blocks, rank, hash_B2, depth, block_size):
    """Return whether a rank has the blocks in the windows of the token after `depth` blocks."""
    for cache in range(len(caches.size_C)):
        hashes = caches.hashes_C[cache]
        if depth % hashes and caches.window_C[cache] > 1:  # otherwise nothing of the prefix is read
            return False
        owner = cache * blocks.num_ranks + rank
        for index in range(depth // hashes - 1, first_seen(caches, cache, depth * block_size) - 1, -1):
            last = (index + 1) * hashes - 1
            if find_block(blocks, owner, hash_B2[last, 0], hash_B2[last, 1]) == NONE:
                return False
    return True


@jit(inner=True)
def find_prefix(caches, blocks, rank, hash_B2, block_size, taken_C):
    """Return how many of a request's first blocks a rank has in every cache; `taken_C`: the free blocks among them."""
    depth = len(hash_B2)
    for cache in range(len(caches.size_C)):
        if caches.window_C[cache] > depth * block_size:  # every block of the prefix is needed
            owner, first = cache * blocks.num_ranks + rank, 0
            while first < depth and find_block(blocks, owner, hash_B2[first, 0], hash_B2[first, 1]) != NONE:
                first += 1
            depth = first
    while depth and not _has_tails(caches, blocks, rank, hash_B2, depth, block_size):
        depth -= 1
    for cache in range(len(caches.size_C)):
        hashes, owner, taken_C[cache] = caches.hashes_C[cache], cache * blocks.num_ranks + rank, 0
        for index in range(first_seen(caches, cache, depth * block_size), depth // hashes):
            last = (index + 1) * hashes - 1
            taken_C[cache] += blocks.block_B[find_block(blocks, owner, hash_B2[last, 0], hash_B2[last, 1])].refs == 0
    return depth


@jit(signature=types.boolean(TOKENS, types.int64))
def all_below(tokens, vocab_size):
    """Return whether all token ids are in [0, vocab_size)."""
    num_wrong = 0
    for token in tokens:
        num_wrong += (token < 0) | (token >= vocab_size)
    return num_wrong == 0
