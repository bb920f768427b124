"""A mixture-of-experts layer over the ranks of a group: route, dispatch, experts, combine.

T tokens of this rank, K experts a token, D model width, F expert width, E logical experts, e experts here, C turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.a2a_local import LocalAllToAll
from expertwire.comm.a2a_reference import ReferenceAllToAll
from expertwire.comm.all_to_all import AllToAll
from expertwire.kernels.experts import Fused, GroupedMlp, fuse
from expertwire.kernels.formats import Weight
from expertwire.kernels.registry import Ops
from expertwire.kernels.variants import Activation, Routing
from expertwire.moe.placement import Placement
from expertwire.moe.stages import Stages, run

Router = Callable[[Tensor], tuple[Tensor, Tensor]]  # x_TD -> ids_TK, weights_TK


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """The weights of one layer on one rank, the norm behind it, and the way to the other ranks.

    `experts.weights` may be written in place by who moves experts. `load_E` i64 counts how many rows this rank's tokens have sent
    to each logical expert: on the host, if the ops are; otherwise on the device, which a single rank's all-to-all does as it
    goes (`physical_CE` is None then). `fused` does all of it in one call.
    """

    ops: Ops
    router: Router
    scales_input: bool
    experts: GroupedMlp
    shared: Callable[[Tensor], Tensor] | None
    norm: Tensor
    eps: float
    all_to_alls: Sequence[AllToAll]  # one for each part of a step that can be on its way at once
    physical_CE: Tensor | None  # i64, `Placement.physical_for` this rank; None: the logical ids
    load_E: np.ndarray | Tensor
    fused: Fused | None

    def forward(self, x_TD: Tensor, normed_TD: Tensor, num_tokens_P: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x plus the mixture of its norm, and the norm of that; every rank calls it together, also with no tokens."""
        return run(self.stages(x_TD, normed_TD, num_tokens_P))

    def stages(
        self,
        x_TD: Tensor,
        normed_TD: Tensor,
        num_tokens_P: Sequence[int],
        part: int = 0,
        told: Callable[[Tensor], None] | None = None,
        num_valid: Tensor | None = None,
    ) -> Stages[tuple[Tensor, Tensor]]:
        """`forward` of one part of a step, which stops where it would wait for the other ranks. `told` is called with the logical
        experts of each token, i64 [T, K]; `num_valid` is that of `AllToAll.dispatch_send`."""
        if self.fused is not None and told is None:
            assert isinstance(self.load_E, np.ndarray), "where layers are fused, the host counts rows"
            return self.fused(x_TD, normed_TD, self.load_E)
        ids_TK, weights_TK = self.router(normed_TD)
        if told is not None:
            told(ids_TK)
        sent = self.all_to_alls[part], num_tokens_P, num_valid
        y_TD = yield from self._mix(normed_TD, ids_TK, weights_TK, *sent)
        return self.ops.add_rms_norm(x_TD, y_TD, self.norm, self.eps)

    def _mix(
        self,
        x_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        all_to_all: AllToAll,
        num_tokens_P: Sequence[int],
        num_valid: Tensor | None,
    ) -> Stages[Tensor]:
        given_TD = x_TD
        if self.scales_input:
            given_TD, weights_TK = (x_TD * weights_TK).to(x_TD.dtype), torch.ones_like(weights_TK)
        handle = all_to_all.dispatch_send(given_TD, self._physical(ids_TK), num_tokens_P, num_valid)
        self._count(ids_TK, num_valid)
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        yield
        arrived = all_to_all.dispatch_recv(handle)
        rows = arrived.row_index_R, arrived.expert_offsets, arrived.home_R, arrived.tile_map
        returning = all_to_all.combine_send(handle, self.experts(arrived.x_UD, *rows))
        yield
        y_TD = self.ops.combine(all_to_all.combine_recv(returning), weights_TK)
        return y_TD if shared_TD is None else torch.add(y_TD, shared_TD)

    def _count(self, ids_TK: Tensor, num_valid: Tensor | None) -> None:
        if isinstance(self.load_E, np.ndarray):
            self.load_E[:] += np.bincount(ids_TK.flatten().numpy(), minlength=len(self.load_E))
        elif self.physical_CE is not None:
            counted_T1 = torch.ones_like(ids_TK[:, :1], dtype=torch.int64)
            if num_valid is not None:
                counted_T1 = (torch.arange(len(ids_TK), device=ids_TK.device) < num_valid).long()[:, None]
            self.load_E.scatter_add_(0, ids_TK.flatten().long(), counted_T1.expand(ids_TK.shape).flatten())

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
    w13: Weight,
    w2: Weight,
    norm_D: Tensor,
    *,
    ops: Ops,
    routing: Routing,
    eps: float,
    placement: Placement,
    rank: int,
    all_to_alls: Sequence[AllToAll],
    activation: Activation | None = None,
    router_bias: Tensor | None = None,
    choice_bias: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    shared: Callable[[Tensor], Tensor] | None = None,
    layer: int = 0,
) -> MoeLayer:
    """The layer of these weights; `layer` of the placement.

    Args:
        w_router: [E, D]; in fp32, if its product is to be; `router_bias` [E] on logits, `choice_bias` fp32 [E] on scores.
        w13: [e, 2F, D], gate rows over up rows; `w2` [e, D, F]; `biases` of the two.
        norm_D: behind the layer.
        all_to_alls: one for each part of a step that can be on its way at once.
    """
    assert routing.top_k == 1 or not routing.scales_input, f"{routing}: what an expert is given has one weight"
    physical_CE = torch.from_numpy(placement.physical_for(rank, layer)).to(w_router.device)
    expected = _expected(placement, rank, routing.top_k)
    grouped_mlp = ops.experts(
        w13, w2, activation=activation, bias13_eF=biases[0], bias2_eD=biases[1], expected=expected
    )
    load_E = torch.zeros(placement.num_logical, dtype=torch.int64, device=w_router.device)
    local = ops.on_device and placement.num_ranks == 1
    if local:
        alone = [each for each in all_to_alls if isinstance(each, LocalAllToAll)]
        assert len(alone) == len(all_to_alls), f"{all_to_alls} tell the host, the ops do not"
        all_to_alls = [each.counting(load_E) for each in alone]
    router, fused = _router(w_router, router_bias, routing, choice_bias, ops, norm_D.dtype), None
    # One rank's rows stay where they are, unless the all-to-all rounds them.
    at_home = placement.num_ranks == 1 and isinstance(all_to_alls[0], ReferenceAllToAll)
    plain = (routing.score, choice_bias, routing.groups, routing.scale) == ("softmax", None, None, 1.0)
    if at_home and plain and shared is None and not (ops.on_device or routing.scales_input):
        given = router.dense, grouped_mlp, norm_D, physical_CE[0]
        fused = fuse(*given, top_k=routing.top_k, renormalize=routing.renormalize, eps=eps)
    return MoeLayer(
        ops=ops,
        router=router,
        scales_input=routing.scales_input,
        experts=grouped_mlp,
        shared=shared,
        norm=norm_D,
        eps=eps,
        all_to_alls=tuple(all_to_alls),
        physical_CE=None if local else physical_CE,
        load_E=load_E if ops.on_device else load_E.numpy(),
        fused=fused,
    )


