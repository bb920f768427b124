"""Multi-head latent attention in absorbed form (DeepSeek-V2, 2024): the cache holds one compressed row a token.

A token's keys and values of all heads come from one latent vector, c = norm(W_a x)[:C], and a rotated part of the key that
the heads share, k = rotate(W_a x [C:]):

    key of head h    = [U_h c | k]      score = scale * (q_h . U_h c + p_h . k)      p_h the rotated part of the query
    value of head h  = V_h c            output_h = sum of softmax(score) * V_h c

Absorbed: q_h . U_h c = (U_h^T q_h) . c, and the sum goes before V_h, so that attention is that of H query heads on one shared key
[c | k] of l = C + r numbers, whose first C numbers are the value too; what it returns is still to be multiplied by V_h. Decode
and prefill take this form alike, so that they round alike.

`scale` is (size of [q_h | p_h])^-0.5, times a square of a factor with YaRN: not l^-0.5, hence an argument.

T tokens, H heads, C latent size (512), r rotated size (64), l = C + r, s block size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.attention import PagedSequences, visible
from expertwire.kernels.rotary import rotate_at


def reference(
    q_THl: Tensor,
    cache: Tensor,
    seqs: PagedSequences,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
) -> Tensor:
    """One query at a time in fp32.

    Args:
        q_THl: [U_h^T q_h | p_h].
        cache: [blocks, s, l].
        seqs: as in `attention.reference`.
        rank: C.
        scale: of the scores; above 0.
        chosen: i64 [T, k], the positions that a query sees, each once and none behind its own; -1 fills up. None: all.

    Returns:
        [T, H, C].
    """
    out_THC = q_THl.new_empty(*q_THl.shape[:2], rank)
    for b, table in enumerate(seqs.block_table):
        start, end = seqs.cu_queries[b], seqs.cu_queries[b + 1]
        for row in range(start, end):
            rows_Ll = cache[table].flatten(0, 1)[: seqs.lengths[b] - (end - 1 - row)].float()
            if chosen is not None:
                rows_Ll = rows_Ll[chosen[row][chosen[row] >= 0]]
            weights_HL = (q_THl[row].float() @ rows_Ll.T * scale).softmax(-1)
            out_THC[row] = (weights_HL @ rows_Ll[:, :rank]).to(q_THl.dtype)
    return out_THC


def rotate_and_store(
    q_THr: Tensor,
    kv_Tl: Tensor,
    norm_C: Tensor,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    cache: Tensor,
    *,
    interleaved: bool = True,
) -> Tensor:
    """What lies between the projections and the attention.

    Args:
        q_THr: the queries' parts that are rotated.
        kv_Tl: W_a x.
        norm_C: weights of the latent's RMS norm.
        eps: of the norm.
        tables: `rotary.tables` for r dimensions.
        positions_T: i64.
        slot_mapping_T: i64, block * s + offset.
        cache: [blocks, s, l], written.
        interleaved: which pairs are rotated, as in `attention.rotate_and_store`.

    Returns:
        q_THr, rotated.
    """
    rank = norm_C.shape[0]
    latent_TC = F.rms_norm(kv_Tl[:, :rank].float(), (rank,), None, eps) * norm_C.float()
    parts = kv_Tl[:, rank:].unsqueeze(1), q_THr
    k_T1r, q_THr = (rotate_at(part.float(), tables, positions_T, interleaved).to(part.dtype) for part in parts)
    row_Tl = torch.cat((latent_TC.to(kv_Tl.dtype), k_T1r[:, 0]), -1)
    cache.flatten(0, 1).index_copy_(0, slot_mapping_T, row_Tl)
    return q_THr


def attend(
    q_THl: Tensor,
    cache: Tensor,
    seqs: PagedSequences,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
) -> Tensor:
    """As `reference`, one sequence at a time."""
    outputs = [q_THl.new_empty(0, q_THl.shape[1], rank)]
    for b, length in enumerate(seqs.lengths.tolist()):
        some = slice(seqs.cu_queries[b], seqs.cu_queries[b + 1])
        q_HTl = q_THl[some].transpose(0, 1).float()
        rows_Ll = cache[seqs.block_table[b]].flatten(0, 1)[:length].float()
        mask_TL = visible(q_HTl.shape[1], 0, length, 0, 0, cache.device)
        if chosen is not None:
            counts_TL = torch.zeros(len(mask_TL), length + 1, device=cache.device)
            mask_TL = counts_TL.scatter_(1, chosen[some] % (length + 1), 1.0)[:, :-1].bool()
        weights_HTL = (q_HTl @ rows_Ll.T * scale).masked_fill(~mask_TL, float("-inf")).softmax(-1)
        outputs.append((weights_HTL @ rows_Ll[:, :rank]).transpose(0, 1).to(q_THl.dtype))
    return torch.cat(outputs)
