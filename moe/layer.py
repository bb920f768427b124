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
from expertwire.comm.all_to_all import AllToAll
from expertwire.kernels import experts
from expertwire.kernels.formats import Weight
from expertwire.kernels.registry import Ops
from expertwire.kernels.variants import Activation, Groups, Score
from expertwire.moe.placement import Placement

Router = Callable[[Tensor], tuple[Tensor, Tensor]]  # x_TD -> ids_TK, weights_TK


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How experts are chosen and weighed, see `kernels.routing`; `scales_input`: the weight multiplies what the expert is given,
    not what it returns."""

    top_k: int
    renormalize: bool
    score: Score = "softmax"
    groups: Groups | None = None
    scale: float = 1.0
    scales_input: bool = False


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """The weights of one layer on one rank, the norm behind it, and the way to the other ranks.

    `experts.weights` may be written in place by who moves experts. `load_E` i64 counts how many rows this rank's tokens have sent
    to each logical expert: on the device, by the all-to-all, if the host knows nothing of them. `fused` does all of it in one
    call.
    """

    ops: Ops
    router: Router
    scales_input: bool
    experts: experts.GroupedMlp
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
        given_TD = x_TD
        if self.scales_input:
            given_TD, weights_TK = (x_TD * weights_TK).to(x_TD.dtype), torch.ones_like(weights_TK)
        handle = self.all_to_all.dispatch_send(given_TD, self._physical(ids_TK), num_tokens_P)
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
    w13: Weight,
    w2: Weight,
    norm_D: Tensor,
    *,
    ops: Ops,
    rule: Rule,
    eps: float,
    placement: Placement,
    rank: int,
    all_to_all: AllToAll,
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
    """
    physical_CE = torch.from_numpy(placement.physical_for(rank, layer)).to(w_router.device)
    grouped_mlp = ops.experts(w13, w2, activation=activation, bias13_eF=biases[0], bias2_eD=biases[1])
    load_E: np.ndarray | Tensor = np.zeros(placement.num_logical, np.int64)
    local = ops.on_device and placement.num_ranks == 1
    if local:
        assert isinstance(all_to_all, LocalAllToAll), f"{all_to_all} tells the host, the ops do not"
        load_E = torch.zeros(placement.num_logical, dtype=torch.int64, device=w_router.device)
        all_to_all = all_to_all.counting(load_E)
    router, fused = _router(w_router, router_bias, choice_bias, rule, ops, norm_D.dtype), None
    simple = rule == Rule(top_k=rule.top_k, renormalize=rule.renormalize) and choice_bias is None
    if simple and placement.num_ranks == 1 and shared is None and not ops.on_device:
        given = router.dense, grouped_mlp, norm_D, physical_CE[0]
        fused = experts.fuse(*given, top_k=rule.top_k, renormalize=rule.renormalize, eps=eps)
    return MoeLayer(
        ops=ops,
        router=router,
        scales_input=rule.scales_input,
        experts=grouped_mlp,
        shared=shared,
        norm=norm_D,
        eps=eps,
        all_to_all=all_to_all,
        physical_CE=None if local else physical_CE,
        load_E=load_E,
        fused=fused,
    )


@dataclass(frozen=True, kw_only=True)
class _Router:
    dense: Callable[[Tensor], Tensor]
    dtype: torch.dtype  # of x, as `dense` wants it
    route: Callable[[Tensor], tuple[Tensor, Tensor]]

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return self.route(self.dense(x_TD.to(self.dtype)))


def _router(
    w_ED: Tensor, bias_E: Tensor | None, choice_bias: Tensor | None, rule: Rule, ops: Ops, dtype: torch.dtype
) -> _Router:
    wide = w_ED.dtype == torch.float32 != dtype
    options: dict[str, Any] = {"x_dtype": dtype, "out_dtype": torch.float32} if wide and ops.on_device else {}
    special = {"score": rule.score, "bias_E": choice_bias, "groups": rule.groups, "scale": rule.scale}
    if special == {"score": "softmax", "bias_E": None, "groups": None, "scale": 1.0}:
        special = {}
    return _Router(
        dense=ops.linear(w_ED, bias_E, **options),
        dtype=dtype if options else w_ED.dtype,
        route=partial(ops.route, top_k=rule.top_k, renormalize=rule.renormalize, **special),
    )
