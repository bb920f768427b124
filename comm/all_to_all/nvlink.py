"""Dispatch and combine by writing into the peers' memory: the protocol, as CPU ranks run it over shared memory.

    dispatch_send   write each token's row once to every distinct rank that holds one of its experts: into that rank's
                    `dispatch_rows[me]`, at the next index in the order of tokens, with its token and expert ids in `routes`.
                    Then write the number of rows, then the epoch: the signal.
    dispatch_recv   wait for the signal of every rank; sort the rows received by expert. The experts read the rows in place.
    combine_send    write each expert row into its slot (token, k) of its home rank's `combine_rows`; then the signal.
    combine_recv    wait for the signal of every rank; the rows are in place.

One buffer is enough. A peer writes rows of the next dispatch here only after it has seen this rank's combine signal, which
follows the experts' reading; and rows of the next combine only after this rank's next dispatch, which follows the reading of
the last combine. So the results of `dispatch_recv` and `combine_recv` are valid until the next `dispatch_send`. Every rank
takes part in every phase, also without tokens.

A wait that times out writes the missing rank into all buffers, where it stays: later waits of all ranks end at once.

`comm.all_to_all.nvlink_gpu` does the same on GPUs. Letters as in `comm.all_to_all.base` and
`comm.all_to_all.symmetric_buffer`.
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
from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched, Handle
from expertwire.comm.all_to_all.symmetric_buffer import COMBINE, DISPATCH, BufferLayout, BufferViews, Stall, stall_error

_EAGER_POLLS = 50  # polls of a wait that only yield; later ones sleep
_SLEEP_S = 20e-6
_CACHED = 1 << 18  # bytes of rows that stay in the cache while they are copied
_AGREE_S = 0.05  # time for an earlier stall of another rank to arrive


@dataclass(frozen=True, kw_only=True)
class _Handle(Handle):
    epoch: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Received:
    """Routed rows in the order of experts."""

    row_R: np.ndarray  # index into all dispatch rows of the buffer
    home_rank_R: np.ndarray
    slot_R: np.ndarray  # on the home rank
    expert_offsets: np.ndarray


def build(spec: AllToAllSpec) -> NvlinkAllToAll:
    """Return an all-to-all between the processes of one machine. All ranks call it together.

    Raises:
        ValueError: the ranks are on several machines, or there is not enough shared memory.
    """
    return NvlinkAllToAll(spec, symmetric_memory.shared(spec.group, BufferLayout.of(spec).nbytes))


class NvlinkAllToAll:
    """An all-to-all over `memories`, the bytes of the ranks' buffers (`comm.symmetric_memory`)."""

    graph_safe = False

    def __init__(self, spec: AllToAllSpec, memories: Sequence[Tensor]) -> None:
        layout = BufferLayout.of(spec)
        self._spec, self._rank = spec, spec.group.rank
        self._buffers = [BufferViews.of(memory, layout, spec) for memory in memories]
        self._mine = self._buffers[self._rank]
        self._x_UD = torch.from_numpy(self._mine.dispatch_rows).view(spec.dtype).flatten(0, 1)
        self._y_ND = torch.from_numpy(self._mine.combine_rows).view(spec.combine_dtype or spec.dtype)
        self._rank_offsets = np.asarray(spec.rank_offsets, np.int64)
        self._fence = symmetric_memory.Fence()
        self._epoch = 0
        self._received: _Received | None = None

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _Handle:
        assert num_valid is None, "the host counts rows"
        num_tokens = x_TD.shape[0]
        self._spec.check_tokens(num_tokens, num_tokens_P)
        self._epoch += 1
        ids_TK = physical_TK.numpy()
        rank_TK = np.searchsorted(self._rank_offsets, ids_TK, side="right") - 1
        self._mine.combine_rows[np.flatnonzero(ids_TK < 0)] = 0
        rows = _bytes(x_TD)
        for peer, buffer in enumerate(self._buffers):
            tokens = np.flatnonzero((rank_TK == peer).any(axis=1))
            num = len(tokens)
            rows.take(tokens, axis=0, out=buffer.dispatch_rows[self._rank, :num], mode="clip")  # other modes copy twice
            routes = buffer.routes[self._rank, :num]
            routes[:, 0], routes[:, 1:] = tokens, ids_TK[tokens]
            buffer.dispatch_signals[self._rank, 1] = num
        self._fence()
        for buffer in self._buffers:
            buffer.dispatch_signals[self._rank, 0] = self._epoch
        return _Handle(epoch=self._epoch, num_tokens=num_tokens)

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        assert isinstance(handle, _Handle), handle
        self._wait(self._mine.dispatch_signals, handle.epoch, DISPATCH)
        self._received = received = self._sort()
        return Dispatched(
            x_UD=self._x_UD,
            row_index_R=torch.from_numpy(received.row_R),
            expert_offsets=received.expert_offsets,
        )

    def combine_send(self, handle: Handle, y_RD: Tensor) -> _Handle:
        assert isinstance(handle, _Handle), handle
        received = self._received
        assert received is not None, "combine before dispatch"
        assert len(y_RD) == len(received.row_R), f"{len(y_RD)} rows to combine, {len(received.row_R)} were dispatched"
        y = _bytes(y_RD)
        for peer, buffer in enumerate(self._buffers):
            rows = np.flatnonzero(received.home_rank_R == peer)
            _copy(buffer.combine_rows, received.slot_R[rows], y, rows)
        self._fence()
        for buffer in self._buffers:
            buffer.combine_signals[self._rank, 0] = handle.epoch
        self._received = None
        return handle

    def combine_recv(self, handle: Handle) -> Tensor:
        assert isinstance(handle, _Handle), handle
        self._wait(self._mine.combine_signals, handle.epoch, COMBINE)
        num_slots, top_k = handle.num_tokens * self._spec.top_k, self._spec.top_k
        return self._y_ND[:num_slots].unflatten(0, (handle.num_tokens, top_k))

    def _sort(self) -> _Received:
        """Return the rows received, by expert, within an expert by (home rank, token, k)."""
        max_tokens, (first, last) = self._spec.max_tokens, self._rank_offsets[self._rank : self._rank + 2]
        counts_P = self._mine.dispatch_signals[:, 1]
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
        return _Received(
            row_R=row_R,
            home_rank_R=row_R // max_tokens,
            slot_R=routes_U[u_R, 0].astype(np.int64) * self._spec.top_k + k_R,
            expert_offsets=expert_offsets,
        )

    def _wait(self, signals: np.ndarray, epoch: int, phase: int) -> None:
        """Wait until every rank's signal has reached the epoch.

        Raises:
            RankStalled: a signal did not come in time, here or on another rank.
        """
        epochs_P, stalls_P = signals[:, 0], self._mine.stall_signals[:, 0]
        deadline, polls = time.monotonic() + self._spec.timeout_s, 0
        while True:
            if stalls_P.any():
                raise stall_error(stalls_P, self._spec)
            if (epochs_P >= epoch).all():
                break
            if polls > _EAGER_POLLS and time.monotonic() > deadline:
                self._announce(Stall(epoch, phase, int((epochs_P < epoch).argmax())))
            elif polls < _EAGER_POLLS:
                os.sched_yield()
            else:
                time.sleep(_SLEEP_S)
            polls += 1
        self._fence()

    def _announce(self, stall: Stall) -> None:
        for buffer in self._buffers:
            buffer.stall_signals[self._rank, 0] = stall.word()
        time.sleep(_AGREE_S)


def _copy(target: np.ndarray, places: np.ndarray, source: np.ndarray, rows: np.ndarray) -> None:
    """Copy rows of the source to places in the target."""
    at_once = max(1, _CACHED // max(1, source.shape[1]))
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        target[places[some]] = source[rows[some]]


def _bytes(rows: Tensor) -> np.ndarray:
    """Return rows as u8 [rows, bytes]."""
    if not rows.numel():  # torch has no view of bytes of an empty tensor
        return np.empty((rows.shape[0], rows.shape[1] * rows.itemsize), np.uint8)
    return rows.contiguous().view(torch.uint8).numpy()
