"""Dispatch and combine by writing into the peers' memory: the protocol, as the CPU's ranks run it.

    dispatch_send   each token's row goes once to every distinct rank that holds one of its experts: into that rank's `rows[me]`,
                    at the next free place in the order of tokens, with its token and its expert ids beside it in `routes`.
                    Then the number of rows, then the epoch: the flag.
    dispatch_recv   wait for the flag of every rank; sort what arrived by expert. The experts read the rows where they lie.
    combine_send    each expert row goes into its slot (token, k) of its home rank's `home`; then the flag.
    combine_recv    wait for the flag of every rank; the rows are in place.

One arena is enough: a peer writes rows of the next dispatch here only after it has seen this rank's combine flag, which follows
the experts' reading; and expert rows of the next combine only after this rank's next dispatch, which follows the reading of the
last one. So what `dispatch_recv` and `combine_recv` return is good until the next `dispatch_send`. Every rank takes part in every
phase, also with no tokens.

A wait that takes too long writes whom it waited for into everybody's arena, for ever: the later waits of all ranks leave at once.

`comm.all_to_all.nvlink_gpu` does the same on GPUs. Letters as in `comm.all_to_all.base` and `comm.all_to_all.symmetric_buffer`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm import symmetric_memory
from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched
from expertwire.comm.all_to_all.symmetric_buffer import COMBINE, DISPATCH, Arena, ArenaLayout, Stall, stall_error

# Turns of a wait that only let others run, and how long the later ones sleep.
_EAGER_TURNS = 50
_SLEEP_S = 20e-6
# Bytes of rows that lie in the cache on their way from one place to another.
_CACHED = 1 << 18
# How long a rank that has waited in vain listens for one that was let down earlier.
_AGREE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class _Handle:
    epoch: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Arrivals:
    """Of each routed row in the order of experts: its row among all of the arena's, its home rank, and its slot there."""

    row_R: np.ndarray
    home_rank_R: np.ndarray
    slot_R: np.ndarray
    expert_offsets: np.ndarray


def build(spec: AllToAllSpec) -> NvlinkAllToAll:
    """Between the processes of one machine. All ranks call it together.

    Raises:
        ValueError: they are on several, or there is not enough shared memory.
    """
    return NvlinkAllToAll(spec, symmetric_memory.shared(spec.group, ArenaLayout.of(spec).nbytes))


