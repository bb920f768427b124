"""Dispatch of few tokens in two launches instead of five: latency counts, not bytes. The protocol is `kernels.gpu.exchange`'s.

    send_few     a program a token finds by itself where its row goes, quantises it if it shall be, and stores it there; and a
                 program a rank finds how many go there
    arrive_few   a program an expert waits by itself, then finds its rows among all that have come

T tokens, K experts a token, P ranks, e local experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import wait_for_previous
from expertwire.kernels.gpu.exchange import SEND_OPTIONS, as_sent, load_row, num_valid_rows, store_row
from expertwire.kernels.gpu.exchange_flags import as_words, await_all, flag_last, line_of
from expertwire.kernels.ops.quantize import packed_bytes

MAX_IDS = 2048  # T * K of one rank, each program of `send_few` looks at all of them
# P * T * K, each program of `arrive_few` looks at all of them twice: 8 turns of 2,048 take about as long as two launches.
MAX_ARRIVED_IDS = 8192
_CHUNK = 2048


@triton.jit
def _goes_to(ids, rank_offsets_ptr, rank):
    return (ids >= tl.load(rank_offsets_ptr + rank)) & (ids < tl.load(rank_offsets_ptr + rank + 1))


@triton.jit(do_not_specialize=["me", "num_tokens"])
def send_few_kernel(
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
    dispatched_at,
    routes_at,
    rows_at,
    home_at,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,  # K rounded up to a power of two
    TOKENS: tl.constexpr,  # num_tokens rounded up to a power of two
    WORDS: tl.constexpr,  # of a row that travels
    COLUMNS: tl.constexpr,  # of x, if it is quantised on the way, else 0
    HOME_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,  # a whole row
    RANKS: tl.constexpr,  # num_ranks rounded up to a power of two
    LIMITED: tl.constexpr,
):
    wait_for_previous()
    t, num_valid = tl.program_id(0), num_valid_rows(valid_ptr, num_tokens, LIMITED)
    given = load_row(x_ptr, t, 0, t < num_valid, WORDS, COLUMNS, BLOCK)  # on its way while it is found where it goes
    token, i = tl.arange(0, TOKENS)[:, None], tl.arange(0, K_BLOCK)[None, :]
    ids = tl.load(ids_ptr + token * K + i, mask=(token < num_valid) & (i < K), other=-1).to(tl.int32)
    counted = tl.minimum(t, num_ranks - 1)
    sent = tl.sum(tl.max(_goes_to(ids, rank_offsets_ptr, counted).to(tl.int32), axis=1), axis=0)
    tl.store(line_of(tl.load(peers_ptr + counted), dispatched_at, me) + 1, sent.to(tl.int64), mask=t < num_ranks)
    k_of = tl.arange(0, K_BLOCK)
    own = tl.load(ids_ptr + t * K + k_of, mask=(k_of < K) & (t < num_valid), other=-1).to(tl.int32)
    target = tl.full([K_BLOCK], -1, tl.int32)
    for k in range(K):
        found = row_of(ids, own, token, rank_offsets_ptr, t, k, k_of, me, max_tokens, num_ranks, K_BLOCK, RANKS)
        target = tl.where(k_of == k, found, target)
    row, scales = as_sent(given, COLUMNS)
    for k in range(K):
        to = _scalar(target, k_of, k)
        if to >= 0:
            base, place = tl.load(peers_ptr + to // max_tokens), tl.cast(me * max_tokens + to % max_tokens, tl.int64)
            store_row(base + rows_at + place * (WORDS * 4), row, scales, 0, WORDS, COLUMNS, BLOCK)
            route = (base + routes_at).to(tl.pointer_type(tl.int32)) + place * (K + 1)
            tl.store(route, t)
            tl.store(route + 1 + k_of, own, mask=k_of < K)
        elif (t < num_valid) & (_scalar(own, k_of, k) < 0):
            _store_zeros(tl.load(peers_ptr + me) + home_at, t * K + k, HOME_WORDS, BLOCK)
    flag_last(done_ptr, epoch_ptr, peers_ptr, epoch_ptr, dispatched_at, me, num_ranks, RANKS, COUNTED=False)


@triton.jit
def _scalar(values, i_of, i):
    """One of them."""
    return tl.sum(tl.where(i_of == i, values, 0), axis=0)


@triton.jit
def row_of(
    ids, own, token, rank_offsets_ptr, t, k, k_of, me, max_tokens, num_ranks, K_BLOCK: tl.constexpr, RANKS: tl.constexpr
):
    """Rank * max_tokens + place of token t's row, if k is its first expert there; else -1."""
    rank = tl.arange(0, RANKS)
    expert = _scalar(own, k_of, k)
    ends = tl.load(rank_offsets_ptr + 1 + rank, mask=rank < num_ranks, other=2147483647)
    peer = tl.sum((ends <= expert).to(tl.int32), axis=0)
    here = _goes_to(own, rank_offsets_ptr, peer)
    is_first = (expert >= 0) & (tl.min(tl.where(here, k_of, K_BLOCK), axis=0) == k)
    earlier = tl.max((_goes_to(ids, rank_offsets_ptr, peer) & (token < t)).to(tl.int32), axis=1)
    return tl.where(is_first, peer * max_tokens + tl.sum(earlier, axis=0), -1)


@triton.jit
def _store_zeros(home, slot, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, WORDS, BLOCK):
        w = start + tl.arange(0, BLOCK)
        to = as_words(home) + tl.cast(slot, tl.int64) * WORDS + w
        tl.store(to, tl.zeros([BLOCK], tl.int32), mask=w < WORDS)


