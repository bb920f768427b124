"""A mixture-of-experts layer over the ranks of a group: route, dispatch, experts, combine, and the norm behind it.

T tokens of this rank, K experts a token, D model width, F expert width, E logical experts, e physical experts on this
rank, P ranks, U distinct tokens received, R rows received; Q is the period with which tokens rotate through replicas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertwire.comm.all_to_all.base import AllToAll
from expertwire.comm.all_to_all.reference import ReferenceAllToAll
from expertwire.kernels.ops.experts import GroupedMlp, GroupedMlpWeights
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.moe_block import DenseMlp, MoeBlock, MoeWeights
from expertwire.kernels.ops.routing import Route, RouteAndCount, Routed, to_physical
from expertwire.kernels.ops.variants import Routing
from expertwire.kernels.registry import Ops
from expertwire.moe.eplb.placement import Placement
from expertwire.moe.micro_batch import MicroBatch, run


@dataclass(frozen=True, kw_only=True)
class Router:
    """Choice of experts.

    Attributes:
        dense: from [T, D] to the logits [T, E].
        bias_E: of the choice, or None.
    """

    dense: Linear
    route: Route
    route_and_count: RouteAndCount
    routing: Routing
    bias_E: Tensor | None

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return logical experts i64 [T, K] and their weights fp32 [T, K]."""
        return self.route(self.dense(x_TD), self.routing, self.bias_E)

    def count(self, x_TD: Tensor, load_E: Tensor, log2phy_QE: Tensor | None, num_valid: Tensor | None) -> Routed:
        """Return physical experts too, and add to the load; see `kernels.ops.routing.route_and_count`."""
        return self.route_and_count(
            self.dense(x_TD), self.routing, self.bias_E, load_E=load_E, log2phy_QE=log2phy_QE, num_valid=num_valid
        )


