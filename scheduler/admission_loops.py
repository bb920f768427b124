"""Which waiting requests start, and where: compiled, for many requests at a time.

Shape letters as in `block_loops`, and A requests, P ranks, N rows of the running table, U buckets.
"""

from typing import NamedTuple

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler.block_loops import NOBODY, extend, find_prefix, guess, upper_halves

jit = compiler(__file__, sources="*_loops.py", _nrt=False)  # see block_loops


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


@jit
def name_requests(factors_W4s, tokens, token_offsets_A1, sum_A4, name_offsets_A1, name_W2):
    """The names of prefixes that fill whole blocks, request by request; `sum_A4`, the empty prefixes', become the last ones'."""
    size = factors_W4s.shape[2]
    for i in range(len(sum_A4)):
        for block in range(name_offsets_A1[i + 1] - name_offsets_A1[i]):
            extend(factors_W4s, block, tokens, token_offsets_A1[i] + block * size, sum_A4, i)
            at = name_offsets_A1[i] + block
            name_W2[at, 0], name_W2[at, 1] = upper_halves(sum_A4, i)


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
def arriving(rows, arriving_U):
    """Put the first half of the next name of every running request that has still to compute whole blocks into a set."""
    for at in range(len(arriving_U)):
        arriving_U[at] = np.uint64(0)
    for row in range(len(rows.rank_N)):
        if rows.running_N[row] and rows.num_known_N[row] >= (rows.num_named_N[row] + 1) * rows.block_size:
            in_set(arriving_U, rows.name_NW2[row, rows.num_named_N[row], 0], True)


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
