"""Which waiting requests start, and where: compiled, for many requests at a time.

Shape letters as in `block_loops`, and A requests, P ranks, N rows of the running table, U buckets.
"""

from typing import NamedTuple

import numpy as np
from numba import types

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import NOBODY, TOKENS, extend, find_prefix, guess, prefetch, upper_halves
from expertwire.scheduler._compiled.steps import promised

jit = compiler(__file__, _nrt=False)  # see blocks

_FACTORS = types.Array(types.uint64, 3, "C")
_WORDS = types.Array(types.uint64, 1, "C")


class Room(NamedTuple):
    """What every rank has left for new requests in a step, and its load."""

    slots_P: np.ndarray  # i64, as all but the last two
    budget_P: np.ndarray  # tokens of the step
    blocks_GP: np.ndarray
    load_P: np.ndarray  # f64
    fits_P: np.ndarray  # bool: who has room for the request looked at


class Candidates(NamedTuple):
    """Waiting requests, in the order in which they may start."""

    num_tokens_A: np.ndarray  # i64
    load_A: np.ndarray  # f64, what each adds to a rank that has nothing of it
    first_A: np.ndarray  # i64: its names are those from here on,
    useful_A: np.ndarray  # so many, of blocks that need not be computed where a rank has them
    name_W2: np.ndarray  # u64


class Chosen(NamedTuple):
    """What becomes of the candidates, as in `table.Admissions`; untouched where nothing was decided."""

    rank_A: np.ndarray  # or `NOBODY`: it waits on
    num_cached_A: np.ndarray
    num_scheduled_A: np.ndarray


@jit(signature=types.void(_FACTORS, TOKENS, _WORDS, types.Array(types.uint64, 2, "C")))
def name_tokens(factors_W4s, tokens, empty_4, name_W2):
    """Fill in the names of prefixes that fill whole blocks, and behind them the last one's sum; `empty_4`: the empty prefix's."""
    num_blocks, size = len(name_W2) - 2, factors_W4s.shape[2]
    sum_14 = name_W2[num_blocks:].reshape(1, 4)
    for lane in range(4):
        sum_14[0, lane] = empty_4[lane]
    for block in range(num_blocks):
        extend(factors_W4s, block, tokens, block * size, sum_14, 0)
        name_W2[block, 0], name_W2[block, 1] = upper_halves(sum_14, 0)


@jit
def place(fits_P, load_P, favoured, worth):
    """The rank with the least load among those that fit, the lowest of equals, or `favoured`, if it is a rank that fits and whose
    load less `worth` is no larger; -1 if none fits."""
    best = -1
    for rank in range(len(fits_P)):
        if fits_P[rank] and (best < 0 or load_P[rank] < load_P[best]):
            best = rank
    if best >= 0 and favoured >= 0 and fits_P[favoured] and load_P[favoured] - worth <= load_P[best]:
        best = favoured
    return best


@jit
def balanced(num_tokens_A, num_computed_A, num_left_A, horizon, kv_share, load_A):
    """`placement.Balanced.load`."""
    for i in range(len(load_A)):
        left = min(num_left_A[i], horizon)
        load_A[i] = num_tokens_A[i] - num_computed_A[i] + left * (1 + kv_share * num_tokens_A[i])


