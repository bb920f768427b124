"""An all-to-all of one rank on the device: no row is moved, and the host waits for nothing.

Letters as in `comm.all_to_all.base`; here U = T, R = T * K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAllSpec, Dispatched, Handle
from expertwire.kernels.ops.permute import Permute, Permuted


@dataclass(frozen=True, kw_only=True)
class _DispatchHandle(Handle):
    x_TD: Tensor
    permuted: Permuted


@dataclass(frozen=True, kw_only=True)
class _CombineHandle(Handle):
    y_RD: Tensor


class LocalAllToAll:
    """An all-to-all without peers.

    Args:
        spec: of a group of one rank.
        permute: finds the rows of each expert; leaves the slot of an id of -1 undefined.
    """

    graph_safe = True

    def __init__(self, spec: AllToAllSpec, permute: Permute) -> None:
        assert spec.group.size == 1, f"{spec.group.size} ranks"
        self._spec, self._permute = spec, permute

    def dispatch_send(
        self, x_TD: Tensor, physical_TK: Tensor, num_tokens_P: Sequence[int], num_valid: Tensor | None = None
    ) -> _DispatchHandle:
        assert x_TD.shape[0] <= self._spec.max_tokens, f"{x_TD.shape[0]} tokens, built for {self._spec.max_tokens}"
        return _DispatchHandle(x_TD=x_TD, permuted=self._permute(physical_TK, self._spec.rank_offsets[1], num_valid))

    def dispatch_recv(self, handle: Handle) -> Dispatched:
        assert isinstance(handle, _DispatchHandle), handle
        permuted = handle.permuted
        return Dispatched(
            x_UD=handle.x_TD,
            row_index_R=permuted.row_index_N,
            expert_offsets=permuted.expert_offsets,
            home_R=permuted.home_N,
            tile_map=permuted.tile_map,
        )

    def combine_send(self, handle: Handle, y_RD: Tensor) -> _CombineHandle:
        return _CombineHandle(y_RD=y_RD)

    def combine_recv(self, handle: Handle) -> Tensor:
        assert isinstance(handle, _CombineHandle), handle
        return handle.y_RD.unflatten(0, (-1, self._spec.top_k))
