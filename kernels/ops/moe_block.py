"""MoE block: router, experts, weighted sum and the RMS norm behind them, of a rank that holds all experts.

    ids, weights = route(router(normed));  sum = x + combine(experts(normed, ids), weights);  y = rms_norm(sum)

Where tokens travel between ranks, `moe.layer.MoeLayer` composes the plain ops around an all-to-all. Where they do
not, a device may run the whole block in one call (`Ops.fuse_moe`), with the same bits.

T tokens, D model width, E logical experts, F width of a dense MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from expertwire.kernels.ops.experts import GroupedMlp, SiluMul
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.sigmoid_mul import SigmoidMul
from expertwire.kernels.ops.variants import Routing


@dataclass(frozen=True, kw_only=True)
class DenseMlp:
    """An MLP for every token, [T, D] to [T, D]: a layer's second half, or a shared expert.

    Attributes:
        up: to [T, 2F], gates before what they gate, or, without `silu_mul`, to [T, F], of which positive numbers are squared.
        gate: to [T, 1], by whose sigmoid the output is multiplied, or None.
    """

    up: Linear
    down: Linear
    silu_mul: SiluMul | None
    gate: Linear | None
    sigmoid_mul: SigmoidMul

    def __call__(self, x_TD: Tensor, /) -> Tensor:
        """Return the output, as a `Linear`."""
        up_TF = self.up(x_TD)
        y_TD = self.down(up_TF.relu_().square_() if self.silu_mul is None else self.silu_mul(up_TF))
        return y_TD if self.gate is None else self.sigmoid_mul(y_TD[:, None], self.gate(x_TD)[:, None])[:, 0]


@dataclass(frozen=True, kw_only=True)
class MoeWeights:
    """Prepared weights and options of a block.

    Attributes:
        router: to E logits.
        choice_bias: fp32 [E], added to scores for the choice of experts, or None.
        shared: the shared expert, or None.
        norm_D, eps: of the norm behind the block.
        log2phy_E: i64, each logical expert's physical one.
    """

    router: Linear
    routing: Routing
    choice_bias: Tensor | None
    experts: GroupedMlp
    shared: DenseMlp | None
    norm_D: Tensor
    eps: float
    log2phy_E: Tensor


class MoeBlock(Protocol):
    """A block of one layer."""

    def __call__(self, x_TD: Tensor, normed_TD: Tensor, load_E: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the residual sum and its norm, [T, D] each; add the routed rows of each logical expert to `load_E`."""
        ...


class FuseMoe(Protocol):
    """A device's own MoE block."""

    def __call__(self, weights: MoeWeights) -> MoeBlock | None:
        """Return None where it does not support these weights."""
        ...
