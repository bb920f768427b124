"""An all-to-all of one rank, on the device: nothing travels, and the host learns nothing.

Letters as in `comm.all_to_all.base`; here U = T, R = T * K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched
from expertwire.kernels.ops.permute import Permuted


@dataclass(frozen=True, kw_only=True)
class _Handle:
    x_TD: Tensor
    permuted: Permuted


class LocalAllToAll:
    """Rows are found by `permute`, an implementation of `kernels.ops.permute`. An id of -1 leaves its slot undefined."""

    graph_safe = True

    def __init__(self, spec: AllToAllSpec, permute: Callable[..., Permuted]) -> None:
        assert spec.group.size == 1, f"{spec.group.size} ranks"
        self._spec, self._permute = spec, permute

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _Handle:
        assert x_TD.shape[0] <= self._spec.max_tokens, f"{x_TD.shape[0]} tokens, built for {self._spec.max_tokens}"
        return _Handle(x_TD=x_TD, permuted=self._permute(physical_TK, self._spec.rank_offsets[1], num_valid))

    def dispatch_recv(self, handle: _Handle) -> Dispatched:
        permuted = handle.permuted
        return Dispatched(
            x_UD=handle.x_TD,
            row_index_R=permuted.row_index_N,
            expert_offsets=permuted.expert_offsets,
            home_R=permuted.home_N,
            tile_map=permuted.tile_map,
        )

    def combine_send(self, handle: _Handle, y_RD: Tensor) -> Tensor:
        return y_RD

    def combine_recv(self, handle: Tensor) -> Tensor:
        return handle.unflatten(0, (-1, self._spec.top_k))
