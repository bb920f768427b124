"""Specification of a mixture-of-experts layer: a loop over experts in fp32, with the roundings of the contract.

Expert rows are rounded to the activation dtype before they are weighted; weights are applied in fp32, in top-k
order; the shared expert's output is added last. Every all-to-all backend and every grouped GEMM is tested against
this.

T tokens, K experts a token, D model width, F expert width, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expertwire.kernels.ops import combine, experts


def moe(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, shared_TD: Tensor | None = None
) -> Tensor:
    """Return y [T, D] in x's dtype; ids i64 (-1: none), weights fp32, w13 [E, 2F, D], w2 [E, D, F]."""
    num_tokens, top_k = ids_TK.shape
    rows_TKD = x_TD.new_zeros(num_tokens, top_k, x_TD.shape[1])
    for e in range(w13_EFD.shape[0]):
        tokens, ks = torch.nonzero(ids_TK == e, as_tuple=True)
        rows_TKD[tokens, ks] = experts.reference(
            x_TD, tokens, np.array([0, len(tokens)]), w13_EFD[e : e + 1], w2_EDF[e : e + 1]
        )
    y_TD = combine.reference(rows_TKD, weights_TK)
    return y_TD if shared_TD is None else y_TD + shared_TD
