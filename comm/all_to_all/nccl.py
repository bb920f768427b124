"""Dispatch and combine by sending and receiving: NCCL between GPUs, and the same code over gloo between CPUs.

Everybody gathers the ids of all tokens, whose numbers the plan has told, so a rank knows on its device which rows go where and
which will come. The rows follow in one grouped send and receive; while they travel, the order of experts is worked out.

The host waits for the device once a layer. NCCL takes the numbers of rows to send and to receive from the host
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api/p2p.html), and these depend on the routing. With sizes bounded by
the plan every row would go to every rank, and P times the rows of a combine come home: where NVLink joins the ranks, `nvlink`
needs neither that nor the host; across domains bytes are what is scarce. So no CUDA graph can hold this.

Never run on a GPU by us. Letters as in `comm.all_to_all.base`, S slots (t, k) of this rank that have an expert, H
home ranks, C rows
that leave, U rows that arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched
from expertwire.comm.group import PeerGroup, Pending


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
        ids_HTK = self._everyones_ids(physical_TK, max(num_tokens_P))
        rank_HTK = self._ranks_of(ids_HTK)
        rank_TK = rank_HTK[group.rank, :num_tokens]
        goes_PTK = rank_TK == torch.arange(group.size, device=x_TD.device)[:, None, None]
        comes_HTK = rank_HTK == group.rank
        leaves_PT, arrives_HT = goes_PTK.any(dim=2), comes_HTK.any(dim=2)
        sums = (leaves_PT.sum(1), goes_PTK.sum((1, 2)), arrives_HT.sum(1), comes_HTK.sum((1, 2)))
        counts = torch.cat([*sums, self._expert_offsets(ids_HTK)]).cpu()  # the host waits here, and nowhere else
        copies_P, routed_P, rows_P, arrivals_P = counts[: 4 * group.size].view(4, -1).tolist()
        token_C = _true_first(leaves_PT)[: sum(copies_P)] % max(1, num_tokens)
        x_UD, pending = _swap(group, x_TD[token_C], copies_P, rows_P)
        ids_UK = ids_HTK.flatten(0, 1)[_true_first(arrives_HT)[: sum(rows_P)]]
        row_index_R, place_R = self._by_expert(ids_UK, sum(arrivals_P))
        return _Handle(
            num_tokens=num_tokens,
            slot_S=rank_TK.flatten().sort(stable=True).indices[rank_TK.numel() - sum(routed_P) :],
            routed_P=routed_P,
            arrivals_P=arrivals_P,
            place_R=place_R,
            arrived=Dispatched(x_UD=x_UD, row_index_R=row_index_R, expert_offsets=counts[4 * group.size :].numpy()),
            pending=pending,
        )

    def dispatch_recv(self, handle: _Handle) -> Dispatched:
        handle.pending.wait()
        return handle.arrived

    def combine_send(self, handle: _Handle, y_RD: Tensor) -> _Returning:
        rows_RD = y_RD.index_select(0, handle.place_R)
        home_SD, pending = _swap(self._group, rows_RD, handle.arrivals_P, handle.routed_P)
        return _Returning(num_tokens=handle.num_tokens, slot_S=handle.slot_S, home_SD=home_SD, pending=pending)

    def combine_recv(self, handle: _Returning) -> Tensor:
        handle.pending.wait()
        slots, top_k, width = handle.num_tokens * self._spec.top_k, self._spec.top_k, handle.home_SD.shape[1]
        out_ND = handle.home_SD.new_zeros(slots, width)
        out_ND[handle.slot_S] = handle.home_SD
        return out_ND.view(handle.num_tokens, top_k, width)

    def _everyones_ids(self, physical_TK: Tensor, most: int) -> Tensor:
        """i32 [P, most, K]: the ids of every rank's tokens, -1 behind them."""
        mine_TK = physical_TK.new_full((most, physical_TK.shape[1]), -1, dtype=torch.int32)
        mine_TK[: len(physical_TK)] = physical_TK
        ids_HTK = mine_TK.new_empty(self._group.size, *mine_TK.shape)
        if most:
            self._group.gather(ids_HTK.flatten(0, 1), mine_TK).wait()
        return ids_HTK

    def _local(self, ids: Tensor) -> Tensor:
        """i64: ids as this rank counts its own experts; for all others, the number of its own."""
        first, last = self._spec.rank_offsets[self._group.rank :][:2]
        return torch.where((ids >= first) & (ids < last), ids.long() - first, last - first)

    def _expert_offsets(self, ids_HTK: Tensor) -> Tensor:
        """i64 [experts here + 1]."""
        first, last = self._spec.rank_offsets[self._group.rank :][:2]
        local_N = self._local(ids_HTK).flatten()
        counts = local_N.new_zeros(last - first + 2)
        return counts.scatter_add_(0, local_N + 1, torch.ones_like(local_N))[:-1].cumsum(0)

    def _by_expert(self, ids_UK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Of the routed rows that come here, the rows they read, in the order of experts; and their places in it, in the order
        of arrival."""
        order_R = self._local(ids_UK).flatten().sort(stable=True).indices[:num_rows]
        return order_R // ids_UK.shape[1], order_R.sort().indices


def _true_first(flags: Tensor) -> Tensor:
    """Places in the flattened flags, those that are set first; in order."""
    return (~flags.flatten()).sort(stable=True).indices


def _swap(group: PeerGroup, rows: Tensor, counts_P: list[int], receive_P: list[int]) -> tuple[Tensor, Pending]:
    """`counts_P[p]` of the rows to each rank p, and `receive_P[p]` from it, in rank order, into a new tensor."""
    out = rows.new_empty(sum(receive_P), *rows.shape[1:])
    return out, group.swap(out.split(receive_P), rows.contiguous().split(counts_P))


class RankTable:
    """Which rank each physical expert is on; what it needs is copied to the ids' device once."""

    def __init__(self, rank_offsets: Sequence[int]) -> None:
        self._bounds = torch.tensor(rank_offsets[1:-1], dtype=torch.int64)

    def __call__(self, physical_TK: Tensor) -> Tensor:
        """i64; -1 stays."""
        if self._bounds.device != physical_TK.device:
            self._bounds = self._bounds.to(physical_TK.device)
        return torch.where(physical_TK < 0, -1, torch.bucketize(physical_TK, self._bounds, right=True))
