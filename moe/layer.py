"""A mixture-of-experts layer over the ranks of a group: route, dispatch, experts, combine.

T tokens of this rank, K experts a token, D model width, F expert width, E logical experts, e experts here, C replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.kernels.formats import Weight
from expertwire.kernels.ops.experts import Fused, GroupedMlp, fuse
from expertwire.kernels.ops.routing import Routed, to_physical
from expertwire.kernels.ops.variants import Activation, Routing
from expertwire.kernels.registry import Ops
from expertwire.moe.eplb.placement import Placement
from expertwire.moe.micro_batch import Stages, run

Router = Callable[[Tensor], tuple[Tensor, Tensor]]  # x_TD -> ids_TK, weights_TK


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """The weights of one layer on one rank, the norm behind it, and the way to the other ranks.

    `experts.weights` may be written in place by who moves experts. `load_E` i64 counts how many rows this rank's tokens have sent
    to each logical expert: on the host, if the ops are; otherwise on the device, in the launch that chooses experts. `fused` does
    all of it in one call.

    Steps of more than `exchange_tokens` tokens of some rank take several exchanges, one after another: as many on every rank, as
    all know `num_tokens_P`. A row's result does not depend on it.
    """

    ops: Ops
    router: Router | _Router
    scales_input: bool
    experts: GroupedMlp
    shared: Callable[[Tensor], Tensor] | None
    norm: Tensor
    eps: float
    all_to_alls: Sequence[AllToAll]  # one for each part of a step that can be on its way at once
    physical_CE: Tensor | None  # i64, `Placement.physical_for` this rank; None: the logical ids
    load_E: np.ndarray | Tensor
    fused: Fused | None
    exchange_tokens: int | None = None  # that an all-to-all takes of each rank; None: as many as there are

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
        routed = self._route(normed_TD, num_valid)
        if told is not None:
            told(routed.ids_TK)
        y_TD = yield from self._mix(normed_TD, routed, self.all_to_alls[part], num_tokens_P, num_valid)
        return self.ops.add_rms_norm(x_TD, y_TD, self.norm, self.eps)

    def _route(self, x_TD: Tensor, num_valid: Tensor | None) -> Routed:
        if isinstance(self.load_E, Tensor):
            assert isinstance(self.router, _Router), "on a device the router counts, too"
            return self.router.count(x_TD, load_E=self.load_E, physical_CE=self.physical_CE, num_valid=num_valid)
        ids_TK, weights_TK = self.router(x_TD)
        return Routed(ids_TK, weights_TK, to_physical(ids_TK, self.physical_CE))

    def _mix(
        self,
        x_TD: Tensor,
        routed: Routed,
        all_to_all: AllToAll,
        num_tokens_P: Sequence[int],
        num_valid: Tensor | None,
    ) -> Stages[Tensor]:
        ids_TK, weights_TK, physical_TK = routed
        given_TD, shared_TD = x_TD, None
        if self.scales_input:
            given_TD, weights_TK = (x_TD * weights_TK).to(x_TD.dtype), torch.ones_like(weights_TK)
        mixed, most, every = [], self.exchange_tokens, (given_TD, physical_TK, weights_TK)
        for first, counts_P in sub_batches(num_tokens_P, most):
            given, physical, weights = every if most is None else (tensor[first : first + most] for tensor in every)
            valid = num_valid - first if num_valid is not None and first else num_valid
            handle = all_to_all.dispatch_send(given, physical, counts_P, valid)
            if not first:  # while the first rows travel
                self._count(ids_TK)
                shared_TD = self.shared(x_TD) if self.shared is not None else None
            yield
            arrived = all_to_all.dispatch_recv(handle)
            sorted_by = arrived.row_index_R, arrived.expert_offsets, arrived.home_R, arrived.tile_map
            returning = all_to_all.combine_send(handle, self.experts(arrived.x_UD, *sorted_by))
            yield
            mixed.append(self.ops.combine(all_to_all.combine_recv(returning), weights))
        y_TD = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return y_TD if shared_TD is None else torch.add(y_TD, shared_TD)

    def _count(self, ids_TK: Tensor) -> None:
        if isinstance(self.load_E, np.ndarray):
            self.load_E[:] += np.bincount(ids_TK.flatten().numpy(), minlength=len(self.load_E))


def sub_batches(num_tokens_P: Sequence[int], most: int | None) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield the first token of each exchange of a step, and how many tokens each rank sends in it, `most` at most.

    There is one at least, and as many on every rank as the largest number of tokens needs.
    """
    yield 0, num_tokens_P if most is None else [min(num, most) for num in num_tokens_P]
    if most is not None:
        for first in range(most, max(num_tokens_P), most):
            yield first, [min(max(num - first, 0), most) for num in num_tokens_P]


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
    exchange_tokens: int | None = None,
) -> MoeLayer:
    """The layer of these weights; `layer` of the placement.

    Args:
        w_router: [E, D]; in fp32, if its product is to be; `router_bias` [E] on logits, `choice_bias` fp32 [E] on scores.
        w13: [e, 2F, D], gate rows over up rows; `w2` [e, D, F]; `biases` of the two.
        norm_D: behind the layer.
        all_to_alls: one for each part of a step that can be on its way at once.
        exchange_tokens: that they take of each rank, if a step can have more.
    """
    assert routing.top_k == 1 or not routing.scales_input, f"{routing}: what an expert is given has one weight"
    physical_CE = torch.from_numpy(placement.physical_for(rank, layer)).to(w_router.device)
    expected = _expected(placement, rank, routing.top_k)
    options: dict[str, Any] = {"activation": activation, "bias13_eF": biases[0], "bias2_eD": biases[1]}
    if ops.on_device and placement.num_ranks > 1 and len(all_to_alls) > 1:
        options["overlapped"] = True
    grouped_mlp = ops.experts(w13, w2, expected=expected, **options)
    load_E = torch.zeros(placement.num_logical, dtype=torch.int64, device=w_router.device)
    local = ops.on_device and placement.num_ranks == 1
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
        exchange_tokens=exchange_tokens,
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
    route_and_count: Callable[..., Routed]

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        return self.route(self.dense(x_TD.to(self.dtype)))

    def count(self, x_TD: Tensor, **counted: Tensor | None) -> Routed:
        """As `kernels.ops.routing.route_and_count`."""
        return self.route_and_count(self.dense(x_TD.to(self.dtype)), **counted)


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
    rule = {
        "top_k": routing.top_k,
        "renormalize": routing.renormalize,
        "score": routing.score,
        "bias_E": choice_bias,
        "groups": routing.groups,
        "scale": routing.scale,
    }
    return _Router(
        dense=ops.linear(w_ED, bias_E, **options),
        dtype=dtype if options else w_ED.dtype,
        route=partial(ops.route, **rule),
        route_and_count=partial(ops.route_and_count, **rule),
    )
