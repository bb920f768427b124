"""Loops over blocks and their names, compiled: what is done thousands of times a step. `block_pool` makes the arrays and says
what they mean.

Shape letters: G caches, P ranks, O = G * P owners of blocks (a rank's cache), B blocks of all owners, numbered through (owner *
num_blocks + id), Q places of an owner's queue, a power of two, U buckets, W blocks of one request, s tokens in a block; 4 the
lanes of a name's sum.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from expertwire.compiled import compiler

END = -1  # of a bucket's chain
UNNAMED = -2  # in no chain
NOWHERE = -1  # in the queue of free blocks
NOBODY = -1
_LOW_HALF = np.uint64(2**32 - 1)
_HALF = np.uint64(32)
_OWNER_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads the owners over the buckets
TOKENS = types.Array(types.int32, 1, "C", readonly=True)  # which may be written or not

# These functions keep no array and make none. Otherwise numba would count references to all arrays of a tuple, with atomic
# instructions, wherever one is handed on: half of the time of some loops.
jit = compiler(__file__, _nrt=False)

# Together, in half a cache line, as memory is what these loops wait for.
BLOCK = np.dtype(
    [
        ("refs", np.int32),
        ("place", np.int32),  # in the queue of free blocks
        ("chain", np.int32),  # the next block in the same bucket
        ("reserved", np.int32),
        ("first", np.uint64),  # half of its name
        ("second", np.uint64),
    ]
)


@intrinsic
def prefetch(context, array, index):  # type: ignore[no-untyped-def]
    """Have the processor fetch the item at `index`, a tuple, which is needed soon; it goes on meanwhile."""

    def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
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
    """What the caches are: of each, i64 [G]."""

    size_G: np.ndarray  # tokens in a block
    window_G: np.ndarray  # tokens that a token sees, itself included
    names_G: np.ndarray  # prefix names in a block: one, or as many as it is larger than the others' blocks
    most_G: np.ndarray  # blocks that one request can hold
    patience: int  # how many blocks of a prefix in a row may have been forgotten


class Blocks(NamedTuple):
    """Blocks and their names; see `block_pool`. An owner's queue is a ring: its entries from `head` to `tail` that are also their
    blocks' `place` are its free blocks. The others are left from blocks that were taken out of the middle."""

    num_blocks: int
    num_ranks: int
    block_B: np.ndarray  # BLOCK
    num_free_O: np.ndarray  # i64
    queue_OQ: np.ndarray  # i32
    head_O: np.ndarray  # i64; modulo Q
    tail_O: np.ndarray
    first_U: np.ndarray  # i32, of a bucket's chain
    guess: np.ndarray  # u64: the upper half of a name's second half, and beneath it the rank, from `NOBODY` on


# ---- blocks: references and the queues of free ones


@jit
def take_block(blocks, owner):
    """The free block that goes first, with one reference. It still has its name: taking many names off at the end is faster, as
    the memory's answers for one block need not wait for those for another."""
    assert blocks.num_free_O[owner] > 0, "no block is free"
    last_place = blocks.queue_OQ.shape[1] - 1
    while True:
        place = blocks.head_O[owner] & last_place
        number = blocks.queue_OQ[owner, place]
        blocks.head_O[owner] += 1
        if blocks.block_B[number].place == place:
            break
    blocks.block_B[number].refs = 1
    blocks.block_B[number].place = NOWHERE
    blocks.num_free_O[owner] -= 1
    return number


@jit
def fetch_free(blocks, owner, ahead, count):
    """What taking so many blocks, after `ahead` others, will touch."""
    last_place = blocks.queue_OQ.shape[1] - 1
    for at in range(blocks.head_O[owner] + ahead, blocks.head_O[owner] + ahead + count):
        prefetch(blocks.block_B, (blocks.queue_OQ[owner, at & last_place],))


@jit
def share_block(blocks, owner, number):
    """Add a reference. A free block's entry in the queue stays there, but counts no more."""
    if blocks.block_B[number].refs == 0:
        blocks.block_B[number].place = NOWHERE
        blocks.num_free_O[owner] -= 1
    blocks.block_B[number].refs += 1


@jit
def drop_block(blocks, owner, number):
    """Drop a reference. Without any left, a block with a name goes last, one without goes first: `make_room` first."""
    assert blocks.block_B[number].refs > 0, "freed too often"
    blocks.block_B[number].refs -= 1
    if blocks.block_B[number].refs > 0:
        return
    last_place = blocks.queue_OQ.shape[1] - 1
    if blocks.block_B[number].chain == UNNAMED:
        blocks.head_O[owner] -= 1
        place = blocks.head_O[owner] & last_place
    else:
        place = blocks.tail_O[owner] & last_place
        blocks.tail_O[owner] += 1
    blocks.queue_OQ[owner, place] = number
    blocks.block_B[number].place = place
    blocks.num_free_O[owner] += 1


