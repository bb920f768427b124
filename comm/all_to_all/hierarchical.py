"""Dispatch across NVLink domains: a row crosses once to each domain that needs it, and is handed out there.

Rank m of a domain sends only to the ranks m of the others (its *rail*), and those to the ranks of their own domain; expert rows
come home the same way. Each stage is an all-to-all of its own: in the first one a domain is an expert, in the second one the
rows that have arrived are tokens. Rows are only moved, one for each (token, k) on the way home, so the bits are those of any
other backend; adding them up at the border would save bytes and tie the bits to the placement.

On its way a row carries its ids in the domain, its home rank and token, as i32 behind its bytes.

Letters as in `comm.all_to_all.base`; M ranks a domain, V rows that a rank hands out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec, Dispatched
from expertwire.comm.all_to_all.nccl import RankTable
from expertwire.comm.group import Group, exchange_now

_ALIGNED = 16  # bytes, for backends that store as many at a time


@dataclass(frozen=True, kw_only=True)
class _HandedOut:
    """The second stage of an exchange, as this rank has it."""

    handle: Any
    here_VK: Tensor  # whether expert k of a row that was handed out is in this domain
    order_R: Tensor  # the second stage's routed rows in the order that is promised


class HierarchicalAllToAll:
    """See the module.

    Args:
        across, within: the groups of this rank's rail, by domain, and of its domain.
        make: the backend of both stages; one that tells the host the counts.
    """

    graph_safe = False

    def __init__(
        self, spec: AllToAllSpec, *, across: Group, within: Group, make: Callable[[AllToAllSpec], AllToAll]
    ) -> None:
        assert across.size * within.size == spec.group.size, f"{across.size} * {within.size} of {spec.group.size} ranks"
        self._spec, self._across, self._within = spec, across, within
        self._row_bytes = spec.hidden_size * spec.dtype.itemsize
        offsets = np.asarray(spec.rank_offsets)
        self._first_of_domain = offsets[:: within.size].tolist()
        self._domains_of = RankTable(self._first_of_domain)
        mine = offsets[across.rank * within.size :][: within.size + 1]
        crossing = self._stage(across, np.arange(across.size + 1), spec.max_tokens, spec.top_k + 2)
        handing = self._stage(within, mine - mine[0], across.size * spec.max_tokens, 2)
        self._crossing, self._handing = make(crossing), make(handing)
        self._handed: _HandedOut | None = None

    def _stage(self, group: Group, rank_offsets: np.ndarray, max_tokens: int, words: int) -> AllToAllSpec:
        spec = self._spec
        return replace(
            spec,
            group=group,
            rank_offsets=tuple(rank_offsets.tolist()),
            max_tokens=max_tokens,
            hidden_size=-(-(self._row_bytes + 4 * words) // _ALIGNED) * _ALIGNED,
            dtype=torch.uint8,
            home_size=spec.home_size or spec.hidden_size,
            home_dtype=spec.home_dtype or spec.dtype,
        )

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> Any:
        assert num_valid is None, "the host counts rows"
        rank, num_tokens = self._spec.group.rank, len(x_TD)
        assert num_tokens == num_tokens_P[rank], f"rank {rank} has {num_tokens} tokens, plan {num_tokens_P}"
        assert num_tokens <= self._spec.max_tokens, f"{num_tokens} tokens, built for {self._spec.max_tokens}"
        token_T = torch.arange(num_tokens, device=x_TD.device)
        words = torch.cat([physical_TK, torch.full_like(token_T, rank)[:, None], token_T[:, None]], dim=1)
        rail = [num_tokens_P[domain * self._within.size + self._within.rank] for domain in range(self._across.size)]
        return self._crossing.dispatch_send(_packed(x_TD, words), self._domains_of(physical_TK), rail)

    def dispatch_recv(self, handle: Any) -> Dispatched:
        crossed = self._crossing.dispatch_recv(handle)
        rows_V = crossed.x_UD[crossed.row_index_R.unique()]
        words = self._words(rows_V, self._spec.top_k + 2)
        ids_VK = words[:, :-2].long()
        first, last = self._first_of_domain[self._across.rank :][:2]
        here_VK = (ids_VK >= first) & (ids_VK < last)
        rows = _packed(rows_V[:, : self._row_bytes], words[:, -2:])
        ones, size = [1] * self._within.size, self._within.size
        mine = torch.full((size, 1), len(rows), dtype=torch.int64, device=rows.device)
        num_rows_M = exchange_now(self._within, mine, ones, ones).flatten().tolist()
        ids_VK = torch.where(here_VK, ids_VK - first, -1)
        inner = self._handing.dispatch_send(rows, ids_VK, num_rows_M)
        arrived, order_R = self._in_order(self._handing.dispatch_recv(inner))
        self._handed = _HandedOut(handle=inner, here_VK=here_VK, order_R=order_R)
        return arrived

    def combine_send(self, handle: Any, y_RD: Tensor) -> Any:
        handed = self._handed
        assert handed is not None, "rows are sent home before they have arrived"
        y_stage_RD = torch.empty_like(y_RD)
        y_stage_RD[handed.order_R] = y_RD
        home_VKD = self._handing.combine_recv(self._handing.combine_send(handed.handle, y_stage_RD))
        self._handed = None
        return self._crossing.combine_send(handle, home_VKD[handed.here_VK])

    def combine_recv(self, handle: Any) -> Tensor:
        return self._crossing.combine_recv(handle)

    def _in_order(self, arrived: Dispatched) -> tuple[Dispatched, Tensor]:
        """Rows as they were before they were packed, by expert, home rank and token; and where each was in the stage's order."""
        offsets = arrived.expert_offsets
        assert isinstance(offsets, np.ndarray), "the second stage's counts are on the device"
        used_U, row_index_R = arrived.row_index_R.unique(return_inverse=True)
        rows_U = arrived.x_UD[used_U]
        home_U, token_U = self._words(rows_U, 2).long().unbind(1)
        expert_R = torch.from_numpy(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))).to(rows_U.device)
        home_R, token_R = home_U[row_index_R], token_U[row_index_R]
        key_R = (expert_R * self._spec.group.size + home_R) * self._spec.max_tokens + token_R
        order_R = key_R.sort(stable=True).indices
        x_UD = rows_U[:, : self._row_bytes].contiguous().view(self._spec.dtype)
        return Dispatched(x_UD=x_UD, row_index_R=row_index_R[order_R], expert_offsets=offsets), order_R

    def _words(self, rows: Tensor, count: int) -> Tensor:
        """i32 [V, count]: what is behind the bytes."""
        return rows[:, self._row_bytes : self._row_bytes + 4 * count].contiguous().view(torch.int32)


def _packed(rows: Tensor, words: Tensor) -> Tensor:
    """u8: a row's bytes, then its words as i32, then nothing up to a multiple of 16 bytes."""
    parts = [rows.contiguous().view(torch.uint8), words.int().view(torch.uint8)]
    width = sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(len(rows), -width % _ALIGNED)], dim=1)
