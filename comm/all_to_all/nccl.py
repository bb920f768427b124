"""Dispatch and combine by exchanges of as many rows as there are: NCCL between GPUs, gloo between CPUs.

The expert ids of all tokens are all-gathered (the plan gives the numbers of tokens), so that each rank computes on its
device which rows it sends and receives. The rows follow in one exchange, during which the order of the routed rows is
computed.

The host waits for the device once a layer. NCCL takes the numbers of rows from the host
(https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api/p2p.html), and they depend on the routing, so that no CUDA
graph can hold this. With sizes bounded by the plan instead, every row would go to every rank, and a combine would return
its rows P-fold. Within an NVLink domain `nvlink` needs neither that nor the host; across domains bandwidth is scarce.

Never run on a GPU by us. Letters as in `comm.all_to_all.base`; N rows of this rank's combine, one for each slot (t, k) with
an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched, Handle
from expertwire.comm.group import Group, Pending


@dataclass(frozen=True, kw_only=True)
class _DispatchHandle(Handle):
    num_tokens: int
    slot_N: Tensor  # slots (t, k), in the order in which their rows return
    sent_P: list[int]  # this rank's routed rows, by their expert's rank
    received_P: list[int]  # routed rows of this rank's experts, by home rank
    position_R: Tensor  # of routed rows in the order of arrival: their place in the order of experts
    arrived: Dispatched
    pending: Pending


@dataclass(frozen=True, kw_only=True)
class _CombineHandle(Handle):
    num_tokens: int
    slot_N: Tensor
    y_ND: Tensor
    pending: Pending


class NcclAllToAll:
    """An all-to-all over `Group.exchange`, whose routing is computed on the device."""

    graph_safe = False

    def __init__(self, spec: AllToAllSpec) -> None:
        self._spec, self._group, self._ranks_of = spec, spec.group, RankTable(spec.rank_offsets)

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _DispatchHandle:
        assert num_valid is None, "the host counts rows"
        group, num_tokens = self._group, x_TD.shape[0]
        self._spec.check_tokens(num_tokens, num_tokens_P)
        ids_PTK = self._all_gather_ids(physical_TK, max(num_tokens_P))
        rank_PTK = self._ranks_of(ids_PTK)
        rank_TK = rank_PTK[group.rank, :num_tokens]
        sends_PTK = rank_TK == torch.arange(group.size, device=x_TD.device)[:, None, None]
        receives_PTK = rank_PTK == group.rank
        sends_PT, receives_PT = sends_PTK.any(dim=2), receives_PTK.any(dim=2)
        sums = (sends_PT.sum(1), sends_PTK.sum((1, 2)), receives_PT.sum(1), receives_PTK.sum((1, 2)))
        counts = torch.cat([*sums, self._expert_offsets(ids_PTK)]).cpu()  # the host waits here, and nowhere else
        copies_P, sent_P, rows_P, received_P = counts[: 4 * group.size].view(4, -1).tolist()
        sent_tokens = _true_first(sends_PT)[: sum(copies_P)] % max(1, num_tokens)
        x_UD, pending = _exchange(group, x_TD[sent_tokens], copies_P, rows_P)
        ids_UK = ids_PTK.flatten(0, 1)[_true_first(receives_PT)[: sum(rows_P)]]
        row_index_R, position_R = self._by_expert(ids_UK, sum(received_P))
        return _DispatchHandle(
            num_tokens=num_tokens,
            slot_N=rank_TK.flatten().sort(stable=True).indices[rank_TK.numel() - sum(sent_P) :],
            sent_P=sent_P,
            received_P=received_P,
            position_R=position_R,
            arrived=Dispatched(x_UD=x_UD, row_index_R=row_index_R, expert_offsets=counts[4 * group.size :].numpy()),
            pending=pending,
        )

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        assert isinstance(handle, _DispatchHandle), handle
        handle.pending.wait()
        return handle.arrived

    def combine_send(self, handle: Handle, y_RD: Tensor) -> _CombineHandle:
        assert isinstance(handle, _DispatchHandle), handle
        rows_RD = y_RD.index_select(0, handle.position_R)
        y_ND, pending = _exchange(self._group, rows_RD, handle.received_P, handle.sent_P)
        return _CombineHandle(num_tokens=handle.num_tokens, slot_N=handle.slot_N, y_ND=y_ND, pending=pending)

    def combine_recv(self, handle: Handle) -> Tensor:
        assert isinstance(handle, _CombineHandle), handle
        handle.pending.wait()
        top_k, width = self._spec.top_k, handle.y_ND.shape[1]
        y_TKD = handle.y_ND.new_zeros(handle.num_tokens, top_k, width)
        y_TKD.view(-1, width)[handle.slot_N] = handle.y_ND
        return y_TKD

    def _all_gather_ids(self, physical_TK: Tensor, most: int) -> Tensor:
        """Return the ids of every rank's tokens, i32 [P, most, K], padded with -1."""
        mine_TK = physical_TK.new_full((most, physical_TK.shape[1]), -1, dtype=torch.int32)
        mine_TK[: len(physical_TK)] = physical_TK
        ids_PTK = mine_TK.new_empty(self._group.size, *mine_TK.shape)
        if most:
            self._group.all_gather(ids_PTK.flatten(0, 1), mine_TK).wait()
        return ids_PTK

    def _local(self, ids: Tensor) -> Tensor:
        """Return local expert ids, i64; for experts of other ranks, the number of experts here."""
        first, last = self._spec.rank_offsets[self._group.rank :][:2]
        return torch.where((ids >= first) & (ids < last), ids.long() - first, last - first)

    def _expert_offsets(self, ids_PTK: Tensor) -> Tensor:
        """Return i64 [e + 1]."""
        first, last = self._spec.rank_offsets[self._group.rank :][:2]
        local_N = self._local(ids_PTK).flatten()
        counts = local_N.new_zeros(last - first + 2)
        return counts.scatter_add_(0, local_N + 1, torch.ones_like(local_N))[:-1].cumsum(0)

    def _by_expert(self, ids_UK: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return `row_index_R` in the order of experts, and each routed row's position in it in the order of arrival."""
        order_R = self._local(ids_UK).flatten().sort(stable=True).indices[:num_rows]
        return order_R // ids_UK.shape[1], order_R.sort().indices


def _true_first(flags: Tensor) -> Tensor:
    """Return the indices of the flattened flags, in order, those of true flags first."""
    return (~flags.flatten()).sort(stable=True).indices


def _exchange(group: Group, rows: Tensor, counts_P: list[int], receive_P: list[int]) -> tuple[Tensor, Pending]:
    """Start sending `counts_P[p]` rows to each rank p, in rank order, and receiving `receive_P[p]` into a new tensor."""
    out = rows.new_empty(sum(receive_P), *rows.shape[1:])
    # As bytes, because gloo refuses some dtypes.
    return out, group.exchange(out.view(torch.uint8), rows.contiguous().view(torch.uint8), receive_P, counts_P)


class RankTable:
    """Map of physical experts to their ranks, which is copied to the ids' device once."""

    def __init__(self, rank_offsets: Sequence[int]) -> None:
        self._bounds = torch.tensor(rank_offsets[1:-1], dtype=torch.int64)

    def __call__(self, physical_TK: Tensor) -> Tensor:
        """Return the rank of each expert, i64; -1 stays -1."""
        if self._bounds.device != physical_TK.device:
            self._bounds = self._bounds.to(physical_TK.device)
        return torch.where(physical_TK < 0, -1, torch.bucketize(physical_TK, self._bounds, right=True))
