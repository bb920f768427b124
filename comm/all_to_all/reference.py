"""The reference of dispatch and combine: `all_to_all_single` with split sizes computed on the host.

The expert ids of all ranks are exchanged first (K ids a token, sizes known from the plan), and all counts and orders
follow from them. Then each token's row goes once to every distinct rank that holds one of its experts, and one row per
(token, k) returns. Works over gloo and NCCL; not capturable in a CUDA graph, because of the splits on the host.

Letters as in `comm.all_to_all.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched, Handle
from expertwire.comm.group import Pending, exchange_now


@dataclass(frozen=True, kw_only=True)
class _DispatchHandle(Handle):
    num_tokens: int
    slots_P: list[np.ndarray]  # slots t * K + k of this rank's tokens, by their expert's rank
    received_P: list[int]  # routed rows of this rank's experts, by home rank
    row_index_R: np.ndarray  # their rows of x_UD, in the order of experts
    position_R: np.ndarray  # in the order of arrival: their places in the order of experts
    expert_offsets: np.ndarray
    x_UD: Tensor
    pending: Pending | None


@dataclass(frozen=True, kw_only=True)
class _CombineHandle(Handle):
    num_tokens: int
    slot_N: np.ndarray  # slot t * K + k of each row that returns, in the order received
    y_ND: Tensor
    pending: Pending | None


class ReferenceAllToAll:
    """An all-to-all over `Group.exchange`."""

    graph_safe = False

    def __init__(self, spec: AllToAllSpec) -> None:
        self._spec = spec
        self._rank_offsets = np.asarray(spec.rank_offsets, np.int64)

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _DispatchHandle:
        assert num_valid is None, "the host counts rows"
        group = self._spec.group
        num_tokens = x_TD.shape[0]
        self._spec.check_tokens(num_tokens, num_tokens_P)
        ids_P = self._all_gather_ids(physical_TK, num_tokens_P)
        mine_TK = ids_P[group.rank]
        x_UD, pending = x_TD, None
        if group.size > 1:
            receive = [int(self._at(ids_TK, group.rank).any(axis=1).sum()) for ids_TK in ids_P]
            tokens_P = [np.flatnonzero(self._at(mine_TK, p).any(axis=1)) for p in range(group.size)]
            x_UD = x_TD.new_empty(sum(receive), x_TD.shape[1])
            rows = x_TD[torch.from_numpy(np.concatenate(tokens_P)).to(x_TD.device)]
            pending = group.exchange(x_UD, rows, receive, [len(tokens) for tokens in tokens_P])
        experts_R, rows_R, received_P = self._received(ids_P)
        order_R = np.argsort(experts_R, kind="stable")
        first, last = self._rank_offsets[group.rank : group.rank + 2]
        return _DispatchHandle(
            num_tokens=num_tokens,
            slots_P=[np.flatnonzero(self._at(mine_TK, p)) for p in range(group.size)],
            received_P=received_P,
            row_index_R=rows_R[order_R],
            position_R=_inverse(order_R),
            expert_offsets=_offsets(experts_R, last - first),
            x_UD=x_UD,
            pending=pending,
        )

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        assert isinstance(handle, _DispatchHandle), handle
        if handle.pending is not None:
            handle.pending.wait()
        row_index_R = torch.from_numpy(handle.row_index_R).to(handle.x_UD.device)
        return Dispatched(x_UD=handle.x_UD, row_index_R=row_index_R, expert_offsets=handle.expert_offsets)

    def combine_send(self, handle: Handle, y_RD: Tensor) -> _CombineHandle:
        assert isinstance(handle, _DispatchHandle), handle
        # In the order of arrival again: by home rank, token, k.
        rows = y_RD.index_select(0, torch.from_numpy(handle.position_R).to(y_RD.device))
        y_ND, pending = rows, None
        if self._spec.group.size > 1:
            counts = [len(slots) for slots in handle.slots_P]
            y_ND = y_RD.new_empty(sum(counts), y_RD.shape[1])
            pending = self._spec.group.exchange(y_ND, rows, counts, handle.received_P)
        slot_N = handle.slots_P[0] if len(handle.slots_P) == 1 else np.concatenate(handle.slots_P)
        return _CombineHandle(num_tokens=handle.num_tokens, slot_N=slot_N, y_ND=y_ND, pending=pending)

    def combine_recv(self, handle: Handle) -> Tensor:
        assert isinstance(handle, _CombineHandle), handle
        if handle.pending is not None:
            handle.pending.wait()
        num_slots, width = handle.num_tokens * self._spec.top_k, handle.y_ND.shape[1]
        out = handle.y_ND
        if self._spec.group.size > 1 or len(handle.slot_N) < num_slots:
            out = handle.y_ND.new_zeros(num_slots, width)
            out[torch.from_numpy(handle.slot_N).to(out.device)] = handle.y_ND
        return out.view(handle.num_tokens, self._spec.top_k, width)

    def _all_gather_ids(self, physical_TK: Tensor, num_tokens_P: Sequence[int]) -> list[np.ndarray]:
        """Return every rank's physical ids, [T, K] each."""
        group, top_k = self._spec.group, self._spec.top_k
        if group.size == 1:
            return [physical_TK.cpu().numpy()]
        sizes = [num_tokens * top_k for num_tokens in num_tokens_P]
        flat = exchange_now(group, physical_TK.flatten().repeat(group.size), sizes, [physical_TK.numel()] * group.size)
        return [ids.reshape(-1, top_k) for ids in np.split(flat.cpu().numpy(), np.cumsum(sizes)[:-1])]

    def _at(self, ids_TK: np.ndarray, rank: int) -> np.ndarray:
        return (ids_TK >= self._rank_offsets[rank]) & (ids_TK < self._rank_offsets[rank + 1])

    def _received(self, ids_P: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Return local expert and row of x_UD of every routed row received, by (home rank, token, k), and rows by home rank."""
        rank, size = self._spec.group.rank, self._spec.group.size
        experts, rows, base = [], [], 0
        for ids_TK in ids_P:
            here_TK = self._at(ids_TK, rank)
            token_here = here_TK.any(axis=1)
            # A single rank sends nothing, so its rows keep their places.
            row_of_token = base + (np.cumsum(token_here) - 1 if size > 1 else np.arange(len(ids_TK)))
            experts.append(ids_TK[here_TK] - self._rank_offsets[rank])
            rows.append(row_of_token[np.nonzero(here_TK)[0]])
            base += int(token_here.sum())
        return np.concatenate(experts), np.concatenate(rows), [len(e) for e in experts]


def _inverse(order_R: np.ndarray) -> np.ndarray:
    position_R = np.empty_like(order_R)
    position_R[order_R] = np.arange(len(order_R))
    return position_R


def _offsets(experts_R: np.ndarray, num_experts: int) -> np.ndarray:
    """Return where each expert's rows begin and end, i64 [e + 1]."""
    offsets = np.zeros(num_experts + 1, np.int64)
    np.bincount(experts_R, minlength=num_experts).cumsum(out=offsets[1:])
    return offsets
