"""A mixture-of-experts layer over the ranks of a group: route, dispatch, experts, combine.

T tokens of this rank, K experts a token, D model width, F expert width, E logical experts, e experts here, C turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.a2a_local import LocalAllToAll
from expertwire.comm.all_to_all import AllToAll
from expertwire.kernels import experts, routing
from expertwire.kernels.registry import Ops
from expertwire.moe.placement import Placement


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """The weights of one layer on one rank, the norm behind it, and the way to the other ranks.

    `weights` are those of the experts as their kernel reads them, [e, ...] each, where they can be written in place: for who
    moves experts. `load_E` i64 counts how many rows this rank's tokens have sent to each logical expert: on the device, by the
    all-to-all, if the host knows nothing of them. `fused` does all of it in one call.
    """

    ops: Ops
    router: routing.Router
    experts: experts.GroupedMlp
    weights: tuple[Tensor, ...]
    shared: Callable[[Tensor], Tensor] | None
    norm: Tensor
    eps: float
    all_to_all: AllToAll
    physical_CE: Tensor | None  # i64, `Placement.physical_for` this rank; None: the logical ids
    load_E: np.ndarray | Tensor
    fused: experts.Fused | None

    def forward(self, x_TD: Tensor, normed_TD: Tensor, num_tokens_P: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """x plus the mixture of its norm, and the norm of that; every rank calls it together, also with no tokens."""
        if self.fused is not None:
            assert isinstance(self.load_E, np.ndarray), "where layers are fused, the host counts rows"
            return self.fused(x_TD, normed_TD, self.load_E)
        y_TD = self._mix(normed_TD, *self.router(normed_TD), num_tokens_P)
        return self.ops.add_rms_norm(x_TD, y_TD, self.norm, self.eps)

    def _mix(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, num_tokens_P: Sequence[int] | Tensor) -> Tensor:
        handle = self.all_to_all.dispatch_send(x_TD, self._physical(ids_TK), num_tokens_P)
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        arrived = self.all_to_all.dispatch_recv(handle)
        if isinstance(self.load_E, np.ndarray):
            self.load_E[:] += np.bincount(ids_TK.flatten().cpu().numpy(), minlength=len(self.load_E))
        rows = arrived.row_index_R, arrived.expert_offsets, arrived.home_R, arrived.tile_map
        y_RD = self.experts(arrived.x_UD, *rows)
        returning = self.all_to_all.combine_send(handle, y_RD)
        y_TD = self.ops.combine(self.all_to_all.combine_recv(returning), weights_TK)
        return y_TD if shared_TD is None else torch.add(y_TD, shared_TD)

    def _physical(self, ids_TK: Tensor) -> Tensor:
        if self.physical_CE is None:
            return ids_TK
        turns, num_experts = self.physical_CE.shape
        if turns == 1:
            return self.physical_CE.take(ids_TK)
        turn_T = torch.arange(len(ids_TK), device=ids_TK.device).remainder_(turns)
        return self.physical_CE.take(ids_TK + turn_T.mul_(num_experts).unsqueeze(1))


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
    layer: int = 0,
) -> MoeLayer:
    """The layer of these weights, [E, D], [e, 2F, D], [e, D, F] and [D]; `layer` of the placement."""
    physical_CE = torch.from_numpy(placement.physical_for(rank, layer)).to(w_router.device)
    router, grouped_mlp, fused = ops.linear(w_router), ops.experts(w13_eFD, w2_eDF), None
    load_E: np.ndarray | Tensor = np.zeros(placement.num_logical, np.int64)
    local = ops.on_device and placement.num_ranks == 1
    if local:
        assert isinstance(all_to_all, LocalAllToAll), f"{all_to_all} tells the host, the ops do not"
        load_E = torch.zeros(placement.num_logical, dtype=torch.int64, device=w_router.device)
        all_to_all = all_to_all.counting(load_E)
    if placement.num_ranks == 1 and shared is None and not ops.on_device:
        prepared = router, grouped_mlp, norm_D, physical_CE[0]
        fused = experts.fuse(*prepared, top_k=top_k, renormalize=renormalize, eps=eps)
    return MoeLayer(
        ops=ops,
        router=routing.prepare(router, top_k, ops.route, renormalize=renormalize),
        experts=grouped_mlp,
        weights=() if ops.on_device else _in_use(grouped_mlp, w13_eFD, w2_eDF),
        shared=shared,
        norm=norm_D,
        eps=eps,
        all_to_all=all_to_all,
        physical_CE=None if local else physical_CE,
        load_E=load_E,
        fused=fused,
    )


def _in_use(grouped_mlp: experts.GroupedMlp, w13_eFD: Tensor, w2_eDF: Tensor) -> tuple[Tensor, ...]:
    """The weights, or what the kernel has packed them into."""
    packed = [getattr(grouped_mlp, name, None) for name in ("w13", "w2")]
    if not all(isinstance(array, np.ndarray) for array in packed):
        return w13_eFD, w2_eDF
    return tuple(torch.from_numpy(array.view(np.int32)) for array in packed)
