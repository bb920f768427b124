"""Dispatch of few tokens in two launches instead of five, where latency counts and not bytes.

The protocol is that of `dispatch_combine`.

    low_latency_send       one program per token: find the row's destinations, quantise the row if required, store it there;
                           and one program per rank: count the rows for it
    low_latency_receive    one program per expert: wait for the signals, then find the expert's rows among all that have come

T tokens, K experts a token, P ranks, e local experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertwire.kernels.gpu.dependent_launch import wait_for_previous_kernel
from expertwire.kernels.gpu.dispatch_combine import as_sent, load_row, num_valid_rows, store_row
from expertwire.kernels.gpu.signals import as_words, signal_address, signal_when_done, wait_for_signals

MAX_IDS = 2048  # T * K of one rank, each program of `low_latency_send` looks at all of them
# P * T * K, each program of `low_latency_receive` looks at all of them twice: 8 times 2,048 take as long as two launches.
MAX_ARRIVED_IDS = 8192
_CHUNK = 2048


@triton.jit
def _goes_to(ids, rank_offsets_ptr, rank):
    return (ids >= tl.load(rank_offsets_ptr + rank)) & (ids < tl.load(rank_offsets_ptr + rank + 1))


@triton.jit(do_not_specialize=["me", "num_tokens"])
def low_latency_send_kernel(
    x_ptr,  # i32 words, or numbers if they are COLUMNS
    ids_ptr,
    rank_offsets_ptr,
    valid_ptr,
    epoch_ptr,
    done_ptr,
    peers_ptr,
    me,
    num_tokens,
    max_tokens,
    num_ranks,
    dispatch_signals,
    routes_offset,
    rows_offset,
    combine_offset,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,  # K rounded up to a power of two
    TOKENS: tl.constexpr,  # num_tokens rounded up to a power of two
    WORDS: tl.constexpr,  # of a row as it is sent
    COLUMNS: tl.constexpr,  # of x if it is quantised here, else 0
    COMBINE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # a whole row
    RANKS: tl.constexpr,  # num_ranks rounded up to a power of two
    LIMITED: tl.constexpr,
):
    wait_for_previous_kernel()
    t, num_valid = tl.program_id(0), num_valid_rows(valid_ptr, num_tokens, LIMITED)
    loaded = load_row(x_ptr, t, 0, t < num_valid, WORDS, COLUMNS, BLOCK)  # loading while the destinations are found
    token, i = tl.arange(0, TOKENS)[:, None], tl.arange(0, K_BLOCK)[None, :]
    ids = tl.load(ids_ptr + token * K + i, mask=(token < num_valid) & (i < K), other=-1).to(tl.int32)
    counted = tl.minimum(t, num_ranks - 1)
    sent = tl.sum(tl.max(_goes_to(ids, rank_offsets_ptr, counted).to(tl.int32), axis=1), axis=0)
    tl.store(
        signal_address(tl.load(peers_ptr + counted), dispatch_signals, me) + 1, sent.to(tl.int64), mask=t < num_ranks
    )
    k_of = tl.arange(0, K_BLOCK)
    own = tl.load(ids_ptr + t * K + k_of, mask=(k_of < K) & (t < num_valid), other=-1).to(tl.int32)
    target = tl.full([K_BLOCK], -1, tl.int32)
    for k in range(K):
        found = row_of(ids, own, token, rank_offsets_ptr, t, k, k_of, me, max_tokens, num_ranks, K_BLOCK, RANKS)
        target = tl.where(k_of == k, found, target)
    row, scales = as_sent(loaded, COLUMNS)
    for k in range(K):
        to = _scalar(target, k_of, k)
        if to >= 0:
            base, place = tl.load(peers_ptr + to // max_tokens), tl.cast(me * max_tokens + to % max_tokens, tl.int64)
            store_row(base + rows_offset + place * (WORDS * 4), row, scales, 0, WORDS, COLUMNS, BLOCK)
            route = (base + routes_offset).to(tl.pointer_type(tl.int32)) + place * (K + 1)
            tl.store(route, t)
            tl.store(route + 1 + k_of, own, mask=k_of < K)
        elif (t < num_valid) & (_scalar(own, k_of, k) < 0):
            _store_zeros(tl.load(peers_ptr + me) + combine_offset, t * K + k, COMBINE_WORDS, BLOCK)
    signal_when_done(done_ptr, epoch_ptr, peers_ptr, epoch_ptr, dispatch_signals, me, num_ranks, RANKS, COUNTED=False)


@triton.jit
def _scalar(values, i_of, i):
    """Return the element i of a tensor."""
    return tl.sum(tl.where(i_of == i, values, 0), axis=0)


@triton.jit
def row_of(
    ids, own, token, rank_offsets_ptr, t, k, k_of, me, max_tokens, num_ranks, K_BLOCK: tl.constexpr, RANKS: tl.constexpr
):
    """Return rank * max_tokens + place of token t's row if k is its first expert on that rank, else -1."""
    rank = tl.arange(0, RANKS)
    expert = _scalar(own, k_of, k)
    ends = tl.load(rank_offsets_ptr + 1 + rank, mask=rank < num_ranks, other=2147483647)
    peer = tl.sum((ends <= expert).to(tl.int32), axis=0)
    here = _goes_to(own, rank_offsets_ptr, peer)
    is_first = (expert >= 0) & (tl.min(tl.where(here, k_of, K_BLOCK), axis=0) == k)
    earlier = tl.max((_goes_to(ids, rank_offsets_ptr, peer) & (token < t)).to(tl.int32), axis=1)
    return tl.where(is_first, peer * max_tokens + tl.sum(earlier, axis=0), -1)