@triton.jit(do_not_specialize=["me", "limit"])
def arrive_few_kernel(
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
    dispatched_at,
    routes_at,
    stalled_at,
    limit,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Programs of e experts, and one more for the end of the offsets; outputs as of `exchange.index_kernel`."""
    await_all(peers_ptr, tl.load(epoch_ptr), me, num_ranks, dispatched_at, stalled_at, limit, 0, RANKS, CLOCK)
    tl.debug_barrier()
    rank = tl.arange(0, RANKS)
    mine = tl.load(peers_ptr + me)
    counts = tl.load(line_of(mine, dispatched_at, rank) + 1, mask=rank < num_ranks, other=0).to(tl.int32)
    a_rank = tl.max(counts, axis=0) * K  # ids looked at of each rank
    routes = (mine + routes_at).to(tl.pointer_type(tl.int32))
    first, expert = tl.load(rank_offsets_ptr + me), tl.program_id(0)
    before = tl.full([], 0, tl.int32)
    for start in range(0, a_rank * num_ranks, CHUNK):
        id_of, _, _, _ = _routed(routes, mine, dispatched_at, start, a_rank, num_ranks, max_tokens, K, CHUNK)
        before += tl.sum(((id_of >= first) & (id_of < first + expert)).to(tl.int32), axis=0)
    tl.store(expert_offsets_ptr + expert, before)
    if expert < num_experts:
        for start in range(0, a_rank * num_ranks, CHUNK):
            id_of, row, k, source = _routed(routes, mine, dispatched_at, start, a_rank, num_ranks, max_tokens, K, CHUNK)
            own = id_of == first + expert
            ranks = tl.cumsum(own.to(tl.int32), axis=0)
            token = tl.load(routes + tl.cast(row, tl.int64) * (K + 1), mask=own, other=0)
            tl.store(row_index_ptr + before + ranks - 1, row, mask=own)
            tl.store(slot_ptr + before + ranks - 1, (source * max_tokens + token) * K + k, mask=own)
            before += tl.max(ranks, axis=0)


@triton.jit
def _routed(routes, mine, dispatched_at, start, a_rank, num_ranks, max_tokens, K: tl.constexpr, CHUNK: tl.constexpr):
    """Physical ids of some (source, token, k), -1 where nothing has come, with their rows among all, k and source."""
    n = start + tl.arange(0, CHUNK)
    source, within = n // a_rank, n % a_rank
    exists = source < num_ranks
    count = tl.load(line_of(mine, dispatched_at, source) + 1, mask=exists, other=0).to(tl.int32)
    row, k = source * max_tokens + within // K, within % K
    exists = exists & (within // K < count)
    return tl.load(routes + row.to(tl.int64) * (K + 1) + 1 + k, mask=exists, other=-1), row, k, source


def row_block(words: int) -> tuple[int, int]:
    """A row's words, or its columns if they are quantised, rounded up to a power of two; and a program's warps."""
    block = triton.next_power_of_2(words)
    return block, max(1, min(8 if block <= 8192 else 16, block // 512))


def chunk_of(num_tokens: int, top_k: int, num_ranks: int) -> int:
    """Ids that `arrive_few_kernel` takes at a time, where ranks have about as many tokens."""
    return min(_CHUNK, max(128, triton.next_power_of_2(num_tokens * top_k * num_ranks)))


def cases() -> list[Case]:
    shapes = [  # ranks, experts, tokens, bytes of a row, columns that are quantised
        (8, 32, 128, packed_bytes(7168), 7168),
        (8, 32, 128, 14336, 0),
        (72, 4, 128, packed_bytes(7168), 7168),
    ]
    return [case for shape in shapes for case in _cases_of(*shape)]


def _cases_of(ranks: int, experts: int, tokens: int, row_bytes: int, columns: int) -> list[Case]:
    i32, i64, power, top_k = torch.int32, torch.int64, triton.next_power_of_2, 8
    words, home_words = row_bytes // 4, 3584
    block, warps = row_block(columns or max(words, home_words))
    name, common = f"EP{ranks} T{tokens}", {"expect": {90: "", 100: ""}}
    pointers = {"rank_offsets_ptr": i32, "epoch_ptr": i64, "peers_ptr": i64}
    sizes = {"me": 3, "num_ranks": ranks, "max_tokens": tokens, "dispatched_at": 0, "routes_at": 4096}
    send = {"x_ptr": torch.bfloat16 if columns else i32, "ids_ptr": i64, "valid_ptr": i32, "done_ptr": i32}
    send |= {"num_tokens": tokens, "rows_at": 1 << 20, "home_at": 1 << 28}
    arrive = dict.fromkeys(("expert_offsets_ptr", "row_index_ptr", "slot_ptr"), i32)
    arrive |= {"num_experts": experts, "stalled_at": 2048, "limit": 10**11}
    tile = {"K": top_k, "K_BLOCK": power(top_k), "TOKENS": power(tokens), "LIMITED": True, "RANKS": power(ranks)}
    rows = {"WORDS": words, "COLUMNS": columns, "HOME_WORDS": home_words, "BLOCK": block}
    found = {"K": top_k, "CHUNK": chunk_of(tokens, top_k, ranks), "RANKS": power(ranks), "CLOCK": True}
    cases = [
        Case(
            name=f"exchange_few.send {name} {'quantised' if columns else 'bf16'}",
            kernel=send_few_kernel,
            args={**pointers, **sizes, **send},
            constexprs=tile | rows,
            num_warps=warps,
            options=SEND_OPTIONS,
            **common,
        )
    ]
    if columns:  # what has arrived is found alike
        arrival = {**pointers, **sizes, **arrive}
        cases.append(
            Case(
                name=f"exchange_few.arrive {name}",
                kernel=arrive_few_kernel,
                args=arrival,
                constexprs=found,
                wide=False,
                **common,
            )
        )
    return cases
