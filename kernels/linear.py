"""Dense linear layer: `y_TN = x_TD @ w_ND^T`.

T tokens, D input width, N output width.

A weight is *prepared* once, after loading, for the device it lives on, and called many times. On a CPU that is a oneDNN weight
in the blocked layout that its kernels read without repacking (half the memory traffic of a plain weight at few tokens).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]  # x_TD -> y_TN


def reference(x_TD: Tensor, w_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x @ w^T + bias`, accumulated in fp32 and rounded once to x's dtype."""
    y_TN = x_TD.float() @ w_ND.float().T
    return (y_TN if bias_N is None else y_TN + bias_N.float()).to(x_TD.dtype)


def prepare(w_ND: Tensor, bias_N: Tensor | None = None) -> Linear:
    """A callable that applies `w_ND` (fp32 or bf16). The caller gives `w_ND` up: on a CPU only the packed copy is kept."""
    if w_ND.device.type != "cpu":
        return lambda x_TD: F.linear(x_TD, w_ND, bias_N)
    return _packed(torch.ops.mkldnn._reorder_linear_weight(w_ND.contiguous()), w_ND.shape[0], bias_N)


def _packed(weight: Tensor, num_outputs: int, bias_N: Tensor | None) -> Linear:
    linear_pointwise = torch.ops.mkldnn._linear_pointwise.default

    def apply(x_TD: Tensor) -> Tensor:
        if x_TD.shape[0] == 0:  # oneDNN has no empty products
            return x_TD.new_empty(0, num_outputs)
        return linear_pointwise(x_TD, weight, bias_N, "none", (), "")

    return apply