@triton.jit
def _store_zeros(address, slot, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, WORDS, BLOCK):
        w = start + tl.arange(0, BLOCK)
        to = as_words(address) + tl.cast(slot, tl.int64) * WORDS + w
        tl.store(to, tl.zeros([BLOCK], tl.int32), mask=w < WORDS)


@triton.jit(do_not_specialize=["me", "limit"])
def low_latency_receive_kernel(
    peers_ptr,
    rank_offsets_ptr,
    epoch_ptr,
    expert_offsets_ptr,
    row_index_ptr,
    slot_ptr,
    me,
    num_ranks,
    max_tokens,
    num_experts,
    dispatch_signals,
    routes_offset,
    stall_offset,
    limit,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid (e + 1,): the outputs of `dispatch_combine.dispatch_index_kernel`; the last program writes
    the end of the offsets.
    """
    wait_for_signals(
        peers_ptr, tl.load(epoch_ptr), me, num_ranks, dispatch_signals, stall_offset, limit, 0, RANKS, CLOCK
    )
    tl.debug_barrier()
    rank = tl.arange(0, RANKS)
    mine = tl.load(peers_ptr + me)
    counts = tl.load(signal_address(mine, dispatch_signals, rank) + 1, mask=rank < num_ranks, other=0).to(tl.int32)
    a_rank = tl.max(counts, axis=0) * K  # ids looked at of each rank
    routes = (mine + routes_offset).to(tl.pointer_type(tl.int32))
    first, expert = tl.load(rank_offsets_ptr + me), tl.program_id(0)
    before = tl.full([], 0, tl.int32)
    for start in range(0, a_rank * num_ranks, CHUNK):
        id_of, _, _, _ = _routed(routes, mine, dispatch_signals, start, a_rank, num_ranks, max_tokens, K, CHUNK)
        before += tl.sum(((id_of >= first) & (id_of < first + expert)).to(tl.int32), axis=0)
    tl.store(expert_offsets_ptr + expert, before)
    if expert < num_experts:
        for start in range(0, a_rank * num_ranks, CHUNK):
            id_of, row, k, source = _routed(
                routes, mine, dispatch_signals, start, a_rank, num_ranks, max_tokens, K, CHUNK
            )
            own = id_of == first + expert
            ranks = tl.cumsum(own.to(tl.int32), axis=0)
            token = tl.load(routes + tl.cast(row, tl.int64) * (K + 1), mask=own, other=0)
            tl.store(row_index_ptr + before + ranks - 1, row, mask=own)
            tl.store(slot_ptr + before + ranks - 1, (source * max_tokens + token) * K + k, mask=own)
            before += tl.max(ranks, axis=0)


@triton.jit
def _routed(routes, mine, dispatch_signals, start, a_rank, num_ranks, max_tokens, K: tl.constexpr, CHUNK: tl.constexpr):
    """Return the physical ids of some (source, token, k), -1 where nothing has come, with their rows, k and source."""
    n = start + tl.arange(0, CHUNK)
    source, within = n // a_rank, n % a_rank
    exists = source < num_ranks
    count = tl.load(signal_address(mine, dispatch_signals, source) + 1, mask=exists, other=0).to(tl.int32)
    row, k = source * max_tokens + within // K, within % K
    exists = exists & (within // K < count)
    return tl.load(routes + row.to(tl.int64) * (K + 1) + 1 + k, mask=exists, other=-1), row, k, source


def row_block(words: int) -> tuple[int, int]:
    """Return a row's words, or its columns if it is quantised, rounded up to a power of two, and a program's warps."""
    block = triton.next_power_of_2(words)
    return block, max(1, min(8 if block <= 8192 else 16, block // 512))


def chunk_of(num_tokens: int, top_k: int, num_ranks: int) -> int:
    """Return the ids that `low_latency_receive_kernel` takes at a time, where all ranks have about as many tokens."""
    return min(_CHUNK, max(128, triton.next_power_of_2(num_tokens * top_k * num_ranks)))
