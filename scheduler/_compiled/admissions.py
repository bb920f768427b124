"""Compiled loops that decide which waiting requests start, and on which ranks.

A requests, B blocks of a request, C KV cache groups, P ranks, Q entries of a hash table, Z slots of
all ranks.
"""

from typing import NamedTuple, Self

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import NONE, prefetch
from expertwire.scheduler._compiled.prefixes import find_prefix, guess_prefix
from expertwire.scheduler._compiled.rows import num_blocks_due
from expertwire.scheduler._compiled.snapshots import blocks_at_most

jit = compiler(__file__, _nrt=False)  # see blocks


class Budget(NamedTuple):
    """Slots, tokens and blocks that every rank has left for new requests in a step, and its load."""

    slots_P: np.ndarray  # i64, as the next two
    tokens_P: np.ndarray
    blocks_CP: np.ndarray
    load_P: np.ndarray  # f64
    fits_P: np.ndarray  # bool, scratch: ranks that can take the request at hand


class Candidates(NamedTuple):
    """Waiting requests in the order of admission."""

    num_tokens_A: np.ndarray  # i64
    load_A: np.ndarray  # f64, added to the load of a rank that has no block of the request
    first_A: np.ndarray  # i64, index of the request's first block hash
    num_hashes_A: np.ndarray  # i64, its leading blocks that need not be computed where a rank has them
    hash_B2: np.ndarray  # u64

    def after(self, first: int) -> Self:
        """Return the candidates from `first` on."""
        return self._replace(
            num_tokens_A=self.num_tokens_A[first:],
            load_A=self.load_A[first:],
            first_A=self.first_A[first:],
            num_hashes_A=self.num_hashes_A[first:],
        )


class Decisions(NamedTuple):
    """Decisions about candidates, as in `running.Admissions`; unchanged where none was made."""

    rank_A: np.ndarray  # or `NONE`: it keeps waiting
    num_cached_A: np.ndarray
    num_scheduled_A: np.ndarray


@jit
def pick_rank(fits_P, load_P, holder, worth):
    """Return the least loaded rank that fits, the lowest of equals, or -1.

    `holder`, a rank with part of the prefix or `NONE`, is preferred if its load less `worth` is not
    above that rank's load.
    """
    best = -1
    for rank in range(len(fits_P)):
        if fits_P[rank] and (best < 0 or load_P[rank] < load_P[best]):
            best = rank
    if best >= 0 and holder >= 0 and fits_P[holder] and load_P[holder] - worth <= load_P[best]:
        best = holder
    return best


@jit
def expected_work(num_tokens_A, num_computed_A, num_left_A, horizon, kv_share, load_A):
    """Compute `LeastLoaded.load`."""
    for i in range(len(load_A)):
        left = min(num_left_A[i], horizon)
        load_A[i] = num_tokens_A[i] - num_computed_A[i] + left * (1 + kv_share * num_tokens_A[i])


@jit
def blocks_needed(caches, num_tokens, needed_C):
    """Compute the number of blocks that `num_tokens` tokens of one request need, at most."""
    for cache in range(len(needed_C)):
        needed_C[cache] = blocks_at_most(caches, cache, num_tokens)


@jit
def fits(budget, rank, needed_C):
    """Return whether a rank has a slot, a token and these blocks left."""
    if budget.slots_P[rank] <= 0 or budget.tokens_P[rank] <= 0:
        return False
    enough = True
    for cache in range(len(needed_C)):
        enough &= budget.blocks_CP[cache, rank] >= needed_C[cache]
    return enough


@jit
def charge(caches, budget, rank, needed_C, num_new, load):
    """Charge a request, with one more block for its next token if it may hold that many; return how many of `num_new` tokens it
    computes."""
    num_scheduled = min(num_new, budget.tokens_P[rank])
    budget.tokens_P[rank] -= num_scheduled
    budget.slots_P[rank] -= 1
    budget.load_P[rank] += load
    for cache in range(len(needed_C)):
        budget.blocks_CP[cache, rank] -= min(needed_C[cache] + 1, caches.most_C[cache])
    return num_scheduled


