"""Choice of experts: softmax over all experts, the K largest, weights divided by their sum if the model says so.

T tokens, E experts, K chosen. Gating is in fp32 whatever the activations are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(logits_TE: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Expert ids i64 [T, K] and weights fp32 [T, K], in descending order of weight."""
    weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK
