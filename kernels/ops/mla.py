"""Multi-head latent attention (DeepSeek-V2, 2024): the cache holds one compressed row a token.

Keys and values of all heads are functions of one latent vector, z = norm(W_a x)[:c], and of a rotated part of the key
that the heads share, k = rotate((W_a x)[c:]):

    key of head h    = [U_h z | k]      score = scale * (q_h . U_h z + p_h . k)      p_h the rotated part of the query
    value of head h  = V_h z            output_h = sum of softmax(score) * V_h z

Absorbed: q_h . U_h z = (U_h^T q_h) . z, and V_h is applied to the sum, so that attention is that of H query heads
on one shared key [z | k] of l = c + r numbers, whose first c numbers are also the value; the caller multiplies its
output by V_h. Decodes and prefills both use this form, so that their rounding is the same.

Expanded: keys and values of all heads are computed from the cached latents, with n + r and v numbers instead of l
and c. That is cheaper where a sequence has about as many queries as keys, but rounds differently: it is used for
prefills with the numerics "fast".

`scale` is (n + r)^-0.5, with YaRN times the square of a factor; it is not l^-0.5 and hence an argument.

A cache may be fp8 as in `attention`, with one scale for the whole row: `kv_scale`.

T tokens, H heads, c latent size (512), r rotated size (64), l = c + r, n and v sizes of a head's key without
position and of its value (128), d = n + r, S sequences, B blocks, W entries of a block table, Y cached positions of
a sequence or of all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.attention import (
    FP8,
    Attend,
    AttentionMetadata,
    AttentionOptions,
    as_bytes,
    each_sequence,
    quantize,
    visible,
)
from expertwire.kernels.ops.linear import Linear
from expertwire.kernels.ops.rotary import RopeInputs, rotate_at

_MAX_KEYS_PER_QUERY = 2  # where latents are expanded


class RopeAndCacheLatent(Protocol):
    """Normalisation, rotary embedding and cache write; see `rope_and_cache`."""

    def __call__(
        self,
        q_THr: Tensor,
        kv_Tl: Tensor,
        norm_c: Tensor,
        eps: float,
        rope: RopeInputs,
        cache: Tensor,
        *,
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
        """Return [T, H, c]. `seqs` as for `attention.Attend`."""
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
    """Attend one query at a time in fp32; return [T, H, c] in q's dtype.

    Args:
        q_THl: absorbed queries [U_h^T q_h | p_h].
        cache: [B, block_size, l].
        seqs: as in `attention.reference`.
        rank: c, `kv_lora_rank`.
        scale: of the scores; above 0.
        chosen: i64 [T, k], the distinct positions up to its own that a query sees, padded with -1; None: all.
        kv_scale: fp32 [1], of an fp8 cache and only of that.
    """
    out_THc = q_THl.new_empty(*q_THl.shape[:2], rank)
    for b, start, end, length in each_sequence(seqs):
        for row in range(start, end):
            rows_Yl = cache[seqs.block_table[b]].flatten(0, 1)[: length - (end - 1 - row)].float()
            rows_Yl = rows_Yl * _scale_of(kv_scale, cache)
            if chosen is not None:
                rows_Yl = rows_Yl[chosen[row][chosen[row] >= 0]]
            weights_HY = (q_THl[row].float() @ rows_Yl.T * scale).softmax(-1)
            out_THc[row] = (weights_HY @ rows_Yl[:, :rank]).to(q_THl.dtype)
    return out_THc


def _scale_of(kv_scale: Tensor | None, cache: Tensor) -> Tensor:
    assert (kv_scale is not None) == (cache.dtype == FP8), f"scale {kv_scale} of a cache of {cache.dtype}"
    return cache.new_ones(1, dtype=torch.float32) if kv_scale is None else kv_scale


def rope_and_cache(
    q_THr: Tensor,
    kv_Tl: Tensor,
    norm_c: Tensor,
    eps: float,
    rope: RopeInputs,
    cache: Tensor,
    *,
    out: Tensor | None = None,
    kv_scale: Tensor | None = None,
) -> Tensor:
    """Normalise the latent, rotate its key part and the queries, and store the row in the cache.

    Args:
        q_THr: the rotated parts of queries, before rotation.
        kv_Tl: W_a x.
        norm_c: weights of the latent's RMS norm.
        eps: of the norm.
        rope: of r dimensions.
        cache: [B, block_size, l], written.
        out: of q's shape and dtype, written; tokens and heads may be strided, as parts of longer rows are.
        kv_scale: as in `reference`.

    Returns:
        q_THr, rotated: `out` if that is given.
    """
    rank = norm_c.shape[0]
    latent_Tc = F.rms_norm(kv_Tl[:, :rank].float(), (rank,), None, eps) * norm_c.float()
    parts = kv_Tl[:, rank:].unsqueeze(1), q_THr
    k_T1r, q_THr = (rotate_at(part.float(), rope).to(part.dtype) for part in parts)
    row_Tl = quantize(torch.cat((latent_Tc.to(kv_Tl.dtype), k_T1r[:, 0]), -1), _scale_of(kv_scale, cache), cache.dtype)
    as_bytes(cache).flatten(0, 1).index_copy_(0, rope.slot_mapping_T, as_bytes(row_Tl))
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
        rows_Yl = cache[seqs.block_table[b]].flatten(0, 1)[:length].float() * _scale_of(kv_scale, cache)
        mask_TY = visible(q_HTl.shape[1], 0, length, cache.device)
        if chosen is not None:
            counts_TY = torch.zeros(len(mask_TY), length + 1, device=cache.device)
            mask_TY = counts_TY.scatter_(1, chosen[some] % (length + 1), 1.0)[:, :-1].bool()
        weights_HTY = (q_HTl @ rows_Yl.T * scale).masked_fill(~mask_TY, float("-inf")).softmax(-1)
        outputs.append((weights_HTY @ rows_Yl[:, :rank]).transpose(0, 1).to(q_THl.dtype))
    return torch.cat(outputs)


def is_worth_expanding(prefills: AttentionMetadata, num_tokens: int) -> bool:
    """Return whether prefills with `num_tokens` queries in total have few enough keys to expand."""
    return 0 < prefills.num_sequences * prefills.max_seq_len <= _MAX_KEYS_PER_QUERY * num_tokens


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
        cache: [B, block_size, l].
        seqs: as in `attention.reference`.
        rank: c, `kv_lora_rank`.
        scale: of the scores.
        expand: from rows [*, c] to [*, H * (n + v)], U_h over V_h of each head.
        attend: an implementation of `attention.reference`.
        narrow_values: whether `attend` accepts values of another size than keys.
        kv_scale: as in `reference`.

    Returns:
        [T, H, v].
    """
    (num_heads, dim), block_size = q_THd.shape[1:], cache.shape[1]
    tables_SW = seqs.block_table[:, : -(-seqs.max_seq_len // block_size)]
    rows_Yl = as_bytes(cache)[tables_SW.flatten().long()].flatten(0, 1).view(cache.dtype)
    if kv_scale is not None:
        rows_Yl = (rows_Yl.float() * kv_scale).to(q_THd.dtype)
    shared_YHr = rows_Yl[:, None, rank:].expand(-1, num_heads, -1)
    made_YHm = expand(rows_Yl[:, :rank].contiguous()).unflatten(1, (num_heads, -1))
    size = dim - shared_YHr.shape[2]
    value_size = made_YHm.shape[2] - size
    key_YHd, value_YHv = torch.cat((made_YHm[..., :size], shared_YHr), 2), made_YHm[..., size:]
    # Padding with zeros changes neither scores nor values.
    width = dim if narrow_values else max(dim, value_size)
    q_THw, key_YHw = (_widened(rows, width) for rows in (q_THd, key_YHd))
    keys = key_YHw.unflatten(0, (-1, block_size))
    values = _widened(value_YHv, value_size if narrow_values else width).unflatten(0, (-1, block_size))
    own_SW = torch.arange(tables_SW.numel(), dtype=tables_SW.dtype, device=cache.device).view(tables_SW.shape)
    options = AttentionOptions(scale=scale)
    return attend(q_THw, keys, values, replace(seqs, block_table=own_SW), options)[..., :value_size]


def _widened(rows: Tensor, width: int) -> Tensor:
    return rows.contiguous() if rows.shape[-1] == width else F.pad(rows, (0, width - rows.shape[-1]))
