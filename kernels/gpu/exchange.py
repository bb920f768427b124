"""Dispatch and combine by stores into the peers' memory: the kernels of `comm.all_to_all.nvlink_gpu`; the twin is
`comm.all_to_all.nvlink`.

    plan      where each row goes: a program a destination, prefix sums, no atomics
    send      each row is loaded once and stored to all its destinations; the last program writes counts and flags
    wait      until every rank's flag is there, or one has not come in time: then that goes to everybody, for ever
    count     how many routed rows have come from each rank for each local expert
    index     their order by expert, home rank, token, k
    go_home   expert rows go to their slots on their home ranks; the last program writes flags

`comm.all_to_all.symmetric_buffer` says where everything lies; here it comes as byte offsets. Addresses of arenas are
integers, in a table by rank.
Rows are multiples of 16 bytes, moved as i32 words; or they come as numbers and are quantised on their way from memory to the
peers, which find what `kernels.ops.quantize.pack` would have made of them.

T tokens, K experts a token, R routed rows, P ranks, e local experts. A line is what one rank writes: epoch, count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.exchange_flags import as_words, flag_last, line_of
from expertwire.kernels.gpu.quantize import scale_groups
from expertwire.kernels.ops.quantize import GROUP, packed_bytes

_GROUP = tl.constexpr(GROUP)
_ROUTES_BLOCK = 2048  # ids a program takes at a time
# Told how many registers there are, ptxas does not spill to save some.
SEND_OPTIONS = {"maxnreg": 255, **EARLY}


@triton.jit
def load_row(x_ptr, t, start, exists, WORDS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Of row t, from `start` on: words; or, if they are COLUMNS, numbers."""
    WIDTH: tl.constexpr = COLUMNS if COLUMNS > 0 else WORDS
    i = start + tl.arange(0, BLOCK)
    return tl.load(x_ptr + tl.cast(t, tl.int64) * WIDTH + i, mask=(i < WIDTH) & exists, other=0)


@triton.jit
def as_sent(row, COLUMNS: tl.constexpr):
    """What `load_row` has returned as it travels: words, or fp8 values and their scales."""
    if COLUMNS == 0:
        return row, row
    else:
        values, scales = scale_groups(row.to(tl.float32), _GROUP)
        return values.to(tl.float8e4nv), scales


