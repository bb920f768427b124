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

    `load_E` i64 counts, on the host, how many rows this rank's tokens have sent to each logical expert. `few` does the same in
    one call, when it can.
    """

    ops: Ops
    router: routing.Router
    experts: experts.GroupedMlp
    shared: Callable[[Tensor], Tensor] | None
    norm: Tensor
    eps: float
    all_to_all: AllToAll
    physical_of_E: Tensor  # i64, for this home rank
    load_E: np.ndarray
    few: experts.FewRows | None

    def forward(self, x_TD: Tensor, normed_TD: Tensor, num_tokens_P: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x plus the mixture of its norm, and the norm of that; every rank calls it together, also with no tokens."""
        few = self.few
        routed = self.router(normed_TD) if few is None or x_TD.shape[0] > few.max_unrouted else None
        if few is not None and (done := few(x_TD, normed_TD, routed, self.load_E)) is not None:
            return done
        assert routed is not None, f"{x_TD.shape[0]} tokens were too many for {few}"
        y_TD = self._mix(normed_TD, *routed, num_tokens_P)
        return self.ops.add_rms_norm(x_TD, y_TD, self.norm, self.eps)

    def _mix(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_tokens_P: Sequence[int]) -> Tensor:
        self.load_E[:] += np.bincount(ids_TK.flatten().cpu().numpy(), minlength=len(self.load_E))
        handle = self.all_to_all.dispatch_send(x_TD, self.physical_of_E.take(ids_TK), num_tokens_P)
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        arrived = self.all_to_all.dispatch_recv(handle)
        y_RD = self.experts(arrived.x_UD, arrived.row_index_R, arrived.expert_offsets)
        returning = self.all_to_all.combine_send(handle, y_RD)
        y_TD = self.ops.combine(self.all_to_all.combine_recv(returning), weights_TK)
        return y_TD if shared_TD is None else torch.add(y_TD, shared_TD)


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
    if placement.num_ranks == 1 and shared is None:
        weights = w_router, w13_eFD, w2_eDF, norm_D
        few = experts.prepare_few(*weights, physical_of_E, top_k=top_k, renormalize=renormalize, eps=eps)
    return MoeLayer(
        ops=ops,
        router=routing.prepare(w_router, top_k, ops.route, renormalize=renormalize),
        experts=experts.prepare(w13_eFD, w2_eDF, ops.silu_mul),
        shared=shared,
        norm=norm_D,
        eps=eps,
        all_to_all=all_to_all,
        physical_of_E=physical_of_E,
        load_E=np.zeros(placement.num_logical, np.int64),
        few=few,
    )
