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

# From this many rows an expert on, each expert's activations are computed apart so that they stay in the cache.
_ROWS_APART = 32


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
    """A callable for these weights. The caller gives them up, as for `linear.prepare`."""
    w13 = [linear.prepare(w) for w in w13_eFD.unbind(0)]
    w2 = [linear.prepare(w) for w in w2_eDF.unbind(0)]

    def apply(x_ND: Tensor, offsets: Sequence[int]) -> Tensor:
        busy = [e for e in range(len(w13)) if offsets[e] < offsets[e + 1]]
        if not busy:
            return torch.empty_like(x_ND)
        sizes = [offsets[e + 1] - offsets[e] for e in busy]
        rows = x_ND.split(sizes)
        if len(x_ND) >= _ROWS_APART * len(busy):
            return torch.cat([w2[e](silu_mul(w13[e](x))) for e, x in zip(busy, rows, strict=True)])
        hidden = silu_mul(torch.cat([w13[e](x) for e, x in zip(busy, rows, strict=True)]))
        return torch.cat([w2[e](h) for e, h in zip(busy, hidden.split(sizes), strict=True)])

    return apply
