"""Top-k, top-p and min-p filtering of a row's candidates, and the draw among them; part of `kernels.gpu.sampling`.

A candidate's key is the bits of its distance from the largest logit, an integer of the same order.
Weights are integers, whose sums do not depend on their order. The largest key that is kept is found
bit by bit, in 31 passes over the candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ONE = tl.constexpr(2.0**40)  # the weight of the most probable token
_ALL = tl.constexpr(0x7FFFFFFF)  # further than any token


@triton.jit
def weight_of(distance):
    """Return the integer weight of a token at a distance from the largest logit."""
    return (tl.exp(-distance) * _ONE).to(tl.int64)


@triton.jit
def share(total, part):
    """Return the smallest integer not below `total * part`, for part in [0, 1) and total < 2^63."""
    factor = (part * (2.0**63)).to(tl.uint64) << 1
    high = tl.umulhi(total.to(tl.uint64), factor)
    return (high + ((total.to(tl.uint64) * factor) != 0).to(tl.uint64)).to(tl.int64)


@triton.jit
def pick(token, weight, before, target):
    """Return the first token, in order, up to which the weights sum to more than `target`; _ALL if there is none."""
    reached = before + tl.cumsum(weight, axis=0) > target
    return tl.min(tl.where(reached, token, _ALL), axis=0)


@triton.jit
def _load_keys(keys_ptr, start, num, vocab, BLOCK: tl.constexpr):
    """Return places and keys of candidates; _ALL after the last of the `num` that exist."""
    i = start + tl.arange(0, BLOCK)
    # Not masked by `num`: its alignment is unknown, which would make accesses narrow.
    return i, tl.where(i < num, tl.load(keys_ptr + i, mask=i < vocab, other=_ALL), _ALL)


@triton.jit
def _count_nearer(keys_ptr, num, vocab, limit, BLOCK: tl.constexpr):
    """Return the number of candidates nearer than the key `limit`."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num, BLOCK):
        _, keys = _load_keys(keys_ptr, start, num, vocab, BLOCK)
        count += (keys < limit).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _weigh_nearer(keys_ptr, num, vocab, limit, min_p, BLOCK: tl.constexpr):
    """Return the weight of the candidates nearer than the key `limit`, without those that min-p removes."""
    mass = tl.zeros([BLOCK], tl.int64)
    for start in range(0, num, BLOCK):
        _, keys = _load_keys(keys_ptr, start, num, vocab, BLOCK)
        distance = keys.to(tl.float32, bitcast=True)
        mass += tl.where((keys < limit) & (tl.exp(-distance) >= min_p), weight_of(distance), 0)
    return tl.sum(mass, axis=0)


@triton.jit
def _kept(keys_ptr, num, vocab, top_k, top_p, total, BLOCK: tl.constexpr):
    """Return the key up to which candidates are kept, and how many of those at the key are kept.

    `total` is the weight of all tokens.
    """
    key, ties = tl.full([], _ALL, tl.int32), tl.full([], 0, tl.int64)
    if (top_k > 0) & (top_k < num):
        key = tl.full([], 0, tl.int32)
        for i in range(31):
            trial = key | (1 << (30 - i))
            count = _count_nearer(keys_ptr, num, vocab, trial, BLOCK)
            key = tl.where(count < top_k, trial, key)
        ties = top_k - _count_nearer(keys_ptr, num, vocab, key, BLOCK)
    if top_p < 1:
        at_key = weight_of(key.to(tl.float32, bitcast=True))
        if top_k > 0:
            total = _weigh_nearer(keys_ptr, num, vocab, key, 0.0, BLOCK)
            total += tl.where(ties > 0, ties * at_key, 0)
        enough = tl.maximum(share(total, top_p), 1)
        nearest = tl.full([], 0, tl.int32)
        for i in range(31):
            trial = nearest | (1 << (30 - i))
            mass = _weigh_nearer(keys_ptr, num, vocab, trial, 0.0, BLOCK)
            nearest = tl.where((trial <= key) & (mass < enough), trial, nearest)
        mass = _weigh_nearer(keys_ptr, num, vocab, nearest, 0.0, BLOCK)
        each = tl.maximum(weight_of(nearest.to(tl.float32, bitcast=True)), 1)
        needed = (enough - mass + each - 1) // each
        ties = tl.where(nearest == key, tl.minimum(needed, ties), needed)
        key = nearest
    return key, ties


@triton.jit
def draw_candidate(keys_ptr, tokens_ptr, num, vocab, top_k, top_p, min_p, total, bits, BLOCK: tl.constexpr):
    """Return the token drawn among the candidates that top-k, top-p and min-p keep."""
    key, ties = _kept(keys_ptr, num, vocab, top_k, top_p, total, BLOCK)
    distance_of_ties = key.to(tl.float32, bitcast=True)
    ties = tl.where(tl.exp(-distance_of_ties) >= min_p, ties, 0)
    total = _weigh_nearer(keys_ptr, num, vocab, key, min_p, BLOCK)
    total += tl.where(ties > 0, ties * weight_of(distance_of_ties), 0)
    target = tl.umulhi(bits, total.to(tl.uint64)).to(tl.int64)
    start, found = tl.full([], 0, tl.int32), tl.full([], _ALL, tl.int32)
    before, ties_before = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    while (start < num) & (found == _ALL):
        i, keys = _load_keys(keys_ptr, start, num, vocab, BLOCK)
        distance = keys.to(tl.float32, bitcast=True)
        tied = ((keys == key) & (i < num)).to(tl.int64)
        tie = ties_before + tl.cumsum(tied, axis=0)
        kept = ((keys < key) & (tl.exp(-distance) >= min_p)) | ((tied > 0) & (tie <= ties))
        weight = tl.where(kept, weight_of(distance), 0)
        found = pick(tl.load(tokens_ptr + i, mask=i < num, other=_ALL), weight, before, target)
        before += tl.sum(weight, axis=0)
        ties_before += tl.sum(tied, axis=0)
        start += BLOCK
    return found
