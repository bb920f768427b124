"""Dispatch and combine by sending and receiving: NCCL between GPUs, and the same code over gloo between CPUs.

`NcclAllToAll`, for many tokens: ranks tell each other how many rows to expect and for which experts, and the rows follow in one
grouped send and receive; while they travel, everybody works out its order of experts. The host learns the counts, so it cannot
be captured in a CUDA graph.

`PaddedNcclAllToAll`, for few tokens and few ranks: everything has the size of the most there can be, so that the host learns
nothing and a graph can hold it. Rows padded to `max_tokens` for every pair of ranks are as many bytes as all of a rank's rows
sent to everybody, so they are just gathered, with the ids; a header row of the ids counts the tokens. Coming home, every rank
sends everybody all of its `max_tokens * K` slots, of which those with an expert here are filled: P times the bytes needed.

Never run on a GPU by us. Letters as in `comm.all_to_all`, S slots (t, k) of this rank that have an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from expertwire.comm.all_to_all import AllToAllSpec, Dispatched
from expertwire.comm.group import PeerGroup, Pending, exchange_now
from expertwire.kernels.permute import Permuted


@dataclass(frozen=True, kw_only=True)
class _Handle:
    """`routed_P`, `arrivals_P`: how many of this rank's routed rows go to each rank, and of each rank's come here. `place_R`:
    where the routed rows, in the order of arrival, are in the order of experts."""

    num_tokens: int
    slot_S: Tensor
    routed_P: list[int]
    arrivals_P: list[int]
    place_R: Tensor
    arrived: Dispatched
    pending: Pending


@dataclass(frozen=True, kw_only=True)
class _Returning:
    num_tokens: int
    slot_S: Tensor
    home_SD: Tensor
    pending: Pending


class NcclAllToAll:
    """See the module."""

    graph_safe = False

    def __init__(self, spec: AllToAllSpec) -> None:
        self._spec, self._group, self._ranks_of = spec, cast(PeerGroup, spec.group), RankTable(spec.rank_offsets)

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _Handle:
        assert num_valid is None, "the host counts rows"
        group, num_tokens = self._group, x_TD.shape[0]
        assert num_tokens == num_tokens_P[group.rank], f"rank {group.rank} has {num_tokens} tokens, plan {num_tokens_P}"
        assert num_tokens <= self._spec.max_tokens, f"{num_tokens} tokens, built for {self._spec.max_tokens}"
        rank_TK = self._ranks_of(physical_TK)
        at_PTK = rank_TK == torch.arange(group.size, device=x_TD.device)[:, None, None]
        copy_PT = at_PTK.any(dim=2)
        counts_P2 = torch.stack([copy_PT.sum(dim=1), at_PTK.sum(dim=(1, 2))], dim=1)
        ones = [1] * group.size
        received_P2 = exchange_now(group, counts_P2, ones, ones)
        (copies_P, routed_P), (rows_P, arrivals_P) = (
            counts_P2.T.tolist() for counts_P2 in torch.stack([counts_P2, received_P2]).cpu()
        )
        token_C = copy_PT.nonzero()[:, 1]
        ids_UK = _swap(group, physical_TK[token_C].int(), copies_P, rows_P)[0]
        x_UD, pending = _swap(group, x_TD[token_C], copies_P, rows_P, wait=False)
        row_index_R, place_R, offsets = self._by_expert(ids_UK)
        return _Handle(
            num_tokens=num_tokens,
            slot_S=rank_TK.flatten().sort(stable=True).indices[rank_TK.numel() - sum(routed_P) :],
            routed_P=routed_P,
            arrivals_P=arrivals_P,
            place_R=place_R,
            arrived=Dispatched(x_UD=x_UD, row_index_R=row_index_R, expert_offsets=offsets.cpu().numpy()),
            pending=pending,
        )

    def dispatch_recv(self, handle: _Handle) -> Dispatched:
        handle.pending.wait()
        return handle.arrived

    def combine_send(self, handle: _Handle, y_RD: Tensor) -> _Returning:
        rows_RD = y_RD.index_select(0, handle.place_R)
        home_SD, pending = _swap(self._group, rows_RD, handle.arrivals_P, handle.routed_P, wait=False)
        return _Returning(num_tokens=handle.num_tokens, slot_S=handle.slot_S, home_SD=home_SD, pending=pending)

    def combine_recv(self, handle: _Returning) -> Tensor:
        handle.pending.wait()
        slots, top_k, width = handle.num_tokens * self._spec.top_k, self._spec.top_k, handle.home_SD.shape[1]
        out_ND = handle.home_SD.new_zeros(slots, width)
        out_ND[handle.slot_S] = handle.home_SD
        return out_ND.view(handle.num_tokens, top_k, width)

    def _by_expert(self, ids_UK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the routed rows that come here: their rows in the order of experts, their places in it, each expert's offset."""
        first, last = self._spec.rank_offsets[self._group.rank :][:2]
        row_A, k_A = ((ids_UK >= first) & (ids_UK < last)).nonzero(as_tuple=True)
        expert_A = ids_UK[row_A, k_A] - first
        order_R = expert_A.sort(stable=True).indices
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        offsets = torch.zeros(last - first + 1, dtype=torch.int64, device=ids_UK.device)
        offsets[1:] = torch.bincount(expert_A, minlength=last - first).cumsum(0)
        return row_A[order_R], place_R, offsets


def _swap(
    group: PeerGroup, rows: Tensor, counts_P: list[int], receive_P: list[int], wait: bool = True
) -> tuple[Tensor, Pending]:
    """`counts_P[p]` of the rows to each rank p, and `receive_P[p]` from it, in rank order, into a new tensor."""
    out = rows.new_empty(sum(receive_P), *rows.shape[1:])
    pending = group.swap(out.split(receive_P), rows.contiguous().split(counts_P))
    if wait:
        pending.wait()
    return out, pending


