"""Two-stage dispatch across NVLink domains: a row goes once to each domain that needs it, and is distributed there.

Rank m of a domain sends only to the ranks m of the other domains (its *rail*), and those to the ranks of their own domain;
expert rows return the same way. Each stage is an all-to-all: in the first, domains take the place of experts; in the second,
the rows received take the place of tokens. A combine returns one row for each (token, k), so that the bits are those of any
other backend; to add them up before they cross would save bytes and make the bits depend on the placement.

Behind its bytes a row carries its expert ids, its home rank and token, as i32.

Letters as in `comm.all_to_all.base`; here U distinct tokens that a rank receives in the first stage and distributes in
the second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll, AllToAllSpec, Dispatched, Handle
from expertwire.comm.all_to_all.nccl import RankTable
from expertwire.comm.group import Group, all_gather_rows

_ALIGNED = 16  # bytes, for backends that store as many at a time


@dataclass(frozen=True, kw_only=True)
class _SecondStage:
    handle: Handle
    here_UK: Tensor  # whether expert k of a row is in this domain
    order_R: Tensor  # permutation of its routed rows to the order of `Dispatched`


class HierarchicalAllToAll:
    """An all-to-all of two stages.

    Args:
        across, within: the groups of this rank's rail, by domain, and of its domain.
        make: makes the backend of each stage, one whose host knows the counts.
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
        first = self._stage_spec(across, np.arange(across.size + 1), spec.max_tokens, spec.top_k + 2)
        second = self._stage_spec(within, mine - mine[0], across.size * spec.max_tokens, 2)
        self._first, self._second = make(first), make(second)
        self._second_stage: _SecondStage | None = None

    def _stage_spec(self, group: Group, rank_offsets: np.ndarray, max_tokens: int, words: int) -> AllToAllSpec:
        spec = self._spec
        return replace(
            spec,
            group=group,
            rank_offsets=tuple(rank_offsets.tolist()),
            max_tokens=max_tokens,
            hidden_size=-(-(self._row_bytes + 4 * words) // _ALIGNED) * _ALIGNED,
            dtype=torch.uint8,
            combine_size=spec.combine_size or spec.hidden_size,
            combine_dtype=spec.combine_dtype or spec.dtype,
        )

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> Handle:
        assert num_valid is None, "the host counts rows"
        rank, num_tokens = self._spec.group.rank, len(x_TD)
        self._spec.check_tokens(num_tokens, num_tokens_P)
        token_T = torch.arange(num_tokens, device=x_TD.device)
        words = torch.cat([physical_TK, torch.full_like(token_T, rank)[:, None], token_T[:, None]], dim=1)
        rail = [num_tokens_P[domain * self._within.size + self._within.rank] for domain in range(self._across.size)]
        return self._first.dispatch_send(_packed(x_TD, words), self._domains_of(physical_TK), rail)

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        received = self._first.dispatch_recv(handle)
        rows_U = received.x_UD[received.row_index_R.unique()]
        words = self._words(rows_U, self._spec.top_k + 2)
        ids_UK = words[:, :-2].long()
        first, last = self._first_of_domain[self._across.rank :][:2]
        here_UK = (ids_UK >= first) & (ids_UK < last)
        rows = _packed(rows_U[:, : self._row_bytes], words[:, -2:])
        num_rows_P = all_gather_rows(self._within, torch.tensor([len(rows)], device=rows.device)).flatten().tolist()
        ids_UK = torch.where(here_UK, ids_UK - first, -1)
        inner = self._second.dispatch_send(rows, ids_UK, num_rows_P)
        arrived, order_R = self._in_order(self._second.dispatch_recv(inner))
        self._second_stage = _SecondStage(handle=inner, here_UK=here_UK, order_R=order_R)
        return arrived

    def combine_send(self, handle: Handle, y_RD: Tensor) -> Handle:
        stage = self._second_stage
        assert stage is not None, "combine before dispatch"
        y_stage_RD = torch.empty_like(y_RD)
        y_stage_RD[stage.order_R] = y_RD
        y_UKD = self._second.combine_recv(self._second.combine_send(stage.handle, y_stage_RD))
        self._second_stage = None
        return self._first.combine_send(handle, y_UKD[stage.here_UK])

    def combine_recv(self, handle: Handle) -> Tensor:
        return self._first.combine_recv(handle)

    def _in_order(self, arrived: Dispatched) -> tuple[Dispatched, Tensor]:
        """Return unpacked rows sorted by expert, home rank and token; and the permutation to this order."""
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
        """Return the i32 [U, count] behind the rows' bytes."""
        return rows[:, self._row_bytes : self._row_bytes + 4 * count].contiguous().view(torch.int32)


def _packed(rows: Tensor, words: Tensor) -> Tensor:
    """Return u8: a row's bytes, then its words as i32, padded to a multiple of 16 bytes."""
    parts = [rows.contiguous().view(torch.uint8), words.int().view(torch.uint8)]
    width = sum(part.shape[1] for part in parts)
    return torch.cat([*parts, parts[0].new_zeros(len(rows), -width % _ALIGNED)], dim=1)
