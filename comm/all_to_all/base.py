"""The seam of expert parallelism: tokens go out to their experts' ranks (dispatch) and expert rows come home (combine).

Four phases, each taken by every rank in every layer, also with no tokens. What a layer does between `dispatch_send` and
`dispatch_recv` (shared experts) overlaps with the exchange. Handles are opaque and frozen; a backend is built once from an
`AllToAllSpec`.

T tokens of this rank, K experts a token, D width, U unique rows received (one a token, however many of its experts are here),
R routed rows (one a (token, expert here)), e local experts, P ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.group import Group
from expertwire.kernels.ops.permute import TileMap


@dataclass(frozen=True, kw_only=True)
class AllToAllSpec:
    """What an all-to-all is built for.

    Args:
        group: the ranks.
        rank_offsets: P + 1 integers; rank p holds the physical experts `rank_offsets[p] : rank_offsets[p + 1]`.
        max_tokens: of one rank in one exchange.
        hidden_size: D.
        top_k: K.
        dtype: of rows on the wire.
        home_size, home_dtype: of the rows that come home; None: like those that go out.
        layers: the model's layers that take turns, over and over, in this order; errors name them. Empty: one may take several
            exchanges in a step, so that errors cannot tell.
        timeout_s: a rank that lets the others wait for longer is an error, where the backend waits by itself.
        part, num_parts: of a step that is computed in parts, each with an all-to-all of its own: which one this is for. Their
            exchanges take turns.
    """

    group: Group
    rank_offsets: tuple[int, ...]
    max_tokens: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    home_size: int | None = None
    home_dtype: torch.dtype | None = None
    layers: tuple[int, ...] = (0,)
    timeout_s: float = 120.0
    part: int = 0
    num_parts: int = 1


class RankStalled(RuntimeError):
    """A rank's part of an exchange did not come in time. All ranks that wait for it raise this.

    Attributes:
        rank: whose part.
        exchange: which one, from 1; a step, or each part of it, has one a layer, or several.
        phase: "dispatch" or "combine".
        layer: the model's; None if that is not known.
        part: of the step.
    """

    def __init__(
        self, rank: int, exchange: int, phase: str, layer: int | None, timeout_s: float, part: int = 0
    ) -> None:
        where = "" if layer is None else f" of layer {layer}"
        super().__init__(
            f"rank {rank} has stalled: the others have waited for more than {timeout_s:g} s for its {phase}{where}"
        )
        self.rank, self.exchange, self.phase, self.layer, self.part = rank, exchange, phase, layer, part

    @property
    def order(self) -> tuple[int, int, int, int]:
        """As ranks come to wait. Of several, the smallest is the cause; the last number is the rank."""
        return self.exchange, int(self.phase == "combine"), self.part, self.rank


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What a rank's experts work on. Routed row r reads `x_UD[row_index_R[r]]`; rows are sorted by local expert, within an
    expert by (home rank, token, k). Expert e's rows are `expert_offsets[e] : expert_offsets[e + 1]`.

    Where the host knows the counts, `expert_offsets` is i64 on the host, R is exact and the experts' rows stay in this order.
    Otherwise it is i32 on the device, R is what there can be at most, and `home_R` says where each routed row's result goes.

    Rows that were quantised for the way are numbers again, or u8 and packed (`kernels.ops.quantize.pack`) where the experts read
    them so.
    """

    x_UD: Tensor
    row_index_R: Tensor  # i64 or i32
    expert_offsets: np.ndarray | Tensor
    home_R: Tensor | None = None  # i32
    tile_map: TileMap | None = None  # of the rows, if the backend has found their tiles already


class AllToAll(Protocol):
    """Dispatch and combine over one group of ranks.

    Attributes:
        graph_safe: the host learns nothing and waits for nothing, so that a CUDA graph can hold the phases.
    """

    @property
    def graph_safe(self) -> bool: ...

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> Any:
        """Start sending rows to the ranks of their experts.

        `physical_TK` i64: physical expert ids, -1 for none. `num_tokens_P`: T of every rank, known from the plan. `num_valid`,
        i32 [1] on the device, where `graph_safe`: only so many of x's rows count, and `num_tokens_P` says how many ranks have at
        most.
        """
        ...

    def dispatch_recv(self, handle: Any) -> Dispatched:
        """Wait for the rows of every rank."""
        ...

    def combine_send(self, handle: Any, y_RD: Tensor) -> Any:
        """Start sending expert rows home, which lie as `Dispatched` says; returns the handle for `combine_recv`."""
        ...

    def combine_recv(self, handle: Any) -> Tensor:
        """Wait for this rank's rows: [T, K, D], slot (t, k) from expert k of token t, zeros where the id was -1.

        They, and what `dispatch_recv` returned, may be overwritten by the next `dispatch_send`.
        """
        ...


@runtime_checkable
class Watched(Protocol):
    """An all-to-all that waits on the device, where nothing can be raised: the host asks when a step's work is done."""

    def check(self) -> None:
        """Raises `RankStalled` if what the device has computed is void."""
        ...
