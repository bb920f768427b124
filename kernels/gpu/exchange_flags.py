"""Flags in the ranks' arenas: who has written what it had to write, and waiting for it. A line is what one rank writes in
another's arena: epoch, count (`comm.all_to_all.symmetric_buffer`).

    flag_last   at the end of a kernel, its last program tells every rank; whatever all of its programs have stored is seen first
    await_all   every rank's flag is there, or one has not come in time: then that goes to everybody, for ever
    wait        a kernel that does that

Rows are stored as any stores are (`st.global.v4`), and only flags are ordered: behind its rows a program has a barrier and a
count (`atom.gpu.acq_rel`), and behind all counts the last program sets the flags of all ranks at once, one a lane
(`atom.sys.release`). A wait polls all flags and status words at once (`ld.volatile`), without a barrier where a warp holds them,
and acquires once they are there (`atom.sys.acquire`).

This is what CUDA C++ would do with the same pointers, so there is no second path in it. What only that could do, it has to be
measured for first: words that carry their own flag would save the flag's trip, and need 16-byte stores that arrive whole, which
Triton does not promise. Multicast stores are of no use, as a row goes to another place on each rank that needs it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertwire.kernels.gpu.compile import Case

LINE_BYTES = tl.constexpr(128)


@triton.jit
def as_words(address):
    """An address as a pointer to words that are stored 16 bytes at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def line_of(address, region, rank):
    return (address + region + rank * LINE_BYTES).to(tl.pointer_type(tl.int64))


@triton.jit
def flag_last(
    done_ptr, epoch_ptr, peers_ptr, counts_ptr, region, me, num_ranks, RANKS: tl.constexpr, COUNTED: tl.constexpr
):
    """The program that ends last tells every rank. Each program's stores come before its part of `done`, all of these before
    the last one's flags, which are released to the system."""
    tl.debug_barrier()
    done = tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        tl.store(done_ptr, 0)
        peer = tl.arange(0, RANKS)
        exists = peer < num_ranks
        line = line_of(tl.load(peers_ptr + peer, mask=exists, other=0), region, me)
        epoch = tl.load(epoch_ptr)
        if COUNTED:
            tl.store(line + 1, tl.load(counts_ptr + peer, mask=exists, other=0), mask=exists)
            tl.debug_barrier()
        tl.atomic_xchg(line, tl.zeros([RANKS], tl.int64) + epoch, mask=exists, sem="release", scope="sys")


@triton.jit
def await_all(
    peers_ptr, epoch, me, num_ranks, lines_at, stalled_at, limit,
    PHASE: tl.constexpr, RANKS: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """Until every rank's line has reached the epoch. A rank waited for in vain is written into everybody's arena, as
    `comm.all_to_all.symmetric_buffer.Stall`; then, and wherever it is found, nobody waits any more. What is computed
    then is void, but no more rows may
    come than the plan has room for: the counts of other exchanges are taken for 0."""
    rank = tl.arange(0, RANKS)
    exists = rank < num_ranks
    mine = tl.load(peers_ptr + me)
    flags, stalls = line_of(mine, lines_at, rank), line_of(mine, stalled_at, rank)
    started, spent = _now(CLOCK), tl.full([], 0, tl.int64)
    # Some are late (1), or nobody waits any more (2 and more). Warps have clocks of their own, and what they load may differ:
    # they go on or leave together, by what all of them have found.
    found = 1
    while found == 1:
        seen = tl.load(flags, mask=exists, other=0, volatile=True)
        stall = tl.load(stalls, mask=exists, other=0, volatile=True)
        spent = _now(CLOCK) - started if CLOCK else spent + 1
        stopped = ((stall != 0) | (spent > limit)).to(tl.int32)
        found = tl.max(tl.where(exists, (seen < epoch).to(tl.int32) + 2 * stopped, 0), axis=0)
    # Only now, what was written before the flags is seen behind them.
    tl.atomic_add(flags, tl.zeros([RANKS], tl.int64), mask=exists, sem="acquire", scope="sys")
    if found > 0:
        seen = tl.load(flags, mask=exists, other=0, volatile=True)
        stall = tl.load(stalls, mask=exists, other=0, volatile=True)
        if PHASE == 0:
            tl.store(flags + 1, tl.zeros([RANKS], tl.int64), mask=exists & (seen != epoch))
        missing = tl.min(tl.where(exists & (seen < epoch), rank, RANKS), axis=0)
        if (missing < RANKS) & (tl.max(tl.where(exists, stall, 0), axis=0) == 0):
            word = ((epoch * 2 + PHASE) << 16) + missing
            base = tl.load(peers_ptr + rank, mask=exists, other=0)
            words = tl.zeros([RANKS], tl.int64) + word
            tl.atomic_xchg(line_of(base, stalled_at, me), words, mask=exists, sem="release", scope="sys")


@triton.jit(do_not_specialize=["me", "limit"])
def wait_kernel(
    peers_ptr,
    epoch_ptr,
    me,
    num_ranks,
    lines_at,
    stalled_at,
    limit,  # ns with CLOCK, else turns
    PHASE: tl.constexpr,  # 0 dispatch, 1 combine, after which the next epoch begins
    RANKS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """One program of one warp."""
    epoch = tl.load(epoch_ptr)
    await_all(peers_ptr, epoch, me, num_ranks, lines_at, stalled_at, limit, PHASE, RANKS, CLOCK)
    if PHASE == 1:
        tl.store(epoch_ptr, epoch + 1)


@triton.jit
def _now(CLOCK: tl.constexpr):
    """Nanoseconds; the interpreter has no clock."""
    if CLOCK:
        return tl.extra.cuda.globaltimer()
    return tl.full([], 0, tl.int64)


def cases() -> list[Case]:
    args = {
        "peers_ptr": torch.int64,
        "epoch_ptr": torch.int64,
        "me": 3,
        "lines_at": 0,
        "stalled_at": 2048,
        "limit": 10**11,
    }
    return [
        Case(
            name=f"exchange_flags.wait EP{ranks}",
            kernel=wait_kernel,
            args=args | {"num_ranks": ranks},
            constexprs={"PHASE": 1, "RANKS": triton.next_power_of_2(ranks), "CLOCK": True},
            num_warps=1,
            expect={90: "", 100: ""},
            wide=False,
        )
        for ranks in (8, 72)
    ]