@jit
def needs(caches, num_tokens, needed_G):
    """What blocks so many tokens of one request need."""
    for group in range(len(needed_G)):
        needed_G[group] = min(-(-num_tokens // caches.size_G[group]), caches.most_G[group])


@jit
def fits(room, rank, needed_G):
    """Whether a rank has a slot, tokens and these blocks left."""
    if room.slots_P[rank] <= 0 or room.budget_P[rank] <= 0:
        return False
    enough = True
    for group in range(len(needed_G)):
        enough &= room.blocks_GP[group, rank] >= needed_G[group]
    return enough


@jit
def take(room, rank, needed_G, num_new, load):
    """Count a request that needs these blocks, and one for its next token: how many of its `num_new` tokens it may compute."""
    num_scheduled = min(num_new, room.budget_P[rank])
    room.budget_P[rank] -= num_scheduled
    room.slots_P[rank] -= 1
    room.load_P[rank] += load
    for group in range(len(needed_G)):
        room.blocks_GP[group, rank] -= needed_G[group] + 1
    return num_scheduled


@jit
def take_stock(caches, rows, room, arriving_U, due_N):
    """Take what the table's rows have, and will need, from the room of empty ranks; and put the first half of the next name of
    every running request that has still to compute whole blocks into a set. `due_N` is for its own use."""
    num_due = 0
    for at in range(len(arriving_U)):
        arriving_U[at] = np.uint64(0)
    for rank in range(len(room.slots_P)):
        num_occupied, num_running = 0, 0
        for at in range(rank * rows.per_rank, (rank + 1) * rows.per_rank):
            row = rows.row_N[at]
            num_occupied += rows.occupied_N[at]
            if not rows.running_N[at]:
                continue
            num_running += 1
            if row.num_tokens > row.num_held:
                for group in range(len(caches.size_G)):
                    room.blocks_GP[group, rank] -= promised(caches, rows, group, at)
            if row.num_known >= (row.num_named + 1) * rows.block_size:
                prefetch(rows.name_NW2, (at, row.num_named, 0))
                due_N[num_due] = at
                num_due += 1
        room.slots_P[rank] -= num_occupied
        for group in range(len(caches.size_G)):
            room.blocks_GP[group, rank] -= num_running  # what their next tokens will need
    for at in due_N[:num_due]:
        in_set(arriving_U, rows.name_NW2[at, rows.row_N[at].num_named, 0], True)


@jit
def in_set(arriving_U, first, add):
    """Whether a name, by its first half, is in the set, which has room; it is, then, if `add`."""
    first |= np.uint64(1)  # 0 is an empty place
    at = first >> np.uint64(1) & np.uint64(len(arriving_U) - 1)
    while arriving_U[at] != first:
        if arriving_U[at] == np.uint64(0):
            if add:
                arriving_U[at] = first
            return False
        at = (at + np.uint64(1)) & np.uint64(len(arriving_U) - 1)
    return True


@jit
def _find_rank(caches, blocks, block_size, room, num_tokens, name_W2, held, num_held, worth, needed_G, taken_G):
    """The rank for a request, and how many of its tokens that has, of those that `name_W2` names; `held`, if it is a rank, has
    `num_held`, so much is `worth`, and sharing them takes `taken_G` free blocks there. `needed_G` are the blocks needed then."""
    needs(caches, num_tokens, needed_G)
    for rank in range(len(room.fits_P)):
        room.fits_P[rank] = fits(room, rank, needed_G)
    rank = place(room.fits_P, room.load_P, held, worth)
    if rank >= 0 and (rank == held or not num_held):
        return rank, num_held
    if rank >= 0:
        return rank, find_prefix(caches, blocks, rank, name_W2, block_size, taken_G) * block_size
    if num_held:  # there is room, perhaps, beside what it shares
        needs(caches, num_tokens - num_held, needed_G)
        for group in range(len(needed_G)):
            needed_G[group] += taken_G[group]
        if fits(room, held, needed_G):
            return held, num_held
    return NOBODY, 0


@jit
def choose(caches, blocks, block_size, room, candidates, credit, arriving_U, chosen, needed_G, taken_G):
    """Decide about candidates, one after another, until one finds no room: about how many.

    `credit`: the load that a token makes up for which a rank has already; negative: that does not draw requests there.
    `needed_G` and `taken_G` are for its own use.
    """
    for i in range(len(candidates.num_tokens_A)):
        first = candidates.first_A[i]
        name_W2 = candidates.name_W2[first : first + candidates.useful_A[i]]
        depth, held = guess(blocks, name_W2, caches.patience)
        if depth:
            depth = find_prefix(caches, blocks, held, name_W2, block_size, taken_G)
        chosen.rank_A[i] = NOBODY
        if depth < len(name_W2) and in_set(arriving_U, name_W2[depth, 0], False):
            continue  # its next block is being computed: it does better to wait for that
        num_tokens, num_held = candidates.num_tokens_A[i], depth * block_size
        worth = credit * num_held if credit >= 0.0 else -np.inf
        rank, num_cached = _find_rank(
            caches, blocks, block_size, room, num_tokens, name_W2, held, num_held, worth, needed_G, taken_G
        )
        if rank < 0:
            return i
        load = candidates.load_A[i] - max(credit, 0.0) * num_cached
        chosen.num_scheduled_A[i] = take(room, rank, needed_G, num_tokens - num_cached, load)
        chosen.rank_A[i], chosen.num_cached_A[i] = rank, num_cached
        if depth < len(name_W2):
            in_set(arriving_U, name_W2[depth, 0], True)
    return len(candidates.num_tokens_A)
