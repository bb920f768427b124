"""The all-to-all of expert parallelism: dispatch takes tokens to their experts' ranks, combine returns expert outputs.

Every rank takes all four phases in every layer, also without tokens. What a layer computes between `dispatch_send`
and `dispatch_recv` (shared experts) overlaps with the exchange. A backend is built once from an `AllToAllSpec`.

T tokens of this rank, K experts a token, D model width, U distinct tokens received (each once, however many of its
experts are here), R routed rows received (one for each (token, expert here)), e local experts, P ranks. A token's home
rank is the one whose batch it is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.group import Group
from expertwire.kernels.ops.permute import TileMap


@dataclass(frozen=True, kw_only=True)
class AllToAllSpec:
    """Sizes and ranks that an all-to-all is built for.

    Args:
        group: the ranks.
        rank_offsets: P + 1 integers; rank p holds the physical experts `rank_offsets[p] : rank_offsets[p + 1]`.
        max_tokens: tokens of one rank in one exchange, at most.
        hidden_size: D, width of dispatched rows.
        top_k: K.
        dtype: of dispatched rows.
        combine_size, combine_dtype: of the rows of a combine; None: those of a dispatch.
        layers: the model's layers, in the order of their exchanges, which repeats; errors name them. Empty: a layer may
            take several exchanges in a step, so that errors cannot name it.
        timeout_s: a rank that keeps the others waiting for longer is an error, where the backend itself waits.
        micro_batch, num_micro_batches: which of a step's micro-batches this is for. Each has an all-to-all of its own, and
            their exchanges alternate.
    """

    group: Group
    rank_offsets: tuple[int, ...]
    max_tokens: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    combine_size: int | None = None
    combine_dtype: torch.dtype | None = None
    layers: tuple[int, ...] = (0,)
    timeout_s: float = 120.0
    micro_batch: int = 0
    num_micro_batches: int = 1

    def check_tokens(self, num_tokens: int, num_tokens_P: Sequence[int]) -> None:
        """Assert that this rank's number of tokens is the planned one, and within `max_tokens`."""
        rank = self.group.rank
        assert num_tokens == num_tokens_P[rank], f"rank {rank} has {num_tokens} tokens, plan {num_tokens_P}"
        assert num_tokens <= self.max_tokens, f"{num_tokens} tokens, built for {self.max_tokens}"


class RankStalled(RuntimeError):
    """A rank did not take its part in an exchange in time. All ranks that wait for it raise this.

    Attributes:
        rank: the rank that is missing.
        exchange: number of the exchange, from 1; each micro-batch of a step has one or several a layer.
        phase: "dispatch" or "combine".
        layer: the model's layer; None if that is not known.
        micro_batch: of the step.
    """

    def __init__(
        self, rank: int, exchange: int, phase: str, layer: int | None, timeout_s: float, micro_batch: int = 0
    ) -> None:
        where = "" if layer is None else f" of layer {layer}"
        super().__init__(
            f"rank {rank} has stalled: the others have waited for more than {timeout_s:g} s for its {phase}{where}"
        )
        self.rank, self.exchange, self.phase, self.layer, self.micro_batch = rank, exchange, phase, layer, micro_batch

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Sort key by the time of the wait: of several stalls the smallest is the cause. The last number is the rank."""
        return self.exchange, int(self.phase == "combine"), self.micro_batch, self.rank


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """Rows that the experts of this rank compute on.

    Routed row r reads `x_UD[row_index_R[r]]`; routed rows are sorted by local expert, within an expert by (home rank,
    token, k). Expert e has the rows `expert_offsets[e] : expert_offsets[e + 1]`.

    Where the host knows the counts, `expert_offsets` is i64 on the host, R is exact and experts write their output in the
    same order. Otherwise it is i32 on the device, R is an upper bound, and routed row r is written to row `home_R[r]`.

    Rows that were quantised for the dispatch are dequantised, or u8 and packed (`kernels.ops.quantize.pack`) where the
    experts read them so.
    """

    x_UD: Tensor
    row_index_R: Tensor  # i64 or i32
    expert_offsets: np.ndarray | Tensor
    home_R: Tensor | None = None  # i32
    tile_map: TileMap | None = None  # tiles of the rows, if the backend has computed them already


class Handle:
    """State of an exchange between two phases, opaque to the caller; each backend has its own frozen subclasses."""


class AllToAll(Protocol):
    """Dispatch and combine over one group of ranks.

    Attributes:
        graph_safe: the host neither reads results nor waits, so that a CUDA graph can hold the phases.
    """

    @property
    def graph_safe(self) -> bool: ...

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> Handle:
        """Start sending rows to the ranks of their experts.

        Args:
            x_TD: this rank's rows.
            physical_TK: i64, physical expert ids, -1 for none.
            num_tokens_P: T of every rank, known from the plan.
            num_valid: i32 [1] on the device, where `graph_safe`: only so many of the rows count, and `num_tokens_P` are
                upper bounds.
        """
        ...

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        """Wait for the rows of every rank."""
        ...

    def combine_send(self, handle: Handle, y_RD: Tensor) -> Handle:
        """Start returning expert rows, ordered as `Dispatched` says; return the handle for `combine_recv`."""
        ...

    def combine_recv(self, handle: Handle) -> Tensor:
        """Wait for this rank's rows [T, K, D]: slot (t, k) from expert k of token t, zeros where the id was -1.

        The result, and that of `dispatch_recv`, may be overwritten by the next `dispatch_send`.
        """
        ...


@runtime_checkable
class Checkable(Protocol):
    """An all-to-all that waits on the device, where nothing can be raised: the host asks when a step is done."""

    def check(self) -> None:
        """Raise `RankStalled` if a rank stalled, so that the device's results are invalid."""
        ...
