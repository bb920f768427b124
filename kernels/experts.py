"""Grouped expert MLP: rows sorted by expert, each through its expert's `w2 @ (silu(w1 x) * (w3 x))`.

N routed rows, D model width, F expert width, e local experts. `w13` is w1 over w3. Expert e's rows are
`offsets[e] : offsets[e + 1]`. Rows are rounded to the activation dtype after each product, as the model's layers are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels import linear

# (x_ND sorted by expert, offsets of e + 1 integers) -> y_ND
GroupedMlp = Callable[[Tensor, Sequence[int]], Tensor]


def silu_mul_reference(gate_up_NF: Tensor) -> Tensor:
    """`silu(gate) * up` of [N, 2F], each rounded to the dtype."""
    gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def reference(x_ND: Tensor, offsets: Sequence[int], w13_eFD: Tensor, w2_eDF: Tensor) -> Tensor:
    """A loop over experts; w13 [e, 2F, D], w2 [e, D, F]; returns [N, D] in x's dtype."""
    y_ND = torch.empty_like(x_ND)
    for e, (start, end) in enumerate(pairwise(offsets)):
        hidden = silu_mul_reference(linear.reference(x_ND[start:end], w13_eFD[e]))
        y_ND[start:end] = linear.reference(hidden, w2_eDF[e])
    return y_ND


def prepare(w13_eFD: Tensor, w2_eDF: Tensor, silu_mul: Callable[[Tensor], Tensor]) -> GroupedMlp:
    """A callable for these weights, as `linear.prepare` makes one."""
    if not (linear.few_rows_apart(w13_eFD) and linear.few_rows_apart(w2_eDF)):
        return lambda x_ND, offsets: _by_expert(x_ND, offsets, w13_eFD, w2_eDF, silu_mul, 0, torch.empty_like(x_ND))
    from expertwire.kernels.cpu import gemm

    few, apply_few = gemm.few(w13_eFD.dtype), gemm.prepare_experts(w13_eFD, w2_eDF)

    def apply(x_ND: Tensor, offsets: Sequence[int]) -> Tensor:
        y_ND = torch.empty_like(x_ND)
        if apply_few(x_ND, offsets, y_ND):
            return y_ND
        return _by_expert(x_ND, offsets, w13_eFD, w2_eDF, silu_mul, few, y_ND)

    return apply


def _by_expert(
    x_ND: Tensor,
    offsets: Sequence[int],
    w13_eFD: Tensor,
    w2_eDF: Tensor,
    silu_mul: Callable[[Tensor], Tensor],
    more_than: int,
    y_ND: Tensor,
) -> Tensor:
    """The library's products, one expert after another, for those with more rows than `more_than`."""
    for e, (start, end) in enumerate(pairwise(offsets)):
        if end - start > more_than:
            # Rows of the experts behind are as good a padding as any.
            padded_end = min(start + linear.padded_rows(end - start), len(x_ND))
            hidden = silu_mul(linear.library(x_ND[start:padded_end], w13_eFD[e]))
            y_ND[start:end] = linear.library(hidden, w2_eDF[e])[: end - start]
    return y_ND