@dataclass(frozen=True, kw_only=True)
class MoeLayer:
    """The weights of one layer on one rank, the norm behind it, and its all-to-alls.

    A step with more than `exchange_tokens` tokens on some rank takes several exchanges one after another, equally many
    on every rank, as all know `num_tokens_P`. A row's result does not depend on that.

    Attributes:
        router: on a device it also counts the load, in the launch that chooses experts.
        experts: whose `weights` are rewritten in place when experts move.
        shared: the shared expert, or None.
        latent: to and from the width of the rows that experts read and write, where that is not D; these rows travel. Or None.
        norm, eps: of the norm behind the layer.
        all_to_alls: one for each micro-batch that can be in flight.
        log2phy_QE: i64, `Placement.log2phy` this rank; None: physical ids are logical ones.
        load_E: i64, routed rows of this rank's tokens by logical expert; on the host if the host counts rows.
        block: the device's own implementation of the whole layer, or None.
        exchange_tokens: most tokens of a rank in an exchange; None: no limit.
    """

    ops: Ops
    router: Router
    experts: GroupedMlp
    shared: DenseMlp | None
    latent: tuple[Linear, Linear] | None
    norm: Tensor
    eps: float
    all_to_alls: Sequence[AllToAll]
    log2phy_QE: Tensor | None
    load_E: np.ndarray | Tensor
    block: MoeBlock | None
    exchange_tokens: int | None = None

    def forward(self, x_TD: Tensor, normed_TD: Tensor, num_tokens_P: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the residual sum and its norm. All ranks call this together, also without tokens."""
        return run(self.micro_batch(x_TD, normed_TD, num_tokens_P))

    def run_experts_alone(self) -> None:
        """Run the first expert for one token, without other ranks, on a CPU: for warm-up."""
        x_TD = torch.zeros_like(self.norm)[None]
        input_TD = x_TD if self.latent is None else self.latent[0](x_TD)
        offsets = np.ones(len(self.experts.weights[0]) + 1, np.int64)
        offsets[0] = 0
        self.experts(input_TD, torch.zeros(1, dtype=torch.int64), offsets)

    def micro_batch(
        self,
        x_TD: Tensor,
        normed_TD: Tensor,
        num_tokens_P: Sequence[int],
        number: int = 0,
        on_routed: Callable[[Tensor], None] | None = None,
        num_valid: Tensor | None = None,
    ) -> MicroBatch[tuple[Tensor, Tensor]]:
        """Run `forward` for a micro-batch, yielding where it would wait for other ranks.

        Args:
            number: of the micro-batch in its step; it selects the all-to-all.
            on_routed: called with the logical experts of each token, i64 [T, K].
            num_valid: as of `AllToAll.dispatch_send`.
        """
        if self.block is not None and on_routed is None:
            assert isinstance(self.load_E, np.ndarray), "fused blocks count rows on the host"
            return self.block(x_TD, normed_TD, self.load_E)
        routed = self._route(normed_TD, num_valid)
        if on_routed is not None:
            on_routed(routed.ids_TK)
        y_TD = yield from self._mix(normed_TD, routed, self.all_to_alls[number], num_tokens_P, num_valid)
        return self.ops.add_rms_norm(x_TD, y_TD, self.norm, self.eps)

    def _route(self, x_TD: Tensor, num_valid: Tensor | None) -> Routed:
        if isinstance(self.load_E, Tensor):
            return self.router.count(x_TD, self.load_E, self.log2phy_QE, num_valid)
        ids_TK, weights_TK = self.router(x_TD)
        return Routed(ids_TK, weights_TK, to_physical(ids_TK, self.log2phy_QE))

    def _mix(
        self,
        x_TD: Tensor,
        routed: Routed,
        all_to_all: AllToAll,
        num_tokens_P: Sequence[int],
        num_valid: Tensor | None,
    ) -> MicroBatch[Tensor]:
        ids_TK, weights_TK, physical_TK = routed
        input_TD, shared_TD = x_TD, None
        if self.router.routing.scales_input:
            input_TD, weights_TK = (x_TD * weights_TK).to(x_TD.dtype), torch.ones_like(weights_TK)
        if self.latent is not None:
            input_TD = self.latent[0](input_TD)
        mixed, most, whole = [], self.exchange_tokens, (input_TD, physical_TK, weights_TK)
        for first, counts_P in exchanges(num_tokens_P, most):
            rows, physical, weights = whole if most is None else (tensor[first : first + most] for tensor in whole)
            valid = num_valid - first if num_valid is not None and first else num_valid
            handle = all_to_all.dispatch_send(rows, physical, counts_P, valid)
            if not first:  # overlaps with the first dispatch
                self._count(ids_TK)
                shared_TD = self.shared(x_TD) if self.shared is not None else None
            yield
            arrived = all_to_all.dispatch_recv(handle)
            sorted_by = arrived.row_index_R, arrived.expert_offsets, arrived.home_R, arrived.tile_map
            returning = all_to_all.combine_send(handle, self.experts(arrived.x_UD, *sorted_by))
            yield
            mixed.append(self.ops.combine(all_to_all.combine_recv(returning), weights))
        y_TD = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        if self.latent is not None:
            y_TD = self.latent[1](y_TD)
        return y_TD if shared_TD is None else torch.add(y_TD, shared_TD)

    def _count(self, ids_TK: Tensor) -> None:
        if isinstance(self.load_E, np.ndarray):
            self.load_E[:] += np.bincount(ids_TK.flatten().numpy(), minlength=len(self.load_E))


def exchanges(num_tokens_P: Sequence[int], most: int | None) -> Iterator[tuple[int, Sequence[int]]]:
    """Yield the first token of each exchange of a step and the number of tokens each rank sends in it, at most `most`.

    There is at least one exchange, and on every rank as many as the rank with most tokens needs.
    """
    yield 0, num_tokens_P if most is None else [min(num, most) for num in num_tokens_P]
    if most is not None:
        for first in range(most, max(num_tokens_P), most):
            yield first, [min(max(num - first, 0), most) for num in num_tokens_P]


def prepare(
    w_router: Tensor,
    experts: GroupedMlpWeights,
    norm_D: Tensor,
    *,
    ops: Ops,
    routing: Routing,
    eps: float,
    placement: Placement,
    rank: int,
    all_to_alls: Sequence[AllToAll],
    router_bias: Tensor | None = None,
    choice_bias: Tensor | None = None,
    shared: DenseMlp | None = None,
    latent: tuple[Linear, Linear] | None = None,
    layer: int = 0,
    exchange_tokens: int | None = None,
) -> MoeLayer:
    """Return the layer of these weights; `layer` is its number in the placement.

    Args:
        w_router: [E, D]; in fp32 if logits are to be. `router_bias` [E] is added to logits, `choice_bias` fp32 [E]
            to scores.
        experts: those of this rank.
        shared, latent: as `MoeLayer` has them.
        norm_D: weights of the norm behind the layer.
        all_to_alls: one for each micro-batch that can be in flight.
        exchange_tokens: most tokens of a rank in an exchange, if a step can have more.
    """
    assert routing.top_k == 1 or not routing.scales_input, f"{routing}: an expert's input has one weight"
    log2phy_QE = torch.from_numpy(placement.log2phy(rank, layer)).to(w_router.device)
    alone = placement.num_ranks == 1
    grouped_mlp = ops.experts(
        experts,
        expected=_expected(placement, rank, routing.top_k),
        overlapped=not alone and len(all_to_alls) > 1,
    )
    dtypes = {}
    if w_router.dtype == torch.float32 != norm_D.dtype:
        dtypes = {"x_dtype": norm_D.dtype, "out_dtype": torch.float32}
    router = Router(
        dense=ops.linear(w_router, router_bias, **dtypes),
        route=ops.route,
        route_and_count=ops.route_and_count,
        routing=routing,
        bias_E=choice_bias,
    )
    block = None
    if alone and latent is None and isinstance(all_to_alls[0], ReferenceAllToAll):  # others may round rows
        weights = MoeWeights(
            router=router.dense,
            routing=routing,
            choice_bias=choice_bias,
            experts=grouped_mlp,
            shared=shared,
            norm_D=norm_D,
            eps=eps,
            log2phy_E=log2phy_QE[0],
        )
        block = ops.moe_block(weights)
    load_E = torch.zeros(placement.num_logical, dtype=torch.int64, device=w_router.device)
    return MoeLayer(
        ops=ops,
        router=router,
        experts=grouped_mlp,
        shared=shared,
        latent=latent,
        norm=norm_D,
        eps=eps,
        all_to_alls=tuple(all_to_alls),
        log2phy_QE=None if alone and ops.on_device else log2phy_QE,
        load_E=load_E if ops.on_device else load_E.numpy(),
        block=block,
        exchange_tokens=exchange_tokens,
    )


def _expected(placement: Placement, rank: int, top_k: int) -> float:
    """Return the share of the rows a rank could receive that it receives if all experts get equally many."""
    here = placement.rank_offsets[rank + 1] - placement.rank_offsets[rank]
    return top_k * here / placement.num_physical / min(top_k, here)