def _expected(placement: Placement, rank: int, top_k: int) -> float:
    """Of the routed rows that can come to a rank, how many do if all experts get as many."""
    here = placement.rank_offsets[rank + 1] - placement.rank_offsets[rank]
    return top_k * here / placement.num_physical / min(top_k, here)


@dataclass(frozen=True, kw_only=True)
class _Router:
    dense: Callable[[Tensor], Tensor]
    dtype: torch.dtype  # of x, as `dense` wants it
    route: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return self.route(self.dense(x_TD.to(self.dtype)))


def _router(
    w_ED: Tensor,
    bias_E: Tensor | None,
    routing: Routing,
    choice_bias: Tensor | None,
    ops: Ops,
    dtype: torch.dtype,
) -> _Router:
    wide = w_ED.dtype == torch.float32 != dtype
    options: dict[str, Any] = {"x_dtype": dtype, "out_dtype": torch.float32} if wide and ops.on_device else {}
    return _Router(
        dense=ops.linear(w_ED, bias_E, **options),
        dtype=dtype if options else w_ED.dtype,
        route=partial(
            ops.route,
            top_k=routing.top_k,
            renormalize=routing.renormalize,
            score=routing.score,
            bias_E=choice_bias,
            groups=routing.groups,
            scale=routing.scale,
        ),
    )
