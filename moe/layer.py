"""A mixture-of-experts layer over the ranks of a group: route, dispatch, experts, combine.

T tokens of this rank, K experts a token, D model width, F expert width, E logical experts, e experts here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all import AllToAll
from expertwire.kernels import experts, routing
from expertwire.kernels.registry import Ops
from expertwire.moe.placement import Placement


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """The weights of one layer on one rank, the norm behind it, and the way to the other ranks.

    `load_E` i64 counts how many rows this rank's tokens have sent to each logical expert: on the device, if the host knows
    nothing of them. `few` does the same in one call, when it can.
    """

    ops: Ops
    router: routing.Router
    experts: experts.GroupedMlp
    shared: Callable[[Tensor], Tensor] | None
    norm: Tensor
    eps: float
    all_to_all: AllToAll
    physical_of_E: Tensor | None  # i64, for this home rank; None: the logical ids
    load_E: np.ndarray | Tensor
    few: experts.FewRows | None

    def forward(self, x_TD: Tensor, normed_TD: Tensor, num_tokens_P: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """x plus the mixture of its norm, and the norm of that; every rank calls it together, also with no tokens."""
        few = self.few
        routed = self.router(normed_TD) if few is None or x_TD.shape[0] > few.max_unrouted else None
        if few is not None and (done := few(x_TD, normed_TD, routed, self.load_E)) is not None:
            return done
        assert routed is not None, f"{x_TD.shape[0]} tokens were too many for {few}"
        y_TD = self._mix(normed_TD, *routed, num_tokens_P)
        return self.ops.add_rms_norm(x_TD, y_TD, self.norm, self.eps)

    def _mix(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_tokens_P: Sequence[int] | Tensor) -> Tensor:
        physical_TK = ids_TK if self.physical_of_E is None else self.physical_of_E.take(ids_TK)
        handle = self.all_to_all.dispatch_send(x_TD, physical_TK, num_tokens_P)
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        arrived = self.all_to_all.dispatch_recv(handle)
        self._count(ids_TK, arrived.expert_offsets)
        y_RD = self.experts(arrived.x_UD, arrived.row_index_R, arrived.expert_offsets, arrived.home_R)
        returning = self.all_to_all.combine_send(handle, y_RD)
        y_TD = self.ops.combine(self.all_to_all.combine_recv(returning), weights_TK)
        return y_TD if shared_TD is None else torch.add(y_TD, shared_TD)

    def _count(self, ids_TK: Tensor, expert_offsets: np.ndarray | Tensor) -> None:
        if isinstance(self.load_E, Tensor):
            assert isinstance(expert_offsets, Tensor), "the load is counted on the device, the rows on the host"
            self.load_E.add_(expert_offsets.diff())
        else:
            self.load_E[:] += np.bincount(ids_TK.flatten().cpu().numpy(), minlength=len(self.load_E))


def prepare(
    w_router: Tensor,
    w13_eFD: Tensor,
    w2_eDF: Tensor,
    norm_D: Tensor,
    *,
    ops: Ops,
    top_k: int,
    renormalize: bool,
    eps: float,
    placement: Placement,
    rank: int,
    all_to_all: AllToAll,
    shared: Callable[[Tensor], Tensor] | None = None,
) -> MoeLayer:
    """The layer of these weights, [E, D], [e, 2F, D], [e, D, F] and [D]."""
    physical_of_E = torch.from_numpy(placement.physical_for(rank)).to(w_router.device)
    few = None
    local = ops.on_device and placement.num_ranks == 1
    if placement.num_ranks == 1 and shared is None and not ops.on_device:
        weights = w_router, w13_eFD, w2_eDF, norm_D
        few = experts.prepare_few(*weights, physical_of_E, top_k=top_k, renormalize=renormalize, eps=eps)
    return MoeLayer(
        ops=ops,
        router=routing.prepare(ops.linear(w_router), top_k, ops.route, renormalize=renormalize),
        experts=ops.experts(w13_eFD, w2_eDF),
        shared=shared,
        norm=norm_D,
        eps=eps,
        all_to_all=all_to_all,
        physical_of_E=None if local else physical_of_E,
        load_E=torch.zeros(placement.num_logical, dtype=torch.int64, device=w_router.device)
        if local
        else np.zeros(placement.num_logical, np.int64),
        few=few,
    )
