"""Dispatch and combine over NVLink by stores into the peers' symmetric buffers: the kernels of
`comm.all_to_all.nvlink_gpu`.

    dispatch_plan     assign each row its place at its destinations: one program per destination, prefix sums, no atomics
    dispatch_send     load each row once and store it to all its destinations; the last program writes counts and signals
    dispatch_count    count the routed rows from each rank for each local expert
    dispatch_index    order them by expert, source rank, token, k
    combine_send      store expert rows into the slots of their source ranks; the last program writes signals

Between them `signals.wait_for_signals_kernel` waits until the signal of every rank is there, or one
is late, which is reported to all ranks for good. This is the high-throughput path;
`dispatch_low_latency` is for few tokens. `comm.all_to_all.nvlink` is the CPU's implementation of
the same protocol.

`comm.all_to_all.symmetric_buffer` defines the layout of a buffer; the kernels get it as byte
offsets. Addresses of the buffers are integers, in a table by rank. Rows are multiples of 16 bytes,
moved as i32 words. Or they are bf16 numbers that are quantised between load and store, and the
peers find what `kernels.ops.quantize.pack` would have made of them.

T tokens, K experts a token, R received rows, P ranks, e local experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.quantize import scale_groups
from expertwire.kernels.gpu.signals import as_words, signal_address, signal_when_done
from expertwire.kernels.ops.quantize import GROUP

_GROUP = tl.constexpr(GROUP)
_ROUTES_BLOCK = 2048  # ids a program takes at a time
# Without the number of registers, ptxas spills to save some.
SEND_OPTIONS = {"maxnreg": 255, **PDL}


@triton.jit
def load_row(x_ptr, t, start, exists, WORDS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block of row t from `start` on: words, or numbers if COLUMNS is not 0."""
    WIDTH: tl.constexpr = COLUMNS if COLUMNS > 0 else WORDS
    i = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + tl.cast(t, tl.int64) * WIDTH + i, mask=(i < WIDTH) & exists, other=0)


@triton.jit
def as_sent(row, COLUMNS: tl.constexpr):
    """Return what `load_row` returned in dispatch format: words, or fp8 values and their scales."""
    if COLUMNS == 0:
        return row, row
    else:
        values, scales = scale_groups(row.to(tl.float32), _GROUP)
        return values.to(tl.float8e4nv), scales


