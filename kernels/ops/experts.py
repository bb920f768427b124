"""Grouped expert MLP (grouped GEMM): rows sorted by expert, each through its expert's MLP.

    y = w2 @ (silu(w1 x) * (w3 x)),   w13 = [w1; w3]

Routed row r reads `x_UD[row_index_R[r]]`; expert e's rows are `offsets[e] : offsets[e + 1]`. Rows are rounded to the
activation dtype after each product.

U distinct rows, R routed rows, N any rows, D model width, F expert width, e experts of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.formats import QuantizedWeight, Weight, dequantize
from expertwire.kernels.ops import linear
from expertwire.kernels.ops.permute import TileMap
from expertwire.kernels.ops.variants import SWIGLU, Activation


@dataclass(frozen=True, eq=False)
class GroupedMlpWeights:
    """The weights of a layer's experts on this rank; quantised ones stay as they are in memory.

    Attributes:
        w13: [e, 2F, D], gate rows over up rows, or [e, F, D] without a gate.
        w2: [e, D, F].
        bias13_eF, bias2_eD: added to the products, or None.
    """

    w13: Weight
    w2: Weight
    activation: Activation = SWIGLU
    bias13_eF: Tensor | None = None
    bias2_eD: Tensor | None = None


class GroupedMlp(Protocol):
    """The prepared experts of a layer."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Return all tensors [e, ...] that a call reads, contiguous; moved experts are written into them."""
        ...

    def __call__(
        self,
        x_UD: Tensor,
        row_index_R: Tensor,
        offsets: np.ndarray | Tensor,
        home_R: Tensor | None = None,
        tile_map: TileMap | None = None,
    ) -> Tensor:
        """Return y_RD of rows sorted by expert, with `offsets` [e + 1].

        On a CPU `row_index_R` and `offsets` are i64, the latter on the host, and rows stay in order. On a GPU all
        are i32 on the device, row r is written to place `home_R[r]`, the last offset may be less than R, and the
        rows' tiles may be given.
        """
        ...


class PrepareExperts(Protocol):
    """Preparation of a layer's experts."""

    def __call__(self, weights: GroupedMlpWeights, *, expected: float = 1.0, overlapped: bool = False) -> GroupedMlp:
        """Prepare weights.

        `expected`: the share of R that holds rows under even routing, where the device counts rows. `overlapped`: an
        all-to-all runs at the same time on a GPU.
        """
        ...


class SiluMul(Protocol):
    """Gating of an MLP."""

    def __call__(self, gate_up_NF: Tensor, /) -> Tensor:
        """Return `silu(gate) * up` [N, F] of [N, 2F], gate columns first."""
        ...


def silu_mul_reference(gate_up_NF: Tensor) -> Tensor:
    """Return `silu(gate) * up` of [N, 2F], both factors rounded to the dtype."""
    gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def reference(x_UD: Tensor, row_index_R: Tensor, offsets: np.ndarray, w13_eFD: Tensor, w2_eDF: Tensor) -> Tensor:
    """Loop over experts; w13 [e, 2F, D], w2 [e, D, F]; return [R, D] in x's dtype."""
    y_RD = x_UD.new_empty(len(row_index_R), x_UD.shape[1])
    for e, (start, end) in enumerate(pairwise(offsets.tolist())):
        hidden = silu_mul_reference(linear.reference(x_UD[row_index_R[start:end]], w13_eFD[e]))
        y_RD[start:end] = linear.reference(hidden, w2_eDF[e])
    return y_RD


def activation_reference(product_NF: Tensor, activation: Activation) -> Tensor:
    """Return fp32 [N, F] of fp32 [N, 2F], gate columns first, or of [N, F] without a gate."""
    if activation.kind == "relu2":
        return product_NF.relu().square()
    gate_NF, up_NF = product_NF.chunk(2, dim=-1)
    if activation.kind == "swiglu":
        return F.silu(gate_NF) * up_NF
    gate_NF, up_NF = gate_NF.clamp(max=activation.limit), up_NF.clamp(-activation.limit, activation.limit)
    return gate_NF * torch.sigmoid(activation.alpha * gate_NF) * (up_NF + 1)