class RankTable:
    """Which rank each physical expert is on; what it needs is copied to the ids' device once."""

    def __init__(self, rank_offsets: Sequence[int]) -> None:
        self._bounds = torch.tensor(rank_offsets[1:-1], dtype=torch.int64)

    def __call__(self, physical_TK: Tensor) -> Tensor:
        """i64; -1 stays."""
        if self._bounds.device != physical_TK.device:
            self._bounds = self._bounds.to(physical_TK.device)
        return torch.where(physical_TK < 0, -1, torch.bucketize(physical_TK, self._bounds, right=True))


@dataclass(frozen=True, kw_only=True)
class _PaddedHandle:
    num_tokens: int
    arrived: Dispatched
    pending: Pending
    slab_TK: Tensor  # i64: which of the P slabs that come home holds slot (t, k); -1 for none


@dataclass(frozen=True, kw_only=True)
class _PaddedReturning:
    num_tokens: int
    slab_TK: Tensor
    home_PTKD: Tensor
    pending: Pending


class PaddedNcclAllToAll:
    """See the module. Rows are found by `permute`, an implementation of `kernels.permute`; `home_R` is a place in y_RD, of which
    those without an expert are undefined, as they are sent but not read."""

    graph_safe = True

    def __init__(self, spec: AllToAllSpec, permute: Callable[..., Permuted], device: torch.device | str) -> None:
        self._spec, self._group, self._permute = spec, cast(PeerGroup, spec.group), permute
        self._ranks_of = RankTable(spec.rank_offsets)
        size, tokens = spec.group.size, spec.max_tokens
        home = spec.home_size or spec.hidden_size, spec.home_dtype or spec.dtype
        # Captured graphs write here as long as they live.
        with self._group.registered():
            self._mine_TD = torch.zeros(tokens, spec.hidden_size, dtype=spec.dtype, device=device)
            self._x_UD = torch.zeros(size * tokens, spec.hidden_size, dtype=spec.dtype, device=device)
            self._mine_ids = torch.zeros(1 + tokens, spec.top_k, dtype=torch.int32, device=device)
            self._ids = torch.zeros(size, 1 + tokens, spec.top_k, dtype=torch.int32, device=device)
            self._home = torch.zeros(size * tokens * spec.top_k, home[0], dtype=home[1], device=device)
        self._token_T = torch.arange(tokens, device=device)

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _PaddedHandle:
        group, num_tokens = self._group, x_TD.shape[0]
        assert num_tokens == num_tokens_P[group.rank], f"rank {group.rank} has {num_tokens} tokens, plan {num_tokens_P}"
        assert num_tokens <= self._spec.max_tokens, f"{num_tokens} tokens, built for {self._spec.max_tokens}"
        self._mine_TD[:num_tokens] = x_TD
        self._mine_ids[0] = num_tokens if num_valid is None else num_valid
        self._mine_ids[1 : 1 + num_tokens] = physical_TK
        ids_pending = group.gather(self._ids.flatten(0, 1), self._mine_ids)
        pending = group.gather(self._x_UD, self._mine_TD)
        ids_pending.wait()
        permuted = self._permute(self._local_ids(), self._num_local())
        counted_T = self._token_T[:num_tokens] < self._mine_ids[0, 0]
        slab_TK = torch.where(counted_T[:, None], self._ranks_of(physical_TK), -1)
        arrived = Dispatched(
            x_UD=self._x_UD,
            row_index_R=permuted.row_index_N,
            expert_offsets=permuted.expert_offsets,
            home_R=permuted.home_N,
        )
        return _PaddedHandle(num_tokens=num_tokens, arrived=arrived, pending=pending, slab_TK=slab_TK)

    def dispatch_recv(self, handle: _PaddedHandle) -> Dispatched:
        handle.pending.wait()
        return handle.arrived

    def combine_send(self, handle: _PaddedHandle, y_RD: Tensor) -> _PaddedReturning:
        assert len(y_RD) == len(self._home), f"{len(y_RD)} places for {len(self._home)} rows"
        pending = self._group.exchange(self._home.view(torch.uint8), y_RD.view(torch.uint8), [], [])
        home_PTKD = self._home.unflatten(0, (self._group.size, self._spec.max_tokens, self._spec.top_k))
        num_tokens, slab_TK = handle.num_tokens, handle.slab_TK
        return _PaddedReturning(num_tokens=num_tokens, slab_TK=slab_TK, home_PTKD=home_PTKD, pending=pending)

    def combine_recv(self, handle: _PaddedReturning) -> Tensor:
        handle.pending.wait()
        token_T1 = self._token_T[: handle.num_tokens, None]
        k_K = torch.arange(self._spec.top_k, device=token_T1.device)
        rows_TKD = handle.home_PTKD[handle.slab_TK.clamp(min=0), token_T1, k_K]
        return torch.where(handle.slab_TK[..., None] >= 0, rows_TKD, 0)

    def _num_local(self) -> int:
        first, last = self._spec.rank_offsets[self._group.rank :][:2]
        return last - first

    def _local_ids(self) -> Tensor:
        """i32 [P * T, K]: expert ids as this rank counts its own, others and those of tokens that do not count -1."""
        ids_PTK, first = self._ids[:, 1:], self._spec.rank_offsets[self._group.rank]
        here = (ids_PTK >= first) & (ids_PTK < first + self._num_local())
        here &= (self._token_T < self._ids[:, 0, :1])[..., None]
        return torch.where(here, ids_PTK - first, -1).flatten(0, 1)
