"""Choice of experts: softmax over all experts, the K largest, weights divided by their sum if the model says so.

T tokens, D model width, E experts, K chosen. Gating is in fp32 whatever the activations are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertwire.kernels import linear

Router = Callable[[Tensor], tuple[Tensor, Tensor]]  # x_TD -> ids_TK, weights_TK


def reference(logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Expert ids i64 [T, K] and weights fp32 [T, K], in descending order of weight."""
    weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK


def prepare(w_ED: Tensor, top_k: int, route: Callable[..., tuple[Tensor, Tensor]], *, renormalize: bool) -> Router:
    """The product with `w_ED`, then `route`, an implementation of `reference`."""
    dense = linear.prepare(w_ED)
    return lambda x_TD: route(dense(x_TD), top_k, renormalize=renormalize)
