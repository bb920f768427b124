"""Places of a request's recurrent state: which entries of its block table have a block of their own.

A state goes on in its block, so entries of the block table repeat the block before them until a snapshot is wanted there;
then the next entry has a new block, and the one before is left as it is: a snapshot, from which any request that begins
with the same tokens goes on. Snapshots are kept where a request is likely to leave a cached prefix:

- after every `snapshot_every` tokens;
- where the request itself has left one: others shared more tokens with it than the last snapshot covers, so more will
  (a branch of the radix tree: Pan et al., "Marconi: prefix caching for the era of hybrid LLMs", 2024);
- where the last entry within the prompt begins: the same prompt comes again, or another that differs at its end;
- after every entry of the output, from which the next turn of a conversation goes on: each such snapshot replaces the one before.

A free snapshot's worth, by which it is evicted (see `heap`), is the number of tokens to compute anew without it: those since
the snapshot before it, or since the one before that if this one alone was left behind that. A snapshot behind which exactly one
was left is superseded, since whoever comes back goes on from the deeper one; behind which several were left, requests part.

Letters as in `rows`.
"""

import numpy as np

from expertwire.compiled import compiler
from expertwire.scheduler._compiled.blocks import EVERYTHING, NONE, weigh_block
from expertwire.scheduler._compiled.prefixes import find_block, forget_block

jit = compiler(__file__, _nrt=False)  # see blocks


@jit(inner=True)
def begins_block(caches, batch, cache, row, index):
    """Return whether an entry of a row's block table has another block than the one before it."""
    if caches.every_C[cache] == 1:
        return True
    kept, start = batch.snapshots_Z[row], index * caches.size_C[cache]
    return is_lasting(caches, batch, cache, row, index) or start == kept.num_begun or start > kept.last_prompt


@jit(inner=True)
def is_lasting(caches, batch, cache, row, index):
    """Return whether the snapshot where an entry begins is kept until it is evicted."""
    kept, start = batch.snapshots_Z[row], index * caches.size_C[cache]
    return index % caches.every_C[cache] == 0 or start == kept.branch or (start == kept.last_prompt and start > 0)


@jit(inner=True)
def count_blocks(caches, batch, cache, row, first, end):
    """Return the number of blocks that entries `first` to `end` of a row's block table need beside the one before."""
    if caches.every_C[cache] == 1:
        return max(end - first, 0)
    count = 0
    for index in range(first, end):
        count += begins_block(caches, batch, cache, row, index)
    return count


@jit(inner=True)
def blocks_at_most(caches, cache, num_tokens):
    """Return an upper bound of the blocks that so many tokens of a request need."""
    num_entries = -(-num_tokens // caches.size_C[cache])
    return min(num_entries, -(-num_entries // caches.every_C[cache]) + caches.extra_C[cache], caches.most_C[cache])


@jit(inner=True)
def choose_snapshots(caches, blocks, batch, row, num_cached, is_fork):
    """Choose where a row that begins with `num_cached` tokens keeps snapshots. A fork begins with a copy of a state."""
    kept, num_known = batch.snapshots_Z[row], batch.counters_Z[row].num_known
    for cache in range(len(caches.size_C)):
        if blocks.owners[cache * blocks.num_ranks].weighs:
            size = caches.size_C[cache]
            kept.num_begun = NONE if is_fork else num_cached
            kept.last_kept = num_cached
            kept.last_prompt = (num_known - 1) // size * size
            shared = num_cached if is_fork else _num_shared(caches, blocks, batch, row, num_cached)
            kept.branch = shared // size * size


@jit(inner=True)
def _num_shared(caches, blocks, batch, row, num_cached):
    """Return how many of a row's first tokens the caches of all tokens have; none if there is no such cache."""
    shared = NONE
    for cache in range(len(caches.size_C)):
        if caches.window_C[cache] == EVERYTHING:
            owner, depth = cache * blocks.num_ranks + batch.info_Z[row].rank, num_cached // batch.block_size
            whole = batch.counters_Z[row].num_known // batch.block_size
            while depth < whole and (
                find_block(blocks, owner, batch.hash_ZB2[row, depth, 0], batch.hash_ZB2[row, depth, 1]) != NONE
            ):
                depth += 1
            shared = depth if shared == NONE else min(shared, depth)
    return max(shared, 0) * batch.block_size


@jit(inner=True)
def leave_snapshot(caches, blocks, batch, cache, row, index, number):
    """Note that block `number` of an owner that weighs, which gets its hash, keeps the state at the end of entry `index`.

    The snapshot before entry `index` is forgotten unless it lasts or somebody uses it: this one replaces it.
    """
    owner, kept, per_block = (
        cache * blocks.num_ranks + batch.info_Z[row].rank,
        batch.snapshots_Z[row],
        caches.hashes_C[cache],
    )
    end = (index + 1) * caches.size_C[cache]
    gain, last, kept.last_kept = end - kept.last_kept, kept.last_kept // batch.block_size - 1, end
    before = np.int32(NONE)
    if last >= 0:
        before = find_block(blocks, owner, batch.hash_ZB2[row, last, 0], batch.hash_ZB2[row, last, 1])
    if before != NONE:
        replaced = index > 0 and caches.every_C[cache] > 1 and last == index * per_block - 1
        replaced = replaced and not is_lasting(caches, batch, cache, row, index) and blocks.block_B[before].refs == 0
        worth = blocks.worth_B[before]
        worth.followers += not replaced
        if worth.followers < 2:
            gain += worth.gain
        if replaced:
            forget_block(blocks, owner, np.int64(before))
        else:
            weigh_block(blocks, owner, np.int64(before))
    blocks.worth_B[number].gain = gain
    blocks.worth_B[number].followers = end == kept.branch
