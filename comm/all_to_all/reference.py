"""The specification of dispatch and combine: `all_to_all_single` with splits computed on the host.

Every rank learns every rank's expert ids first (K integers a token, sizes known from the plan), so that all counts and orders
follow without a further exchange. Then each token's row goes once to every distinct rank that holds one of its experts, and
one row per (token, k) comes back. Works over gloo and NCCL; not capturable in a CUDA graph, because of the host splits.

Letters as in `comm.all_to_all.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched
from expertwire.comm.group import Pending, exchange_now


@dataclass(frozen=True, kw_only=True)
class _Handle:
    """`slots_P[p]`: which of this rank's T * K slots have their expert on rank p. The rest describes the routed rows that arrive
    here: how many from each rank, their rows of x_UD in the order of experts, and, in the order of arrival, their places in
    the order of experts."""

    num_tokens: int
    slots_P: list[np.ndarray]
    arrivals_P: list[int]
    row_index_R: np.ndarray
    place_R: np.ndarray
    expert_offsets: np.ndarray
    x_UD: Tensor
    pending: Pending | None


@dataclass(frozen=True, kw_only=True)
class _Returning:
    num_tokens: int
    home_slots: np.ndarray  # slot t * K + k of each row that comes home, in the order received
    rows: Tensor
    pending: Pending | None


class ReferenceAllToAll:
    """See the module."""

    graph_safe = False

    def __init__(self, spec: AllToAllSpec) -> None:
        self._spec = spec
        self._rank_offsets = np.asarray(spec.rank_offsets, np.int64)

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _Handle:
        assert num_valid is None, "the host counts rows"
        group = self._spec.group
        num_tokens = x_TD.shape[0]
        assert num_tokens == num_tokens_P[group.rank], f"rank {group.rank} has {num_tokens} tokens, plan {num_tokens_P}"
        assert num_tokens <= self._spec.max_tokens, f"{num_tokens} tokens, built for {self._spec.max_tokens}"
        ids_P = self._everyones_ids(physical_TK, num_tokens_P)
        mine_TK = ids_P[group.rank]
        x_UD, pending = x_TD, None
        if group.size > 1:
            receive = [int(self._at(ids_TK, group.rank).any(axis=1).sum()) for ids_TK in ids_P]
            tokens_P = [np.flatnonzero(self._at(mine_TK, p).any(axis=1)) for p in range(group.size)]
            x_UD = x_TD.new_empty(sum(receive), x_TD.shape[1])
            rows = x_TD[torch.from_numpy(np.concatenate(tokens_P)).to(x_TD.device)]
            pending = group.exchange(x_UD, rows, receive, [len(tokens) for tokens in tokens_P])
        experts_R, rows_R, arrivals_P = self._arrivals(ids_P)
        order_R = np.argsort(experts_R, kind="stable")
        first, last = self._rank_offsets[group.rank : group.rank + 2]
        return _Handle(
            num_tokens=num_tokens,
            slots_P=[np.flatnonzero(self._at(mine_TK, p)) for p in range(group.size)],
            arrivals_P=arrivals_P,
            row_index_R=rows_R[order_R],
            place_R=_inverse(order_R),
            expert_offsets=_offsets(experts_R, last - first),
            x_UD=x_UD,
            pending=pending,
        )

    def dispatch_recv(self, handle: _Handle) -> Dispatched:
        if handle.pending is not None:
            handle.pending.wait()
        row_index_R = torch.from_numpy(handle.row_index_R).to(handle.x_UD.device)
        return Dispatched(x_UD=handle.x_UD, row_index_R=row_index_R, expert_offsets=handle.expert_offsets)

    def combine_send(self, handle: _Handle, y_RD: Tensor) -> _Returning:
        # In the order of arrival again: by home rank, token, k.
        rows = y_RD.index_select(0, torch.from_numpy(handle.place_R).to(y_RD.device))
        home, pending = rows, None
        if self._spec.group.size > 1:
            counts = [len(slots) for slots in handle.slots_P]
            home = y_RD.new_empty(sum(counts), y_RD.shape[1])
            pending = self._spec.group.exchange(home, rows, counts, handle.arrivals_P)
        home_slots = handle.slots_P[0] if len(handle.slots_P) == 1 else np.concatenate(handle.slots_P)
        return _Returning(num_tokens=handle.num_tokens, home_slots=home_slots, rows=home, pending=pending)

    def combine_recv(self, handle: _Returning) -> Tensor:
        if handle.pending is not None:
            handle.pending.wait()
        num_slots, width = handle.num_tokens * self._spec.top_k, handle.rows.shape[1]
        out = handle.rows
        if self._spec.group.size > 1 or len(handle.home_slots) < num_slots:
            out = handle.rows.new_zeros(num_slots, width)
            out[torch.from_numpy(handle.home_slots).to(out.device)] = handle.rows
        return out.view(handle.num_tokens, self._spec.top_k, width)

    def _everyones_ids(self, physical_TK: Tensor, num_tokens_P: Sequence[int]) -> list[np.ndarray]:
        """Every rank's physical ids, [T_p, K]."""
        group, top_k = self._spec.group, self._spec.top_k
        if group.size == 1:
            return [physical_TK.cpu().numpy()]
        sizes = [num_tokens * top_k for num_tokens in num_tokens_P]
        flat = exchange_now(group, physical_TK.flatten().repeat(group.size), sizes, [physical_TK.numel()] * group.size)
        return [ids.reshape(-1, top_k) for ids in np.split(flat.cpu().numpy(), np.cumsum(sizes)[:-1])]

    def _at(self, ids_TK: np.ndarray, rank: int) -> np.ndarray:
        return (ids_TK >= self._rank_offsets[rank]) & (ids_TK < self._rank_offsets[rank + 1])

    def _arrivals(self, ids_P: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Local expert and row of x_UD of every routed row that comes here, by (home rank, token, k); rows from each rank."""
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
    place_R = np.empty_like(order_R)
    place_R[order_R] = np.arange(len(order_R))
    return place_R


def _offsets(experts_R: np.ndarray, num_experts: int) -> np.ndarray:
    """Where each expert's rows begin and end: i64 [e + 1]."""
    offsets = np.zeros(num_experts + 1, np.int64)
    np.bincount(experts_R, minlength=num_experts).cumsum(out=offsets[1:])
    return offsets
