"""Signals in the ranks' symmetric buffers: which rank has written everything, and waiting for it.

    signal_when_done    at the end of a kernel, its last program signals every rank; the stores of all programs are visible first
    wait_for_signals    wait until the signal of every rank is there, or one is late, which is reported to all ranks for good
    wait_for_signals_kernel    a kernel that does so

A signal is what one rank writes into another's buffer, in a cache line of its own: epoch and count
(`comm.all_to_all.symmetric_buffer`).

Rows are stored by ordinary stores (`st.global.v4`), and only signals are ordered. After its rows a program has a barrier and an
atomic count (`atom.gpu.acq_rel`), and after all counts the last program sets the signals of all ranks at once, one per lane
(`atom.sys.release`). A wait polls all signals and status words at once (`ld.volatile`), without a barrier where one warp holds
them, and acquires once they are there (`atom.sys.acquire`).

CUDA C++ would do the same with the same pointers, so there is no second implementation in it. What
only CUDA C++ could do has to be measured first: words that carry their own signal would save the
signal's trip, and need 16-byte stores that arrive whole, which Triton does not promise. Multicast
stores do not help, since a row goes to another place on each rank that needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIGNAL_BYTES = tl.constexpr(128)


@triton.jit
def as_words(address):
    """Return an address as a pointer to words that are stored 16 bytes at a time."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def signal_address(address, region, rank):
    """Return the address of a rank's signal."""
    return (address + region + rank * SIGNAL_BYTES).to(tl.pointer_type(tl.int64))


@triton.jit
def signal_when_done(
    done_ptr, epoch_ptr, peers_ptr, counts_ptr, region, me, num_ranks, RANKS: tl.constexpr, COUNTED: tl.constexpr
):
    """Let the program that ends last signal every rank.

    Each program's stores come before its part of `done`, and all of these before the last program's
    signals, which are released to the system.
    """
    tl.debug_barrier()
    done = tl.atomic_add(done_ptr, 1, sem="acq_rel", scope="gpu")
    if done == tl.num_programs(0) - 1:
        tl.store(done_ptr, 0)
        peer = tl.arange(0, RANKS)
        exists = peer < num_ranks
        signal = signal_address(tl.load(peers_ptr + peer, mask=exists, other=0), region, me)
        epoch = tl.load(epoch_ptr)
        if COUNTED:
            tl.store(signal + 1, tl.load(counts_ptr + peer, mask=exists, other=0), mask=exists)
            tl.debug_barrier()
        tl.atomic_xchg(signal, tl.zeros([RANKS], tl.int64) + epoch, mask=exists, sem="release", scope="sys")


@triton.jit
def wait_for_signals(
    peers_ptr, epoch, me, num_ranks, signals_offset, stall_offset, limit,
    PHASE: tl.constexpr, RANKS: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """Wait until every rank's signal has reached the epoch.

    A rank that is late is written into every rank's buffer, as
    `comm.all_to_all.symmetric_buffer.Stall`; from then on no rank waits any more. What is computed
    then is void, but no more rows may come than the plan has room for, so the counts of other
    epochs are taken as 0.
    """
    rank = tl.arange(0, RANKS)
    exists = rank < num_ranks
    mine = tl.load(peers_ptr + me)
    signals, stalls = signal_address(mine, signals_offset, rank), signal_address(mine, stall_offset, rank)
    started, spent = _now(CLOCK), tl.full([], 0, tl.int64)
    # Some signals are missing (1), or waiting has ended (2 and more). Warps have their own clocks and may load different values,
    # so they continue or leave together, by what all of them have found.
    found = 1
    while found == 1:
        seen = tl.load(signals, mask=exists, other=0, volatile=True)
        stall = tl.load(stalls, mask=exists, other=0, volatile=True)
        spent = _now(CLOCK) - started if CLOCK else spent + 1
        stopped = ((stall != 0) | (spent > limit)).to(tl.int32)
        found = tl.max(tl.where(exists, (seen < epoch).to(tl.int32) + 2 * stopped, 0), axis=0)
    # Only now is what was written before the signals visible.
    tl.atomic_add(signals, tl.zeros([RANKS], tl.int64), mask=exists, sem="acquire", scope="sys")
    if found > 0:
        seen = tl.load(signals, mask=exists, other=0, volatile=True)
        stall = tl.load(stalls, mask=exists, other=0, volatile=True)
        if PHASE == 0:
            tl.store(signals + 1, tl.zeros([RANKS], tl.int64), mask=exists & (seen != epoch))
        missing = tl.min(tl.where(exists & (seen < epoch), rank, RANKS), axis=0)
        if (missing < RANKS) & (tl.max(tl.where(exists, stall, 0), axis=0) == 0):
            word = ((epoch * 2 + PHASE) << 16) + missing
            base = tl.load(peers_ptr + rank, mask=exists, other=0)
            words = tl.zeros([RANKS], tl.int64) + word
            tl.atomic_xchg(signal_address(base, stall_offset, me), words, mask=exists, sem="release", scope="sys")


@triton.jit(do_not_specialize=["me", "limit"])
def wait_for_signals_kernel(
    peers_ptr,
    epoch_ptr,
    me,
    num_ranks,
    signals_offset,
    stall_offset,
    limit,  # ns with CLOCK, else polls
    PHASE: tl.constexpr,  # 0 dispatch, 1 combine, after which the next epoch begins
    RANKS: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Grid (1,) of one warp."""
    epoch = tl.load(epoch_ptr)
    wait_for_signals(peers_ptr, epoch, me, num_ranks, signals_offset, stall_offset, limit, PHASE, RANKS, CLOCK)
    if PHASE == 1:
        tl.store(epoch_ptr, epoch + 1)


@triton.jit
def _now(CLOCK: tl.constexpr):
    """Return nanoseconds; the interpreter has no clock."""
    if CLOCK:
        return tl.extra.cuda.globaltimer()
    return tl.full([], 0, tl.int64)
