"""The specification of dispatch and combine: `all_to_all_single` with splits computed on the host.

Every rank learns every rank's expert ids first (K integers a token, sizes known from the plan), so that all counts and orders
follow without a further exchange. Then each token's row goes once to every distinct rank that holds one of its experts, and
one row per (token, k) comes back. Works over gloo and NCCL; not capturable in a CUDA graph, because of the host splits.

Letters as in `comm.all_to_all`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all import AllToAllSpec, Dispatched
from expertwire.comm.group import Pending, exchange_now


@dataclass(frozen=True, kw_only=True)
class _Handle:
    num_tokens: int
    physical_P_TK: list[np.ndarray]  # every rank's ids, [T_p, K]
    x_UD: Tensor
    pending: Pending | None


@dataclass(frozen=True, kw_only=True)
class _Returning:
    home_slots: np.ndarray  # slot t * K + k of each row that comes home, in the order received
    num_tokens: int
    rows: Tensor
    pending: Pending | None


class ReferenceAllToAll:
    """See the module."""

    def __init__(self, spec: AllToAllSpec) -> None:
        self._spec = spec
        self._rank_offsets = np.asarray(spec.rank_offsets, np.int64)
        rank = spec.group.rank
        self._first, self._last = spec.rank_offsets[rank], spec.rank_offsets[rank + 1]

    def dispatch_send(self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int]) -> _Handle:
        group, top_k = self._spec.group, self._spec.top_k
        num_tokens = x_TD.shape[0]
        assert num_tokens == num_tokens_P[group.rank], f"rank {group.rank} has {num_tokens} tokens, plan {num_tokens_P}"
        assert num_tokens <= self._spec.max_tokens, f"{num_tokens} tokens, built for {self._spec.max_tokens}"
        if group.size == 1:
            ids = [physical_TK.cpu().numpy()]
            return _Handle(num_tokens=num_tokens, physical_P_TK=ids, x_UD=x_TD, pending=None)
        ids_out = [n * top_k for n in num_tokens_P]
        ids_in = [num_tokens * top_k] * group.size
        everyone = exchange_now(group, physical_TK.reshape(-1).repeat(group.size), ids_out, ids_in)
        flat = everyone.cpu().numpy()
        starts = np.cumsum([0, *ids_out])
        ids = [flat[starts[p] : starts[p + 1]].reshape(-1, top_k) for p in range(group.size)]

        tokens_P = [np.flatnonzero(self._at_rank(ids[group.rank], p).any(axis=1)) for p in range(group.size)]
        receive = [int(self._here(ids_TK).any(axis=1).sum()) for ids_TK in ids]
        rows = x_TD[torch.from_numpy(np.concatenate(tokens_P)).to(x_TD.device)]
        x_UD = x_TD.new_empty(sum(receive), x_TD.shape[1])
        pending = group.exchange(x_UD, rows, receive, [len(t) for t in tokens_P])
        return _Handle(num_tokens=num_tokens, physical_P_TK=ids, x_UD=x_UD, pending=pending)

    def dispatch_recv(self, handle: _Handle) -> Dispatched:
        if handle.pending is not None:
            handle.pending.wait()
        experts_R, rows_R = self._arrivals(handle)
        order = np.argsort(experts_R, kind="stable")
        counts = np.bincount(experts_R, minlength=self._last - self._first)
        return Dispatched(
            x_UD=handle.x_UD,
            row_index_R=torch.from_numpy(rows_R[order]).to(handle.x_UD.device),
            expert_offsets=[0, *np.cumsum(counts).tolist()],
        )

    def combine_send(self, handle: _Handle, y_RD: Tensor) -> _Returning:
        group = self._spec.group
        experts_R, _ = self._arrivals(handle)
        # From expert order back to the order of arrival: by home rank, token, k.
        back = np.empty(len(experts_R), np.int64)
        back[np.argsort(experts_R, kind="stable")] = np.arange(len(experts_R))
        rows = y_RD[torch.from_numpy(back).to(y_RD.device)]
        mine = handle.physical_P_TK[group.rank]
        at_P = [np.flatnonzero(self._at_rank(mine, p)) for p in range(group.size)]
        home_slots = np.concatenate(at_P)
        if group.size == 1:
            return _Returning(home_slots=home_slots, num_tokens=handle.num_tokens, rows=rows, pending=None)
        home = y_RD.new_empty(len(home_slots), y_RD.shape[1])
        counts = [int(self._here(ids_TK).sum()) for ids_TK in handle.physical_P_TK]
        pending = group.exchange(home, rows, [len(a) for a in at_P], counts)
        return _Returning(home_slots=home_slots, num_tokens=handle.num_tokens, rows=home, pending=pending)

    def combine_recv(self, handle: _Returning) -> Tensor:
        if handle.pending is not None:
            handle.pending.wait()
        num_slots, width = handle.num_tokens * self._spec.top_k, handle.rows.shape[1]
        if len(handle.home_slots) == num_slots and self._spec.group.size == 1:
            return handle.rows.view(handle.num_tokens, self._spec.top_k, width)
        out = handle.rows.new_zeros(num_slots, width)
        out[torch.from_numpy(handle.home_slots).to(out.device)] = handle.rows
        return out.view(handle.num_tokens, self._spec.top_k, width)

    def _at_rank(self, ids_TK: np.ndarray, rank: int) -> np.ndarray:
        return (ids_TK >= self._rank_offsets[rank]) & (ids_TK < self._rank_offsets[rank + 1])

    def _here(self, ids_TK: np.ndarray) -> np.ndarray:
        return (ids_TK >= self._first) & (ids_TK < self._last)

    def _arrivals(self, handle: _Handle) -> tuple[np.ndarray, np.ndarray]:
        """Local expert and row of x_UD of every routed row, by (home rank, token, k)."""
        experts, rows, base = [], [], 0
        for ids_TK in handle.physical_P_TK:
            here_TK = self._here(ids_TK)
            token_here = here_TK.any(axis=1)
            row_of_token = np.cumsum(token_here) - 1 if self._spec.group.size > 1 else np.arange(len(ids_TK))
            tokens = np.nonzero(here_TK)[0]
            experts.append(ids_TK[here_TK] - self._first)
            rows.append(base + row_of_token[tokens])
            base += int(token_here.sum())
        return np.concatenate(experts), np.concatenate(rows)
