"""Multi-head latent attention (DeepSeek-V2, 2024): the cache holds one compressed row a token.

A token's keys and values of all heads come from one latent vector, c = norm(W_a x)[:C], and a rotated part of the key that
the heads share, k = rotate(W_a x [C:]):

    key of head h    = [U_h c | k]      score = scale * (q_h . U_h c + p_h . k)      p_h the rotated part of the query
    value of head h  = V_h c            output_h = sum of softmax(score) * V_h c

Absorbed: q_h . U_h c = (U_h^T q_h) . c, and the sum goes before V_h, so that attention is that of H query heads on one shared key
[c | k] of l = C + r numbers, whose first C numbers are the value too; what it returns is still to be multiplied by V_h. Decode
and prefill take this form alike, so that they round alike.

Expanded: keys and values of all heads are made again, of n + r and v numbers instead of l and C. That pays where a sequence has
about as many queries as keys, and rounds otherwise: it is for prompts of the numerics mode "fast".

`scale` is (size of [q_h | p_h])^-0.5, times a square of a factor with YaRN: not l^-0.5, hence an argument.

A cache may be fp8, as in `attention`, with one scale for the whole row: `kv_scale`.

T tokens, H heads, C latent size (512), r rotated size (64), l = C + r, n and v sizes of a head's key without r and of its value
(128), d = n + r, s block size, X rows of the cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.attention import FP8, Attend, AttentionMetadata, as_bytes, each_sequence, quantize, visible
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.rotary import rotate_at

_WORTH = 2  # most keys made for a query


class RopeAndCacheLatent(Protocol):
    """What lies between the projections and attention; see `rope_and_cache`."""

    def __call__(
        self,
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
        out: Tensor | None = None,
        kv_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the rotated parts of queries [T, H, r]; write the cache."""
        ...


class AttendLatent(Protocol):
    """Absorbed attention of a step; see `reference`."""

    def __call__(
        self,
        q_THl: Tensor,
        cache: Tensor,
        seqs: AttentionMetadata,
        *,
        rank: int,
        scale: float,
        chosen: Tensor | None = None,
        kv_scale: Tensor | None = None,
    ) -> Tensor:
        """Return [T, H, C]. `seqs` as for `attention.Attend`."""
        ...