@jit
def make_room(blocks):
    """See to it that all blocks find a place in their queues: take out the entries that do not count, where there are many."""
    num_places = blocks.queue_OQ.shape[1]
    for owner in range(len(blocks.head_O)):
        if blocks.tail_O[owner] - blocks.head_O[owner] > num_places - blocks.num_blocks:
            end = blocks.head_O[owner]
            for at in range(blocks.head_O[owner], blocks.tail_O[owner]):
                place = at & (num_places - 1)
                number = blocks.queue_OQ[owner, place]
                if blocks.block_B[number].place == place:
                    blocks.queue_OQ[owner, end & (num_places - 1)] = number
                    blocks.block_B[number].place = end & (num_places - 1)
                    end += 1
            blocks.tail_O[owner] = end


@jit
def take(blocks, owner_B, ids_B):
    """Hand out one block for every entry of `owner_B`."""
    for i in range(len(owner_B)):
        ids_B[i] = take_block(blocks, owner_B[i]) - owner_B[i] * blocks.num_blocks
    for i in range(len(owner_B)):
        forget_name(blocks, owner_B[i] * blocks.num_blocks + ids_B[i])


@jit
def drop(blocks, number_B):
    """Drop a reference to each, to the last one first."""
    make_room(blocks)
    for number in number_B[::-1]:
        drop_block(blocks, number // blocks.num_blocks, number)


# ---- blocks: names


@jit(inline="always")
def bucket_of(blocks, owner, first):
    """Where an owner's block with a name of this first half is found."""
    return (first ^ (np.uint64(owner) * _OWNER_FACTOR)) & np.uint64(len(blocks.first_U) - 1)


@jit(inline="always")
def _remember(blocks, second, rank):
    place = second & np.uint64(len(blocks.guess) - 1)
    blocks.guess[place] = (second & ~_LOW_HALF) | np.uint64(rank - NOBODY)


@jit
def fetch_name(blocks, owner, first, second):
    """What giving a block this name, or looking for one, will touch."""
    prefetch(blocks.first_U, (bucket_of(blocks, owner, first),))
    prefetch(blocks.guess, (second & np.uint64(len(blocks.guess) - 1),))


@jit
def fetch_bucket(blocks, number):
    """What taking the name off a block will touch, besides the block."""
    prefetch(blocks.first_U, (bucket_of(blocks, number // blocks.num_blocks, blocks.block_B[number].first),))


@jit
def fetch_chain(blocks, number):
    """Likewise, once that is there: the first block of the same bucket."""
    bucket = bucket_of(blocks, number // blocks.num_blocks, blocks.block_B[number].first)
    prefetch(blocks.block_B, (blocks.first_U[bucket],))


@jit
def name_block(blocks, owner, number, first, second):
    bucket = bucket_of(blocks, owner, first)
    blocks.block_B[number].chain = blocks.first_U[bucket]
    blocks.first_U[bucket] = number
    blocks.block_B[number].first, blocks.block_B[number].second = first, second
    _remember(blocks, second, owner % blocks.num_ranks)


@jit
def forget_name(blocks, number):
    """Take its name off a block, if it has one."""
    if blocks.block_B[number].chain == UNNAMED:
        return
    owner = number // blocks.num_blocks
    bucket = bucket_of(blocks, owner, blocks.block_B[number].first)
    other = blocks.first_U[bucket]
    if other == number:
        blocks.first_U[bucket] = blocks.block_B[number].chain
    else:
        while blocks.block_B[other].chain != number:
            other = blocks.block_B[other].chain
        blocks.block_B[other].chain = blocks.block_B[number].chain
    blocks.block_B[number].chain = UNNAMED


@jit
def find_block(blocks, owner, first, second):
    """A block of this owner with this name, or `NOBODY`."""
    number = blocks.first_U[bucket_of(blocks, owner, first)]
    start = owner * blocks.num_blocks
    while number != END:
        same = blocks.block_B[number].first == first and blocks.block_B[number].second == second
        if same and start <= number < start + blocks.num_blocks:
            _remember(blocks, second, owner % blocks.num_ranks)
            return number
        number = blocks.block_B[number].chain
    return np.int32(NOBODY)


@jit
def guess(blocks, name_M2, patience):
    """Of these names of one request, how many there are up to the last one that anybody is known to have had, and which rank that
    was; 0 and `NOBODY` if there is none. It ends at more than `patience` unknown ones in a row."""
    depth, rank, misses = 0, NOBODY, 0
    for m in range(len(name_M2)):
        second = name_M2[m, 1]
        entry = blocks.guess[second & np.uint64(len(blocks.guess) - 1)]
        misses += 1
        if (entry ^ second) <= _LOW_HALF and (entry & _LOW_HALF) != np.uint64(0):
            depth, rank, misses = m + 1, np.int64(entry & _LOW_HALF) + NOBODY, 0
        if misses > patience:
            break
    return depth, rank


@jit
def walk_free(blocks, owner, number_B):
    """The free blocks of an owner, in order; how many, or -1 if there are too many."""
    last_place, count = blocks.queue_OQ.shape[1] - 1, 0
    for at in range(blocks.head_O[owner], blocks.tail_O[owner]):
        number = blocks.queue_OQ[owner, at & last_place]
        if blocks.block_B[number].place == at & last_place:
            if count == len(number_B):
                return -1
            number_B[count] = number
            count += 1
    return count


@jit
def walk_chains(blocks, number_B):
    """The blocks with names, bucket by bucket; how many, or -1 if one is in a wrong bucket or there are too many."""
    count = 0
    for bucket in range(len(blocks.first_U)):
        number = blocks.first_U[bucket]
        while number != END:
            owner = number // blocks.num_blocks
            if count == len(number_B) or bucket_of(blocks, owner, blocks.block_B[number].first) != bucket:
                return -1
            number_B[count] = number
            number, count = blocks.block_B[number].chain, count + 1
    return count


# ---- prefixes


@jit(inline="always")
def first_seen(caches, group, num_computed):
    """The first block that the token behind so many computed ones sees."""
    return max(num_computed - caches.window_G[group] + 1, 0) // caches.size_G[group]


@jit(inline="always")
def extend(factors_W4s, block, tokens, start, sum_A4, at):
    """Add block `block` of a request, at `start` of the tokens, to its sum, which is at `at`; see `prefix`."""
    first, second, third, fourth = sum_A4[at, 0], sum_A4[at, 1], sum_A4[at, 2], sum_A4[at, 3]
    for i in range(factors_W4s.shape[2]):
        # One more than the token: otherwise a prefix would have the name of its continuation by zeros.
        character = np.uint64(tokens[start + i]) + np.uint64(1)
        first += factors_W4s[block, 0, i] * character
        second += factors_W4s[block, 1, i] * character
        third += factors_W4s[block, 2, i] * character
        fourth += factors_W4s[block, 3, i] * character
    sum_A4[at, 0], sum_A4[at, 1], sum_A4[at, 2], sum_A4[at, 3] = first, second, third, fourth


@jit(inline="always")
def upper_halves(sum_A4, at):
    """The two parts of the name that a sum makes."""
    first = (sum_A4[at, 0] >> _HALF) | (sum_A4[at, 1] & ~_LOW_HALF)
    return first, (sum_A4[at, 2] >> _HALF) | (sum_A4[at, 3] & ~_LOW_HALF)


@jit
def _has_tails(caches, blocks, rank, name_W2, depth, block_size):
    """Whether a rank has all that the token behind `depth` named blocks sees in the caches that are windows."""
    for group in range(len(caches.size_G)):
        names = caches.names_G[group]
        if depth % names:
            return False
        owner = group * blocks.num_ranks + rank
        for index in range(depth // names - 1, first_seen(caches, group, depth * block_size) - 1, -1):
            last = (index + 1) * names - 1
            if find_block(blocks, owner, name_W2[last, 0], name_W2[last, 1]) == NOBODY:
                return False
    return True


@jit
def find_prefix(caches, blocks, rank, name_W2, block_size, taken_G):
    """How many of a request's first named blocks a rank has, in every cache; `taken_G`: free blocks that sharing them takes."""
    depth = len(name_W2)
    for group in range(len(caches.size_G)):
        if caches.window_G[group] > depth * block_size:  # all of it is seen
            owner, first = group * blocks.num_ranks + rank, 0
            while first < depth and find_block(blocks, owner, name_W2[first, 0], name_W2[first, 1]) != NOBODY:
                first += 1
            depth = first
    while depth and not _has_tails(caches, blocks, rank, name_W2, depth, block_size):
        depth -= 1
    for group in range(len(caches.size_G)):
        names, owner, taken_G[group] = caches.names_G[group], group * blocks.num_ranks + rank, 0
        for index in range(first_seen(caches, group, depth * block_size), depth // names):
            last = (index + 1) * names - 1
            taken_G[group] += blocks.block_B[find_block(blocks, owner, name_W2[last, 0], name_W2[last, 1])].refs == 0
    return depth


@jit(signature=types.boolean(TOKENS, types.int64))
def all_below(tokens, vocab_size):
    """Whether all are ids of the vocabulary."""
    num_wrong = 0
    for token in tokens:
        num_wrong += (token < 0) | (token >= vocab_size)
    return num_wrong == 0