@jit
def charge_running(caches, batch, budget, in_progress, due_Z):
    """Charge the blocks that the running requests will need to a budget.

    Also put the first half of the next block hash of every running request with a full block left
    to compute into the set `in_progress`. `due_Z` is scratch.
    """
    num_due = 0
    for at in range(len(in_progress)):
        in_progress[at] = np.uint64(0)
    for rank in range(len(budget.slots_P)):
        num_running = 0
        for at in range(rank * batch.per_rank, (rank + 1) * batch.per_rank):
            row = batch.counters_Z[at]
            if not batch.running_Z[at]:
                continue
            num_running += 1
            if row.num_tokens > row.num_held:
                for cache in range(len(caches.size_C)):
                    budget.blocks_CP[cache, rank] -= num_blocks_due(caches, batch, cache, at)
            if row.num_known >= (row.num_hashed + 1) * batch.block_size:
                prefetch(batch.hash_ZB2, (at, row.num_hashed, 0))
                due_Z[num_due] = at
                num_due += 1
        for cache in range(len(caches.size_C)):
            if caches.most_C[cache] > 1:
                budget.blocks_CP[cache, rank] -= num_running  # for their next tokens
    for at in due_Z[:num_due]:
        in_set(in_progress, batch.hash_ZB2[at, batch.counters_Z[at].num_hashed, 0], True)


@jit(inner=True)
def in_set(in_progress, hash0, add):
    """Return whether a block hash, by its first half, is in the set; put it there if `add`."""
    hash0 |= np.uint64(1)  # 0 is an empty place
    at = hash0 >> np.uint64(1) & np.uint64(len(in_progress) - 1)
    while in_progress[at] != hash0:
        if in_progress[at] == np.uint64(0):
            if add:
                in_progress[at] = hash0
            return False
        at = (at + np.uint64(1)) & np.uint64(len(in_progress) - 1)
    return True


@jit(inner=True)
def _find_rank(caches, blocks, block_size, budget, num_tokens, hash_B2, holder, num_held, worth, needed_C, taken_C):
    """Return the rank for a request, or `NONE`, and how many of its tokens that rank has cached.

    `holder`, if it is a rank, has `num_held` tokens, which are `worth` this much load; sharing
    their blocks takes `taken_C` free ones there. `needed_C` is scratch.
    """
    blocks_needed(caches, num_tokens, needed_C)
    for rank in range(len(budget.fits_P)):
        budget.fits_P[rank] = fits(budget, rank, needed_C)
    rank = pick_rank(budget.fits_P, budget.load_P, holder, worth)
    if rank >= 0 and (rank == holder or not num_held):
        return rank, num_held
    if rank >= 0:
        return rank, find_prefix(caches, blocks, rank, hash_B2, block_size, taken_C) * block_size
    if num_held:  # the holder needs fewer blocks, because the request shares some
        blocks_needed(caches, num_tokens - num_held, needed_C)
        for cache in range(len(needed_C)):
            needed_C[cache] += taken_C[cache]
        if fits(budget, holder, needed_C):
            return holder, num_held
    return NONE, 0


@jit
def choose(caches, blocks, block_size, budget, candidates, credit, in_progress, decisions, needed_C, taken_C):
    """Decide about candidates in order, until one fits nowhere; return the number of decisions.

    `credit`: the load that a cached token makes up for; negative: cached tokens do not attract
    requests. `needed_C` and `taken_C` are scratch.
    """
    for i in range(len(candidates.num_tokens_A)):
        first = candidates.first_A[i]
        hash_B2 = candidates.hash_B2[first : first + candidates.num_hashes_A[i]]
        depth, holder = guess_prefix(blocks, hash_B2, caches.max_misses)
        if depth:
            depth = find_prefix(caches, blocks, holder, hash_B2, block_size, taken_C)
        decisions.rank_A[i] = NONE
        if depth < len(hash_B2) and in_set(in_progress, hash_B2[depth, 0], False):
            continue  # another request is computing its next block: it waits for that
        num_tokens, num_held = candidates.num_tokens_A[i], depth * block_size
        worth = credit * num_held if credit >= 0.0 else -np.inf
        rank, num_cached = _find_rank(
            caches, blocks, block_size, budget, num_tokens, hash_B2, holder, num_held, worth, needed_C, taken_C
        )
        if rank < 0:
            return i
        load = candidates.load_A[i] - max(credit, 0.0) * num_cached
        decisions.num_scheduled_A[i] = charge(caches, budget, rank, needed_C, num_tokens - num_cached, load)
        decisions.rank_A[i], decisions.num_cached_A[i] = rank, num_cached
        if depth < len(hash_B2):
            in_set(in_progress, hash_B2[depth, 0], True)
    return len(candidates.num_tokens_A)