@triton.jit
def store_row(address, row, scales, start, WORDS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Store what `as_sent` returned into the row at an address."""
    i = start + tl.arange(0, BLOCK)
    if COLUMNS == 0:
        tl.store(as_words(address) + i, row, mask=i < WORDS)
    else:
        tl.store(tl.multiple_of(address.to(tl.pointer_type(tl.float8e4nv)), 16) + i, row, mask=i < COLUMNS)
        group = start // _GROUP + tl.arange(0, BLOCK // _GROUP)
        to = tl.multiple_of((address + COLUMNS).to(tl.pointer_type(tl.float32)), 16)
        tl.store(to + group, scales, mask=group < COLUMNS // _GROUP)


@triton.jit
def num_valid_rows(valid_ptr, num_tokens, LIMITED: tl.constexpr):
    """Return the number of rows to send."""
    if LIMITED:
        num_tokens = tl.minimum(num_tokens, tl.load(valid_ptr))
    return num_tokens


@triton.jit(do_not_specialize=["num_tokens"])
def dispatch_plan_kernel(
    ids_ptr,
    rank_offsets_ptr,
    target_ptr,
    counts_ptr,
    valid_ptr,
    num_tokens,
    max_tokens,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,  # K rounded up to a power of two
    TOKENS: tl.constexpr,
    LIMITED: tl.constexpr,
):
    """Grid (P,): write `target` i32 [T, K] and `counts` i64 [P].

    Where the expert lies on this program's rank, `target` is rank * max_tokens + the row's place at
    the first such k of the token, and -1 at the others.
    """
    wait_for_previous_kernel()
    peer = tl.program_id(0)
    first, last = tl.load(rank_offsets_ptr + peer), tl.load(rank_offsets_ptr + peer + 1)
    num_valid = num_valid_rows(valid_ptr, num_tokens, LIMITED)
    k = tl.arange(0, K_BLOCK)[None, :]
    taken = tl.full([], 0, tl.int32)
    for start in range(0, num_valid, TOKENS):
        t = start + tl.arange(0, TOKENS)
        at = t[:, None] * K + k
        ids = tl.load(ids_ptr + at, mask=(t[:, None] < num_valid) & (k < K), other=-1).to(tl.int32)
        here = (ids >= first) & (ids < last)
        sent = tl.max(here.to(tl.int32), axis=1)
        row = peer * max_tokens + taken + tl.cumsum(sent, axis=0) - 1
        is_first = tl.cumsum(here.to(tl.int32), axis=1) == 1
        tl.store(target_ptr + at, tl.where(is_first, row[:, None], -1), mask=here)
        taken += tl.sum(sent, axis=0)
    tl.store(counts_ptr + peer, taken.to(tl.int64))


@triton.jit(do_not_specialize=["me", "num_tokens"])
def dispatch_send_kernel(
    x_ptr,  # i32 words, or numbers if they are COLUMNS
    ids_ptr,
    target_ptr,
    counts_ptr,
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
    K_BLOCK: tl.constexpr,  # K + 1 rounded up to a power of two
    WORDS: tl.constexpr,  # of a row as it is sent
    COLUMNS: tl.constexpr,  # of x if it is quantised here, else 0
    COMBINE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,  # num_ranks rounded up to a power of two
    LIMITED: tl.constexpr,
):
    wait_for_previous_kernel()
    for t in range(tl.program_id(0), num_valid_rows(valid_ptr, num_tokens, LIMITED), tl.num_programs(0)):
        _send_routes(ids_ptr, target_ptr, peers_ptr, t, me, max_tokens, routes_offset, K, K_BLOCK)
        for start in range(0, COLUMNS if COLUMNS > 0 else WORDS, BLOCK):
            row, scales = as_sent(load_row(x_ptr, t, start, True, WORDS, COLUMNS, BLOCK), COLUMNS)
            for k in range(K):
                if tl.load(ids_ptr + t * K + k) >= 0:
                    target = tl.load(target_ptr + t * K + k)
                    if target >= 0:
                        place = (me * max_tokens + target % max_tokens).to(tl.int64) * (WORDS * 4)
                        to = tl.load(peers_ptr + target // max_tokens) + rows_offset + place
                        store_row(to, row, scales, start, WORDS, COLUMNS, BLOCK)
        for k in range(K):
            if tl.load(ids_ptr + t * K + k) < 0:
                target_row = (
                    as_words(tl.load(peers_ptr + me) + combine_offset) + tl.cast(t * K + k, tl.int64) * COMBINE_WORDS
                )
                for start in range(0, COMBINE_WORDS, BLOCK):
                    w = start + tl.arange(0, BLOCK)
                    tl.store(target_row + w, tl.zeros([BLOCK], tl.int32), mask=w < COMBINE_WORDS)
    signal_when_done(done_ptr, epoch_ptr, peers_ptr, counts_ptr, dispatch_signals, me, num_ranks, RANKS, COUNTED=True)


@triton.jit
def _send_routes(
    ids_ptr, target_ptr, peers_ptr, t, me, max_tokens, routes_offset, K: tl.constexpr, K_BLOCK: tl.constexpr
):
    """Store the token and its expert ids beside each copy of the row."""
    i = tl.arange(0, K_BLOCK)
    ids = tl.load(ids_ptr + t * K + i - 1, mask=(i > 0) & (i <= K), other=0).to(tl.int32)
    route = tl.where(i == 0, t, ids)
    for k in range(K):
        if tl.load(ids_ptr + t * K + k) >= 0:
            target = tl.load(target_ptr + t * K + k)
            if target >= 0:
                base = (tl.load(peers_ptr + target // max_tokens) + routes_offset).to(tl.pointer_type(tl.int32))
                place = (me * max_tokens + target % max_tokens).to(tl.int64) * (K + 1)
                tl.store(base + place + i, route, mask=i <= K)


@triton.jit
def routes_of(peers_ptr, me, source, max_tokens, routes_offset, K: tl.constexpr):
    """Return the address of the routes that one rank has sent, [T, K + 1]."""
    base = (tl.load(peers_ptr + me) + routes_offset).to(tl.pointer_type(tl.int32))
    return base + tl.cast(source * max_tokens, tl.int64) * (K + 1)


@triton.jit(do_not_specialize=["me"])
def dispatch_count_kernel(
    peers_ptr,
    rank_offsets_ptr,
    counts_ptr,
    me,
    max_tokens,
    num_experts,
    dispatch_signals,
    routes_offset,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,  # num_experts + 1 rounded up to a power of two
):
    """Grid (P,): write `counts` i32 [P, e]."""
    wait_for_previous_kernel()
    source = tl.program_id(0)
    first = tl.load(rank_offsets_ptr + me)
    num_ids = tl.load(signal_address(tl.load(peers_ptr + me), dispatch_signals, source) + 1).to(tl.int32) * K
    routes = routes_of(peers_ptr, me, source, max_tokens, routes_offset, K)
    expert = tl.arange(0, EXPERTS)
    found = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_ids, CHUNK):
        n = start + tl.arange(0, CHUNK)
        local = tl.load(routes + n // K * (K + 1) + 1 + n % K, mask=n < num_ids, other=-1) - first
        here = (n < num_ids) & (local >= 0) & (local < num_experts)
        # One more bin than experts, for ids that belong to other ranks.
        found += tl.histogram(tl.where(here, local, EXPERTS - 1), EXPERTS)
    tl.store(counts_ptr + source * num_experts + expert, found, mask=expert < num_experts)


@triton.jit(do_not_specialize=["me"])
def dispatch_index_kernel(
    peers_ptr,
    rank_offsets_ptr,
    counts_ptr,
    expert_offsets_ptr,
    row_index_ptr,
    slot_ptr,
    me,
    num_ranks,
    max_tokens,
    num_experts,
    dispatch_signals,
    routes_offset,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Grid (e + 1, P): write the order of the received rows; the last "expert" writes the end of the offsets.

    `slot` is (source rank * max_tokens + t) * K + k.
    """
    wait_for_previous_kernel()
    expert, source = tl.program_id(0), tl.program_id(1)
    e, p = tl.arange(0, EXPERTS)[None, :], tl.arange(0, RANKS)[:, None]
    counts = tl.load(counts_ptr + p * num_experts + e, mask=(p < num_ranks) & (e < num_experts), other=0)
    earlier = (e < expert) | ((e == expert) & (p < source))
    before = tl.sum(tl.sum(tl.where(earlier, counts, 0), axis=1), axis=0)
    if source == 0:
        tl.store(expert_offsets_ptr + expert, before)
    if expert < num_experts:
        wanted = tl.load(rank_offsets_ptr + me) + expert
        num_ids = tl.load(signal_address(tl.load(peers_ptr + me), dispatch_signals, source) + 1).to(tl.int32) * K
        routes = routes_of(peers_ptr, me, source, max_tokens, routes_offset, K)
        for start in range(0, num_ids, CHUNK):
            n = start + tl.arange(0, CHUNK)
            route = routes + n // K * (K + 1)
            own = tl.load(route + 1 + n % K, mask=n < num_ids, other=-1) == wanted
            ranks = tl.cumsum(own.to(tl.int32), axis=0)
            token = tl.load(route, mask=own, other=0)
            at = before + ranks - 1
            tl.store(row_index_ptr + at, source * max_tokens + n // K, mask=own)
            tl.store(slot_ptr + at, (source * max_tokens + token) * K + n % K, mask=own)
            before += tl.max(ranks, axis=0)


@triton.jit(do_not_specialize=["me"])
def combine_send_kernel(
    y_ptr,  # i32 words
    slot_ptr,
    expert_offsets_ptr,
    epoch_ptr,
    done_ptr,
    peers_ptr,
    me,
    num_ranks,
    num_experts,
    slots_per_rank,
    combine_signals,
    combine_offset,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
):
    wait_for_previous_kernel()
    for r in range(tl.program_id(0), tl.load(expert_offsets_ptr + num_experts), tl.num_programs(0)):
        slot = tl.load(slot_ptr + r)
        target_row = as_words(tl.load(peers_ptr + slot // slots_per_rank) + combine_offset)
        target_row += (slot % slots_per_rank).to(tl.int64) * WORDS
        for start in range(0, WORDS, BLOCK):
            w = start + tl.arange(0, BLOCK)
            row = tl.load(y_ptr + tl.cast(r, tl.int64) * WORDS + w, mask=w < WORDS)
            tl.store(target_row + w, row, mask=w < WORDS)
    signal_when_done(done_ptr, epoch_ptr, peers_ptr, epoch_ptr, combine_signals, me, num_ranks, RANKS, COUNTED=False)


def row_block(words: int) -> tuple[int, int]:
    """Return the words of a row that a program moves at a time, and its warps: at most four 16-byte
    accesses a thread.
    """
    block = min(4096, triton.next_power_of_2(words))
    return block, max(1, min(8, block // 512))


def quantized_block(columns: int) -> tuple[int, int]:
    """Return the columns of a row that a program quantises at a time, all of most rows, and its warps.

    A thread has 16 columns, or 32.
    """
    block = min(8192, triton.next_power_of_2(columns))
    return block, max(1, min(8, block // 512))


def plan_tokens(num_tokens: int, top_k: int) -> int:
    """Return the tokens that `dispatch_plan_kernel` takes at a time."""
    most = max(16, _ROUTES_BLOCK * 2 // triton.next_power_of_2(top_k))
    return min(most, max(16, triton.next_power_of_2(num_tokens)))


def ids_chunk(num_ids: int) -> int:
    """Return the ids that `dispatch_count_kernel` and `dispatch_index_kernel` take at a time."""
    return min(_ROUTES_BLOCK, max(128, triton.next_power_of_2(num_ids)))