class NvlinkAllToAll:
    """See the module.

    Args:
        memories: the arenas' bytes, by rank (`comm.symmetric_memory`).
    """

    graph_safe = False

    def __init__(self, spec: AllToAllSpec, memories: Sequence[Tensor]) -> None:
        layout = ArenaLayout.of(spec)
        self._spec, self._rank = spec, spec.group.rank
        self._arenas = [Arena.of(memory, layout, spec) for memory in memories]
        self._mine = self._arenas[self._rank]
        self._x_UD = torch.from_numpy(self._mine.rows).view(spec.dtype).flatten(0, 1)
        self._home_SD = torch.from_numpy(self._mine.home).view(spec.combine_dtype or spec.dtype)
        self._rank_offsets = np.asarray(spec.rank_offsets, np.int64)
        self._fence = symmetric_memory.Fence()
        self._epoch = 0
        self._arrivals: _Arrivals | None = None

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _Handle:
        assert num_valid is None, "the host counts rows"
        num_tokens = x_TD.shape[0]
        assert num_tokens == num_tokens_P[self._rank], f"rank {self._rank} has {num_tokens} tokens, plan {num_tokens_P}"
        assert num_tokens <= self._spec.max_tokens, f"{num_tokens} tokens, built for {self._spec.max_tokens}"
        self._epoch += 1
        ids_TK = physical_TK.numpy()
        rank_TK = np.searchsorted(self._rank_offsets, ids_TK, side="right") - 1
        self._mine.home[np.flatnonzero(ids_TK < 0)] = 0
        rows = _bytes(x_TD)
        for peer, arena in enumerate(self._arenas):
            tokens = np.flatnonzero((rank_TK == peer).any(axis=1))
            num = len(tokens)
            rows.take(tokens, axis=0, out=arena.rows[self._rank, :num], mode="clip")  # others copy twice
            routes = arena.routes[self._rank, :num]
            routes[:, 0], routes[:, 1:] = tokens, ids_TK[tokens]
            arena.dispatched[self._rank, 1] = num
        self._fence()
        for arena in self._arenas:
            arena.dispatched[self._rank, 0] = self._epoch
        return _Handle(epoch=self._epoch, num_tokens=num_tokens)

    def dispatch_recv(self, handle: _Handle) -> Dispatched:
        self._wait(self._mine.dispatched, handle.epoch, DISPATCH)
        self._arrivals = arrivals = self._sort()
        return Dispatched(
            x_UD=self._x_UD,
            row_index_R=torch.from_numpy(arrivals.row_R),
            expert_offsets=arrivals.expert_offsets,
        )

    def combine_send(self, handle: _Handle, y_RD: Tensor) -> _Handle:
        arrivals = self._arrivals
        assert arrivals is not None, "rows are sent home before they have arrived"
        assert len(y_RD) == len(arrivals.row_R), f"{len(y_RD)} rows go home, {len(arrivals.row_R)} came"
        y = _bytes(y_RD)
        for peer, arena in enumerate(self._arenas):
            rows = np.flatnonzero(arrivals.home_rank_R == peer)
            _copy(arena.home, arrivals.slot_R[rows], y, rows)
        self._fence()
        for arena in self._arenas:
            arena.combined[self._rank, 0] = handle.epoch
        self._arrivals = None
        return handle

    def combine_recv(self, handle: _Handle) -> Tensor:
        self._wait(self._mine.combined, handle.epoch, COMBINE)
        num_slots, top_k = handle.num_tokens * self._spec.top_k, self._spec.top_k
        return self._home_SD[:num_slots].unflatten(0, (handle.num_tokens, top_k))

    def _sort(self) -> _Arrivals:
        """What has arrived, by expert, within an expert by (home rank, token, k)."""
        max_tokens, (first, last) = self._spec.max_tokens, self._rank_offsets[self._rank : self._rank + 2]
        counts_P = self._mine.dispatched[:, 1]
        row_U = np.concatenate([peer * max_tokens + np.arange(num) for peer, num in enumerate(counts_P)])
        routes_U = self._mine.routes.reshape(-1, self._spec.top_k + 1)[row_U]
        expert_UK = routes_U[:, 1:] - first
        u_R, k_R = np.nonzero((expert_UK >= 0) & (expert_UK < last - first))
        expert_R = expert_UK[u_R, k_R]
        expert_offsets = np.zeros(last - first + 1, np.int64)
        np.bincount(expert_R, minlength=last - first).cumsum(out=expert_offsets[1:])
        order_R = expert_R.argsort(kind="stable")
        u_R, k_R = u_R[order_R], k_R[order_R]
        row_R = row_U[u_R]
        return _Arrivals(
            row_R=row_R,
            home_rank_R=row_R // max_tokens,
            slot_R=routes_U[u_R, 0].astype(np.int64) * self._spec.top_k + k_R,
            expert_offsets=expert_offsets,
        )

    def _wait(self, lines: np.ndarray, epoch: int, phase: int) -> None:
        """Until every rank's line has reached the epoch.

        Raises:
            RankStalled: one has not in time, here or on another rank.
        """
        epochs_P, stalls_P = lines[:, 0], self._mine.stalled[:, 0]
        deadline, turn = time.monotonic() + self._spec.timeout_s, 0
        while True:
            if stalls_P.any():
                raise stall_error(stalls_P, self._spec)
            if (epochs_P >= epoch).all():
                break
            if turn > _EAGER_TURNS and time.monotonic() > deadline:
                self._announce(Stall(epoch, phase, int((epochs_P < epoch).argmax())))
            elif turn < _EAGER_TURNS:
                os.sched_yield()
            else:
                time.sleep(_SLEEP_S)
            turn += 1
        self._fence()

    def _announce(self, stall: Stall) -> None:
        for arena in self._arenas:
            arena.stalled[self._rank, 0] = stall.word()
        time.sleep(_AGREE_S)


def _copy(target: np.ndarray, places: np.ndarray, source: np.ndarray, rows: np.ndarray) -> None:
    """Rows of the source to places in the target."""
    at_once = max(1, _CACHED // max(1, source.shape[1]))
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        target[places[some]] = source[rows[some]]


def _bytes(rows: Tensor) -> np.ndarray:
    """u8 [rows, bytes]."""
    if not rows.numel():  # torch gives no view of bytes where it has no strides
        return np.empty((rows.shape[0], rows.shape[1] * rows.itemsize), np.uint8)
    return rows.contiguous().view(torch.uint8).numpy()
