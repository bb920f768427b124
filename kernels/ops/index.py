"""Indexer of sparse attention: the positions that a query attends to (DeepSeek-V3.2, 2025).

A token has one index key, k = rotate(layer_norm(W x)), d numbers in a cache of its own, and an index query with
a weight for each of H heads. A query scores a position by

    score = sum over h of w_h * relu(q_h . k)

and attends to the `top_k` positions up to its own with the highest scores; of equal ones, the first. They are
returned in ascending order, in which attention reads them, so a query that sees at most `top_k` positions needs no
scores. Constant factors (d^-0.5, H^-0.5) are in w. The first numbers of a head are rotated, in halves in
DeepSeek-V3.2, interleaved in GLM-5.

T tokens, H heads of the index queries, d their size, S sequences, B blocks, Y cached positions of a sequence.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.attention import AttentionMetadata, each_sequence
from expertwire.kernels.ops.rotary import RopeInputs, rotate_at


class RopeAndCacheIndex(Protocol):
    """Normalisation, rotary embedding and cache write; see `rope_and_cache`."""

    def __call__(
        self,
        q_THd: Tensor,
        k_Td: Tensor,
        norm: tuple[Tensor, Tensor],
        eps: float,
        rope: RopeInputs,
        index_cache: Tensor,
    ) -> Tensor:
        """Return the rotated index queries [T, H, d]; write the cache."""
        ...


class ChoosePositions(Protocol):
    """See `reference`."""

    def __call__(
        self, q_THd: Tensor, weights_TH: Tensor, index_cache: Tensor, seqs: AttentionMetadata, top_k: int
    ) -> Tensor:
        """Return i64 [T, top_k]."""
        ...


def reference(q_THd: Tensor, weights_TH: Tensor, index_cache: Tensor, seqs: AttentionMetadata, top_k: int) -> Tensor:
    """Choose for one query at a time in fp32; index_cache [B, block_size, d].

    Returns:
        i64 [T, top_k]: positions in ascending order, padded with -1 where a query sees fewer.
    """
    chosen_Tk = torch.full((len(q_THd), top_k), -1, device=q_THd.device)
    for b, start, end, length in each_sequence(seqs):
        for row in range(start, end):
            keys_Yd = index_cache[seqs.block_table[b]].flatten(0, 1)[: length - (end - 1 - row)].float()
            scores_Y = (q_THd[row].float() @ keys_Yd.T).relu().T @ weights_TH[row].float()
            best = scores_Y.sort(descending=True, stable=True).indices[:top_k]
            chosen_Tk[row, : len(best)] = best.sort().values
    return chosen_Tk


def rope_and_cache(
    q_THd: Tensor,
    k_Td: Tensor,
    norm: tuple[Tensor, Tensor],
    eps: float,
    rope: RopeInputs,
    index_cache: Tensor,
) -> Tensor:
    """Normalise the index key, rotate it and the index queries, and store the key in the cache.

    Args:
        q_THd: index queries.
        k_Td: index keys W x.
        norm: weights and biases [d] of the keys' layer norm.
        eps: of the norm.
        rope: of the first r <= d numbers of a head; a token with a negative slot is not stored.
        index_cache: [B, block_size, d], written.

    Returns:
        q_THd, rotated.
    """
    dtype, (weight_d, bias_d) = q_THd.dtype, (tensor.float() for tensor in norm)
    k_T1d = F.layer_norm(k_Td.float(), weight_d.shape, weight_d, bias_d, eps).unsqueeze(1)
    q_THd, k_T1d = (
        torch.cat((rotate_at(x[..., : rope.size].float(), rope), x[..., rope.size :].float()), -1)
        for x in (q_THd, k_T1d)
    )
    rows, stored_T1 = index_cache.flatten(0, 1), (rope.slot_mapping_T >= 0)[:, None]
    # Without reading back which tokens are stored: the others rewrite the null block's row 0 with itself.
    k_Td = torch.where(stored_T1, k_T1d[:, 0].to(rows.dtype), rows[0])
    rows.index_copy_(0, rope.slot_mapping_T.clamp(min=0), k_Td)
    return q_THd.to(dtype)


def choose_positions(
    q_THd: Tensor, weights_TH: Tensor, index_cache: Tensor, seqs: AttentionMetadata, top_k: int
) -> Tensor:
    """As `reference`, one sequence at a time."""
    outputs = [torch.empty(0, top_k, dtype=torch.int64, device=q_THd.device)]
    for b, start, end, length in each_sequence(seqs):
        some = slice(start, end)
        keys_Yd = index_cache[seqs.block_table[b]].flatten(0, 1)[:length]
        last_T = torch.arange(length - (end - start), length, device=q_THd.device)
        outputs.append(_best(_scores(q_THd[some], weights_TH[some], keys_Yd), last_T, top_k))
    return torch.cat(outputs)


def _scores(q_THd: Tensor, weights_TH: Tensor, keys_Yd: Tensor) -> Tensor:
    """Return [T, Y]."""
    products_THY = (q_THd.float() @ keys_Yd.float().T).relu()
    return (weights_TH.float()[:, None] @ products_THY)[:, 0]


def _best(scores_TY: Tensor, last_T: Tensor, top_k: int) -> Tensor:
    """Return [T, top_k], the best positions up to each token's `last_T`, ascending, padded with -1."""
    length = scores_TY.shape[1]
    hidden = torch.arange(length, device=scores_TY.device) > last_T[:, None]
    order_TY = scores_TY.masked_fill(hidden, float("-inf")).sort(descending=True, stable=True).indices[:, :top_k]
    # Hidden positions come last by score and, being later ones, also when positions are sorted.
    order_TY = order_TY.sort(1).values
    return F.pad(torch.where(order_TY <= last_T[:, None], order_TY, -1), (0, top_k - order_TY.shape[1]), value=-1)