def gate_reference(gate_up_NF: Tensor, activation: Activation) -> Tensor:
    """Return `gate * sigmoid(alpha * gate)`, rounded to the dtype, times `up + offset`, rounded; both clamped first."""
    alpha, limit, offset = activation.gating
    gate_NF, up_NF = gate_up_NF.float().chunk(2, dim=-1)
    gate_NF, up_NF = gate_NF.clamp(max=limit), up_NF.clamp(-limit, limit) + offset
    silu_NF = (gate_NF * torch.sigmoid(alpha * gate_NF)).to(gate_up_NF.dtype)
    return (silu_NF.float() * up_NF).to(gate_up_NF.dtype)


def w13_reference(
    x_UD: Tensor,
    row_index_R: Tensor,
    expert_offsets: Tensor,
    w13_eFD: Tensor,
    activation: Activation,
    bias_eF: Tensor | None = None,
) -> Tensor:
    """Return the hidden layer [R, F] in x's dtype, rounded once.

    w13 [e, 2F, D] has gate rows over up rows, or [e, F, D] without a gate. As on a GPU, offsets are on the device, and
    rows from the last offset on are undefined (here: zero).
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
    out_ND: Tensor,
    bias_eD: Tensor | None = None,
) -> Tensor:
    """Write each routed row's product into row `home_R` of `out` [N, D], rounded to its dtype; return `out`."""
    for e, (start, end) in enumerate(pairwise(expert_offsets.tolist())):
        product = hidden_RF[start:end].float() @ w2_eDF[e].float().T
        if bias_eD is not None:
            product += bias_eD[e].float()
        out_ND[home_R[start:end].long()] = product.to(out_ND.dtype)
    return out_ND


@dataclass(frozen=True, eq=False)
class LibraryExperts:
    """`GroupedMlp` with torch's GEMM, one expert at a time; quantised experts are dequantised when used."""

    mlp: GroupedMlpWeights
    silu_mul: SiluMul

    @property
    def weights(self) -> tuple[Tensor, ...]:
        w = self.mlp
        biases = tuple(bias for bias in (w.bias13_eF, w.bias2_eD) if bias is not None)
        return tensors_of(w.w13) + tensors_of(w.w2) + biases

    def __call__(
        self,
        x_UD: Tensor,
        row_index_R: Tensor,
        offsets: np.ndarray | Tensor,
        home_R: Tensor | None = None,
        tile_map: TileMap | None = None,
    ) -> Tensor:
        assert isinstance(offsets, np.ndarray), "the host counts rows"
        assert home_R is None, "rows stay in order"
        assert tile_map is None, "rows are not in tiles"
        w = self.mlp
        x_RD, y_RD = x_UD.index_select(0, row_index_R), x_UD.new_empty(len(row_index_R), x_UD.shape[1])
        for e, (start, end) in enumerate(pairwise(offsets.tolist())):
            if start < end:
                gate_up = linear.library(x_RD[start:end], *_layer(w.w13, w.bias13_eF, e, x_UD.dtype))
                y_RD[start:end] = linear.library(self._gated(gate_up), *_layer(w.w2, w.bias2_eD, e, x_UD.dtype))
        return y_RD

    def _gated(self, gate_up_NF: Tensor) -> Tensor:
        activation = self.mlp.activation
        if not activation.gated:
            return gate_up_NF.relu_().square_()
        if activation.kind == "swiglu":
            return self.silu_mul(gate_up_NF)
        return gate_reference(gate_up_NF, activation)


def tensors_of(weight: Weight) -> tuple[Tensor, ...]:
    return weight.tensors if isinstance(weight, QuantizedWeight) else (weight,)


def _layer(weight: Weight, bias_eN: Tensor | None, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    matrix = dequantize(weight.expert(e) if isinstance(weight, QuantizedWeight) else weight[e], dtype)
    return matrix, None if bias_eN is None else bias_eN[e].to(dtype)


def prepare(
    weights: GroupedMlpWeights,
    *,
    expected: float = 1.0,
    overlapped: bool = False,
    silu_mul: SiluMul = silu_mul_reference,
) -> LibraryExperts:
    """As `PrepareExperts`, with `linear.library`; the host counts rows."""
    return LibraryExperts(weights, silu_mul)