def reference(
    q_THl: Tensor,
    cache: Tensor,
    seqs: AttentionMetadata,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """One query at a time in fp32.

    Args:
        q_THl: [U_h^T q_h | p_h].
        cache: [blocks, s, l].
        seqs: as in `attention.reference`.
        rank: C.
        scale: of the scores; above 0.
        chosen: i64 [T, k], the positions that a query sees, each once and none behind its own; -1 fills up. None: all.
        kv_scale: fp32 [1], of a cache in fp8 and only of that.

    Returns:
        [T, H, C].
    """
    out_THC = q_THl.new_empty(*q_THl.shape[:2], rank)
    for b, start, end, length in each_sequence(seqs):
        for row in range(start, end):
            rows_Ll = cache[seqs.block_table[b]].flatten(0, 1)[: length - (end - 1 - row)].float()
            rows_Ll = rows_Ll * _scale_of(kv_scale, cache)
            if chosen is not None:
                rows_Ll = rows_Ll[chosen[row][chosen[row] >= 0]]
            weights_HL = (q_THl[row].float() @ rows_Ll.T * scale).softmax(-1)
            out_THC[row] = (weights_HL @ rows_Ll[:, :rank]).to(q_THl.dtype)
    return out_THC


def _scale_of(kv_scale: Tensor | None, cache: Tensor) -> Tensor:
    assert (kv_scale is not None) == (cache.dtype == FP8), f"scale {kv_scale} of a cache of {cache.dtype}"
    return cache.new_ones(1, dtype=torch.float32) if kv_scale is None else kv_scale


def rope_and_cache(
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
    out: Tensor | None = None,
    kv_scale: Tensor | None = None,
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
        interleaved: which pairs are rotated, as in `attention.rope_and_cache`.
        out: of q's shape and dtype, written; its tokens and heads may lie apart, as parts of longer rows do.
        kv_scale: as in `reference`.

    Returns:
        q_THr, rotated: `out` if that is given.
    """
    rank = norm_C.shape[0]
    latent_TC = F.rms_norm(kv_Tl[:, :rank].float(), (rank,), None, eps) * norm_C.float()
    parts = kv_Tl[:, rank:].unsqueeze(1), q_THr
    k_T1r, q_THr = (rotate_at(part.float(), tables, positions_T, interleaved).to(part.dtype) for part in parts)
    row_Tl = quantize(torch.cat((latent_TC.to(kv_Tl.dtype), k_T1r[:, 0]), -1), _scale_of(kv_scale, cache), cache.dtype)
    as_bytes(cache).flatten(0, 1).index_copy_(0, slot_mapping_T, as_bytes(row_Tl))
    return q_THr if out is None else out.copy_(q_THr)


def attend(
    q_THl: Tensor,
    cache: Tensor,
    seqs: AttentionMetadata,
    *,
    rank: int,
    scale: float,
    chosen: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """As `reference`, one sequence at a time."""
    outputs = [q_THl.new_empty(0, q_THl.shape[1], rank)]
    for b, start, end, length in each_sequence(seqs):
        some = slice(start, end)
        q_HTl = q_THl[some].transpose(0, 1).float()
        rows_Ll = cache[seqs.block_table[b]].flatten(0, 1)[:length].float() * _scale_of(kv_scale, cache)
        mask_TL = visible(q_HTl.shape[1], 0, length, 0, 0, cache.device)
        if chosen is not None:
            counts_TL = torch.zeros(len(mask_TL), length + 1, device=cache.device)
            mask_TL = counts_TL.scatter_(1, chosen[some] % (length + 1), 1.0)[:, :-1].bool()
        weights_HTL = (q_HTl @ rows_Ll.T * scale).masked_fill(~mask_TL, float("-inf")).softmax(-1)
        outputs.append((weights_HTL @ rows_Ll[:, :rank]).transpose(0, 1).to(q_THl.dtype))
    return torch.cat(outputs)


def is_worth_expanding(prefills: AttentionMetadata, num_tokens: int) -> bool:
    """Whether sequences of so many queries together have few enough keys, as far as the host knows."""
    return 0 < prefills.num_sequences * prefills.max_seq_len <= _WORTH * num_tokens


def attend_expanded(
    q_THd: Tensor,
    cache: Tensor,
    seqs: AttentionMetadata,
    *,
    rank: int,
    scale: float,
    expand: Linear,
    attend: Attend,
    narrow_values: bool = False,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Attention of [q_h | p_h] in expanded form.

    Args:
        q_THd: [q_h | p_h].
        cache: [blocks, s, l].
        seqs: as in `attention.reference`.
        rank: C.
        scale: of the scores.
        expand: from [X, C] to [X, H * (n + v)], U_h over V_h of each head.
        attend: an implementation of `attention.reference`.
        narrow_values: whether `attend` takes values of another size than keys, and returns them so.
        kv_scale: as in `reference`.

    Returns:
        [T, H, v].
    """
    (num_heads, dim), block_size = q_THd.shape[1:], cache.shape[1]
    tables_BW = seqs.block_table[:, : -(-seqs.max_seq_len // block_size)]
    rows_Xl = as_bytes(cache)[tables_BW.flatten().long()].flatten(0, 1).view(cache.dtype)
    if kv_scale is not None:
        rows_Xl = (rows_Xl.float() * kv_scale).to(q_THd.dtype)
    shared_XHr = rows_Xl[:, None, rank:].expand(-1, num_heads, -1)
    made_XHm = expand(rows_Xl[:, :rank].contiguous()).unflatten(1, (num_heads, -1))
    size = dim - shared_XHr.shape[2]
    value_size = made_XHm.shape[2] - size
    key_XHd, value_XHv = torch.cat((made_XHm[..., :size], shared_XHr), 2), made_XHm[..., size:]
    # Zeros behind the shorter ones change neither scores nor values.
    width = dim if narrow_values else max(dim, value_size)
    q_THw, key_XHw = (_widened(rows, width) for rows in (q_THd, key_XHd))
    caches = key_XHw, _widened(value_XHv, value_size if narrow_values else width)
    own_BW = torch.arange(tables_BW.numel(), dtype=tables_BW.dtype, device=cache.device).view(tables_BW.shape)
    pages = [rows.unflatten(0, (-1, block_size)) for rows in caches]
    return attend(q_THw, *pages, replace(seqs, block_table=own_BW), scale=scale)[..., :value_size]


def _widened(rows: Tensor, width: int) -> Tensor:
    return rows.contiguous() if rows.shape[-1] == width else F.pad(rows, (0, width - rows.shape[-1]))
