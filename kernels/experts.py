"""Grouped expert MLP: rows sorted by expert, each through its expert's `w2 @ (silu(w1 x) * (w3 x))`.

U rows, R routed rows, N rows of any kind, D model width, F expert width, e local experts. `w13` is w1 over w3. Routed row r
reads `x_UD[row_index_R[r]]`; expert e's rows are `offsets[e] : offsets[e + 1]`. Rows are rounded to the activation dtype after
each product, as the model's layers are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels import linear
from expertwire.kernels.permute import TileMap

# (x_UD, row_index_R sorted by expert, offsets [e + 1], home_R or None, tile_map or None) -> y_RD: either row_index and offsets
# are i64, the latter on the host, and rows stay in order; or, on a GPU, all is i32 on the device, row r goes to place home_R[r],
# there may be fewer rows than R, and their tiles may be known.
GroupedMlp = Callable[[Tensor, Tensor, np.ndarray | Tensor, Tensor | None, TileMap | None], Tensor]


class Fused(Protocol):
    """A layer whose experts are all here, with its router and the norm behind it, in one call: the ops' bits, fewer calls."""

    def __call__(self, x_TD: Tensor, normed_TD: Tensor, load_E: np.ndarray) -> tuple[Tensor, Tensor]:
        """x plus the experts' mixture of its norm, and the norm of that. Adds the rows of each logical expert to `load_E`."""
        ...


def silu_mul_reference(gate_up_NF: Tensor) -> Tensor:
    """`silu(gate) * up` of [N, 2F], each rounded to the dtype."""
    gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def reference(x_UD: Tensor, row_index_R: Tensor, offsets: np.ndarray, w13_eFD: Tensor, w2_eDF: Tensor) -> Tensor:
    """A loop over experts; w13 [e, 2F, D], w2 [e, D, F]; returns [R, D] in x's dtype."""
    y_RD = x_UD.new_empty(len(row_index_R), x_UD.shape[1])
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        hidden = silu_mul_reference(linear.reference(x_UD[row_index_R[start:end]], w13_eFD[e]))
        y_RD[start:end] = linear.reference(hidden, w2_eDF[e])
    return y_RD


@dataclass(frozen=True)
class Activation:
    """What lies between the two products of an expert.

    "swiglu": `silu(gate) * up`. "swiglu_clamped" (gpt-oss): gate clamped above at `limit`, up on both sides, then
    `gate * sigmoid(alpha * gate) * (up + 1)`. "relu2": `max(up, 0) ** 2`, without a gate.
    """

    kind: str = "swiglu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        kinds = ("swiglu", "swiglu_clamped", "relu2")
        if self.kind not in kinds:
            raise ValueError(f"Activation.kind is {self.kind!r}, must be one of {kinds}")

    @property
    def gated(self) -> bool:
        return self.kind != "relu2"


def activation_reference(product_NF: Tensor, activation: Activation) -> Tensor:
    """fp32 [N, 2F], gate columns before up columns, or [N, F] without a gate -> fp32 [N, F]."""
    if activation.kind == "relu2":
        return product_NF.relu().square()
    gate_NF, up_NF = product_NF.chunk(2, dim=-1)
    if activation.kind == "swiglu":
        return F.silu(gate_NF) * up_NF
    gate_NF, up_NF = gate_NF.clamp(max=activation.limit), up_NF.clamp(-activation.limit, activation.limit)
    return gate_NF * torch.sigmoid(activation.alpha * gate_NF) * (up_NF + 1)


def w13_reference(
    x_UD: Tensor,
    row_index_R: Tensor,
    expert_offsets: Tensor,
    w13_eFD: Tensor,
    activation: Activation,
    bias_eF: Tensor | None = None,
) -> Tensor:
    """The hidden layer [R, F] in x's dtype, rounded once; w13 [e, 2F, D], gate rows over up rows, or [e, F, D] without a gate.

    As on a GPU, the offsets lie on the device, and rows behind the last offset are undefined (here: zero).
    """
    columns = w13_eFD.shape[1] // (2 if activation.gated else 1)
    hidden_RF = x_UD.new_zeros(len(row_index_R), columns)
    for e, (start, end) in enumerate(pairwise(expert_offsets.tolist())):
        product = x_UD[row_index_R[start:end].long()].float() @ w13_eFD[e].float().T
        if bias_eF is not None:
            product += bias_eF[e].float()
        hidden_RF[start:end] = activation_reference(product, activation).to(x_UD.dtype)
    return hidden_RF


def w2_reference(
    hidden_RF: Tensor,
    expert_offsets: Tensor,
    w2_eDF: Tensor,
    home_R: Tensor,
    out_SD: Tensor,
    bias_eD: Tensor | None = None,
) -> Tensor:
    """Each routed row's product, rounded to the dtype of `out`, into its slot `home_R` of `out` [S, D]; the rest stays."""
    for e, (start, end) in enumerate(pairwise(expert_offsets.tolist())):
        product = hidden_RF[start:end].float() @ w2_eDF[e].float().T
        if bias_eD is not None:
            product += bias_eD[e].float()
        out_SD[home_R[start:end].long()] = product.to(out_SD.dtype)
    return out_SD


def prepare(w13_eFD: Tensor, w2_eDF: Tensor, silu_mul: Callable[[Tensor], Tensor]) -> GroupedMlp:
    """A callable for these weights, as `linear.prepare` makes one."""
    if linear.is_packed(w13_eFD) and linear.is_packed(w2_eDF):
        from expertwire.kernels.cpu import gemm

        return gemm.pack_experts(w13_eFD, w2_eDF)

    def apply(
        x_UD: Tensor,
        row_index_R: Tensor,
        offsets: np.ndarray | Tensor,
        home_R: Tensor | None = None,
        tile_map: TileMap | None = None,
    ) -> Tensor:
        assert isinstance(offsets, np.ndarray), "here the host counts rows"
        assert home_R is tile_map is None, "and they stay in order"
        x_RD, y_RD = x_UD.index_select(0, row_index_R), x_UD.new_empty(len(row_index_R), x_UD.shape[1])
        for e, (start, end) in enumerate(pairwise(offsets.tolist())):
            hidden = silu_mul(linear.library(x_RD[start:end], w13_eFD[e]))
            y_RD[start:end] = linear.library(hidden, w2_eDF[e])
        return y_RD

    return apply


def fuse(
    router: linear.Linear,
    experts: GroupedMlp,
    norm_D: Tensor,
    physical_of_E: Tensor,
    *,
    top_k: int,
    renormalize: bool,
    eps: float,
) -> Fused | None:
    """Of a prepared router and experts, where there is an implementation."""
    from expertwire.kernels.cpu import fused, gemm  # numba is slow to import and of no use elsewhere

    if not (isinstance(router, gemm.PackedLinear) and isinstance(experts, gemm.PackedExperts)):
        return None
    return fused.MoeAndNorm(router, experts, norm_D, physical_of_E, top_k=top_k, renormalize=renormalize, eps=eps)