@triton.jit
def store_row(address, row, scales, start, WORDS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """What `as_sent` has returned, to the row at an address."""
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
    """How many rows count."""
    if LIMITED:
        num_tokens = tl.minimum(num_tokens, tl.load(valid_ptr))
    return num_tokens


@triton.jit(do_not_specialize=["num_tokens"])
def plan_kernel(
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
    """`target` i32 [T, K], where the expert lies on this program's rank: at the token's first such k, rank * max_tokens + the
    row's place; at others -1. `counts` i64 [P]."""
    wait_for_previous()
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
def send_kernel(
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
    dispatched_at,
    routes_at,
    rows_at,
    home_at,
    K: tl.constexpr,
    K_BLOCK: tl.constexpr,  # K + 1 rounded up to a power of two
    WORDS: tl.constexpr,  # of a row that travels
    COLUMNS: tl.constexpr,  # of x, if it is quantised on the way, else 0
    HOME_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,  # num_ranks rounded up to a power of two
    LIMITED: tl.constexpr,
):
    wait_for_previous()
    for t in range(tl.program_id(0), num_valid_rows(valid_ptr, num_tokens, LIMITED), tl.num_programs(0)):
        _send_routes(ids_ptr, target_ptr, peers_ptr, t, me, max_tokens, routes_at, K, K_BLOCK)
        for start in range(0, COLUMNS if COLUMNS > 0 else WORDS, BLOCK):
            row, scales = as_sent(load_row(x_ptr, t, start, True, WORDS, COLUMNS, BLOCK), COLUMNS)
            for k in range(K):
                if tl.load(ids_ptr + t * K + k) >= 0:
                    target = tl.load(target_ptr + t * K + k)
                    if target >= 0:
                        place = (me * max_tokens + target % max_tokens).to(tl.int64) * (WORDS * 4)
                        to = tl.load(peers_ptr + target // max_tokens) + rows_at + place
                        store_row(to, row, scales, start, WORDS, COLUMNS, BLOCK)
        for k in range(K):
            if tl.load(ids_ptr + t * K + k) < 0:
                home = as_words(tl.load(peers_ptr + me) + home_at) + tl.cast(t * K + k, tl.int64) * HOME_WORDS
                for start in range(0, HOME_WORDS, BLOCK):
                    w = start + tl.arange(0, BLOCK)
                    tl.store(home + w, tl.zeros([BLOCK], tl.int32), mask=w < HOME_WORDS)
    flag_last(done_ptr, epoch_ptr, peers_ptr, counts_ptr, dispatched_at, me, num_ranks, RANKS, COUNTED=True)


@triton.jit
def _send_routes(ids_ptr, target_ptr, peers_ptr, t, me, max_tokens, routes_at, K: tl.constexpr, K_BLOCK: tl.constexpr):
    """The token and its ids, beside each copy of the row."""
    i = tl.arange(0, K_BLOCK)
    ids = tl.load(ids_ptr + t * K + i - 1, mask=(i > 0) & (i <= K), other=0).to(tl.int32)
    route = tl.where(i == 0, t, ids)
    for k in range(K):
        if tl.load(ids_ptr + t * K + k) >= 0:
            target = tl.load(target_ptr + t * K + k)
            if target >= 0:
                base = (tl.load(peers_ptr + target // max_tokens) + routes_at).to(tl.pointer_type(tl.int32))
                place = (me * max_tokens + target % max_tokens).to(tl.int64) * (K + 1)
                tl.store(base + place + i, route, mask=i <= K)


@triton.jit
def routes_of(peers_ptr, me, source, max_tokens, routes_at, K: tl.constexpr):
    """What has come from one rank, [T, K + 1]."""
    base = (tl.load(peers_ptr + me) + routes_at).to(tl.pointer_type(tl.int32))
    return base + tl.cast(source * max_tokens, tl.int64) * (K + 1)


@triton.jit(do_not_specialize=["me"])
def count_kernel(
    peers_ptr,
    rank_offsets_ptr,
    counts_ptr,
    me,
    max_tokens,
    num_experts,
    dispatched_at,
    routes_at,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,  # num_experts + 1 rounded up to a power of two
):
    """`counts` i32 [P, e]; a program a source."""
    wait_for_previous()
    source = tl.program_id(0)
    first = tl.load(rank_offsets_ptr + me)
    num_ids = tl.load(line_of(tl.load(peers_ptr + me), dispatched_at, source) + 1).to(tl.int32) * K
    routes = routes_of(peers_ptr, me, source, max_tokens, routes_at, K)
    expert = tl.arange(0, EXPERTS)
    found = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_ids, CHUNK):
        n = start + tl.arange(0, CHUNK)
        local = tl.load(routes + n // K * (K + 1) + 1 + n % K, mask=n < num_ids, other=-1) - first
        here = (n < num_ids) & (local >= 0) & (local < num_experts)
        # One bin more than experts takes what is none of them.
        found += tl.histogram(tl.where(here, local, EXPERTS - 1), EXPERTS)
    tl.store(counts_ptr + source * num_experts + expert, found, mask=expert < num_experts)


@triton.jit(do_not_specialize=["me"])
def index_kernel(
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
    dispatched_at,
    routes_at,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Programs (expert, source), and one more "expert" for the end of the offsets.

    `slot`: (home rank * max_tokens + t) * K + k.
    """
    wait_for_previous()
    expert, source = tl.program_id(0), tl.program_id(1)
    e, p = tl.arange(0, EXPERTS)[None, :], tl.arange(0, RANKS)[:, None]
    counts = tl.load(counts_ptr + p * num_experts + e, mask=(p < num_ranks) & (e < num_experts), other=0)
    earlier = (e < expert) | ((e == expert) & (p < source))
    before = tl.sum(tl.sum(tl.where(earlier, counts, 0), axis=1), axis=0)
    if source == 0:
        tl.store(expert_offsets_ptr + expert, before)
    if expert < num_experts:
        wanted = tl.load(rank_offsets_ptr + me) + expert
        num_ids = tl.load(line_of(tl.load(peers_ptr + me), dispatched_at, source) + 1).to(tl.int32) * K
        routes = routes_of(peers_ptr, me, source, max_tokens, routes_at, K)
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
def go_home_kernel(
    y_ptr,  # i32 words
    slot_ptr,
    expert_offsets_ptr,
    epoch_ptr,
    done_ptr,
    peers_ptr,
    me,
    num_ranks,
    num_experts,
    slots_a_rank,
    combined_at,
    home_at,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
):
    wait_for_previous()
    for r in range(tl.program_id(0), tl.load(expert_offsets_ptr + num_experts), tl.num_programs(0)):
        slot = tl.load(slot_ptr + r)
        home = as_words(tl.load(peers_ptr + slot // slots_a_rank) + home_at)
        home += (slot % slots_a_rank).to(tl.int64) * WORDS
        for start in range(0, WORDS, BLOCK):
            w = start + tl.arange(0, BLOCK)
            row = tl.load(y_ptr + tl.cast(r, tl.int64) * WORDS + w, mask=w < WORDS)
            tl.store(home + w, row, mask=w < WORDS)
    flag_last(done_ptr, epoch_ptr, peers_ptr, epoch_ptr, combined_at, me, num_ranks, RANKS, COUNTED=False)


def row_block(words: int) -> tuple[int, int]:
    """Words of a row that a program moves at a time, and its warps: four 16-byte accesses a thread at most."""
    block = min(4096, triton.next_power_of_2(words))
    return block, max(1, min(8, block // 512))


def quantized_block(columns: int) -> tuple[int, int]:
    """Columns of a row that a program quantises at a time, all of most rows, and its warps: 16 a thread, or 32."""
    block = min(8192, triton.next_power_of_2(columns))
    return block, max(1, min(8, block // 512))


def plan_tokens(num_tokens: int, top_k: int) -> int:
    """Tokens that `plan_kernel` takes at a time."""
    most = max(16, _ROUTES_BLOCK * 2 // triton.next_power_of_2(top_k))
    return min(most, max(16, triton.next_power_of_2(num_tokens)))


def ids_chunk(num_ids: int) -> int:
    """Ids that `count_kernel` and `index_kernel` take at a time."""
    return min(_ROUTES_BLOCK, max(128, triton.next_power_of_2(num_ids)))


def cases() -> list[Case]:
    shapes = [
        ("EP8 T128 quantised", 8, 32, 128, 8, packed_bytes(7168), 7168),
        ("EP8 T4096 bf16", 8, 32, 4096, 8, 14336, 0),
        ("EP72 T128 bf16", 72, 4, 128, 8, 14336, 0),
        ("EP4 T2048 K22 bf16", 4, 128, 2048, 22, 4096, 0),
        ("EP16 T512 K22 quantised", 16, 32, 512, 22, packed_bytes(2048), 2048),
    ]
    return [case for shape in shapes for case in _cases_of(*shape)]


def _cases_of(name: str, ranks: int, experts: int, tokens: int, top_k: int, row_bytes: int, columns: int) -> list[Case]:
    i32, i64, power = torch.int32, torch.int64, triton.next_power_of_2
    words, home_words = row_bytes // 4, 3584 if top_k == 8 else 1024
    block, warps = quantized_block(columns) if columns else row_block(max(words, home_words))
    home_block, home_warps = row_block(home_words)
    pointers = {"epoch_ptr": i64, "done_ptr": i32, "peers_ptr": i64}
    sizes = {"me": 3, "num_ranks": ranks}
    k, chunk = {"K": top_k}, {"CHUNK": ids_chunk(tokens * top_k), "EXPERTS": power(experts + 1)}
    routes = {"me": 3, "max_tokens": tokens, "num_experts": experts, "dispatched_at": 0, "routes_at": 4096}
    found = {"peers_ptr": i64, "rank_offsets_ptr": i32, "counts_ptr": i32}

    def case(kernel, args, constexprs, **options):
        return Case(
            name=f"exchange.{kernel.__name__.removesuffix('_kernel')} {name}",
            kernel=kernel,
            args=args,
            constexprs=constexprs,
            expect={90: "", 100: ""},
            **({"options": EARLY} | options),
        )

    plan = {"ids_ptr": i64, "rank_offsets_ptr": i32, "target_ptr": i32, "counts_ptr": i64, "valid_ptr": i32}
    x = torch.bfloat16 if columns else i32
    send = {"x_ptr": x, "ids_ptr": i64, "target_ptr": i32, "counts_ptr": i64, "valid_ptr": i32, **pointers, **sizes}
    regions = {"dispatched_at": 0, "routes_at": 4096, "rows_at": 1 << 20, "home_at": 1 << 28}
    home = {"y_ptr": i32, "slot_ptr": i32, "expert_offsets_ptr": i32, **pointers, **sizes, "num_experts": experts}
    index = {**found, "expert_offsets_ptr": i32, "row_index_ptr": i32, "slot_ptr": i32, **routes, "num_ranks": ranks}
    tile = {"TOKENS": plan_tokens(tokens, top_k), "K_BLOCK": power(top_k), "LIMITED": True}
    rows = {"WORDS": words, "COLUMNS": columns, "HOME_WORDS": home_words, "BLOCK": block, "K_BLOCK": power(top_k + 1)}
    back = {"WORDS": home_words, "BLOCK": home_block, "RANKS": power(ranks)}
    return [
        case(plan_kernel, {**plan, "num_tokens": tokens, "max_tokens": tokens}, k | tile, wide=False),
        case(
            send_kernel,
            {**send, "num_tokens": tokens, "max_tokens": tokens, **regions},
            k | rows | {"RANKS": power(ranks), "LIMITED": True},
            num_warps=warps,
            options=SEND_OPTIONS,
        ),
        case(count_kernel, {**found, **routes}, k | chunk, wide=False),
        case(index_kernel, index, k | chunk | {"RANKS": power(ranks)}, wide=False),
        case(
            go_home_kernel,
            {**home, "slots_a_rank": tokens * top_k, "combined_at": 1024, "home_at": 1 << 28},
            back,
            num_warps=home_warps,
        ),
    ]
