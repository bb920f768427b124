"""Causal attention over a paged KV cache, grouped-query form.

    out = softmax(scale * q k^T + mask) v

Keys and values of a sequence lie in blocks of `block_size` tokens; its block table lists them in order. The queries
of a step are the last ones of their sequences: query i of a sequence with `length` known tokens and `num` queries
is at position `length - num + i` and sees the positions up to its own.

Variants: with a sliding window of `window` tokens (0: none) a query sees the last `window` positions up to its own;
with chunks of `chunk` positions (0: none; Llama 4) those of its chunk, from (position // chunk) * chunk on. The
cache may hold anything before the first visible position, as blocks there may have been freed. A sink (gpt-oss) is
a learned logit for each head that enters the softmax's sum and has no value.

A cache may be fp8 (e4m3): keys and values, rounded to the queries' dtype, are divided by `kv_scales_2G`, one scale for
the keys and one for the values of each head, and saturate at +-448 (`quantize`). Attention multiplies scores by the
keys' scale and outputs by the values'.

T tokens, H query heads, G key/value heads (H / G of the query heads share one), d head size, S sequences, B blocks, W
entries of a block table, Y cached positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops.rotary import RopeInputs, rotate_at


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """The sequences of a step, and where one paged cache keeps their tokens.

    Sequences with one query, the decodes, come first; prefills follow. Kernels read the numbers from tensors on the
    device and nothing is read back; the host knows bounds (`max_*`), which size grids and workspaces. So one
    captured graph serves every mixture of decodes and prefills within its bounds; sequences without queries may
    stand last. On a CPU the bounds are exact; where they are, `max_decodes + max_prefill_tokens` is the number of
    the step's rows.

    Attributes:
        num_decodes: i32 [1]. Row b of the step is the query of sequence b, for the first `num_decodes` sequences.
        max_seq_len: no sequence is longer; `max_prefill_len`: nor is a prefill longer than this.
        cu_seqlens_q: i32 [S + 1]. The queries of sequence b are the rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of
            the step, which may have more rows.
        seq_lens: i32 [S], tokens in the cache once this step's are stored.
        block_table: i32 [S, W], padded with the null block 0, which also stands for blocks that slid out of a window.
        slot_mapping: i64 [T], where each token is stored: block * block_size + offset.
    """

    num_decodes: Tensor
    max_decodes: int
    max_prefills: int
    max_prefill_tokens: int
    max_seq_len: int
    max_prefill_len: int
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor

    @property
    def num_sequences(self) -> int:
        return self.seq_lens.shape[0]


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Variant of attention in a layer, as the module describes them, and the scales of its cache.

    Attributes:
        scale: of the scores; None: d^-0.5.
        window, chunk: 0: none.
        sinks_H: logits of the sinks.
        kv_scales_2G: fp32, of fp8 caches and only of those.
    """

    scale: float | None = None
    window: int = 0
    chunk: int = 0
    sinks_H: Tensor | None = None
    kv_scales_2G: Tensor | None = None

    def scale_for(self, head_dim: int) -> float:
        """Return the scale of the scores of heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale


PLAIN = AttentionOptions()

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max  # 448


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x as a cache of `dtype` stores it; for fp8: x / scale, saturated and rounded to nearest even."""
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8) if dtype == FP8 else x.to(dtype)


def as_bytes(cache: Tensor) -> Tensor:
    """Return an fp8 cache as bytes, for torch's indexed copies, which lack fp8; another cache as it is."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def scales_of(kv_scales_2G: Tensor | None, k_cache: Tensor) -> Tensor:
    """Return fp32 [2, G]: the scales of an fp8 cache, ones for any other."""
    assert (kv_scales_2G is not None) == (k_cache.dtype == FP8), f"scales {kv_scales_2G} of a cache of {k_cache.dtype}"
    return k_cache.new_ones(2, k_cache.shape[2], dtype=torch.float32) if kv_scales_2G is None else kv_scales_2G


def describe(
    query_lens: Iterable[int],
    seq_lens: Iterable[int],
    block_table: Tensor,
    max_seq_len: int | None = None,
    slot_mapping: Tensor | None = None,
) -> AttentionMetadata:
    """Return the metadata of sequences with so many queries and tokens, with exact bounds.

    Args:
        query_lens: [S], those with one query first.
        seq_lens: [S].
        block_table: i32 [S, W].
        max_seq_len: more than the longest, for kernels that are tested with loose bounds.
        slot_mapping: i64 [T]; needed where keys and values are stored.
    """
    query_lens, seq_lens = list(map(int, query_lens)), list(map(int, seq_lens))
    num_decodes = query_lens.count(1)
    assert query_lens[:num_decodes].count(1) == num_decodes, f"decodes must come first, got {query_lens} queries"

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=block_table.device)

    return AttentionMetadata(
        num_decodes=tensor([num_decodes]),
        max_decodes=num_decodes,
        max_prefills=len(query_lens) - num_decodes,
        max_prefill_tokens=sum(query_lens[num_decodes:]),
        max_seq_len=max(seq_lens, default=0) if max_seq_len is None else max_seq_len,
        max_prefill_len=max(seq_lens[num_decodes:], default=0) if max_seq_len is None else max_seq_len,
        cu_seqlens_q=tensor([0, *accumulate(query_lens)]),
        seq_lens=tensor(seq_lens),
        block_table=block_table,
        slot_mapping=block_table.new_empty(0, dtype=torch.int64) if slot_mapping is None else slot_mapping,
    )


def known_decodes(metadata: AttentionMetadata, num_tokens: int) -> int | None:
    """Return the number of decodes in a step of so many rows; None where the host has only bounds."""
    is_exact = metadata.max_decodes + metadata.max_prefill_tokens == num_tokens
    return metadata.max_decodes if is_exact else None


def decodes(metadata: AttentionMetadata, num: int) -> AttentionMetadata:
    """Return the metadata of the first `num` sequences, which are `known_decodes`: the first rows of the step."""
    return replace(
        metadata,
        max_prefills=0,
        max_prefill_tokens=0,
        cu_seqlens_q=metadata.cu_seqlens_q[: num + 1],
        seq_lens=metadata.seq_lens[:num],
        block_table=metadata.block_table[:num],
        slot_mapping=metadata.slot_mapping[:num],
    )


def prefills(metadata: AttentionMetadata, num: int) -> AttentionMetadata:
    """Return the metadata of the sequences behind `num`, which are `known_decodes`: the other rows."""
    return replace(
        metadata,
        num_decodes=torch.zeros_like(metadata.num_decodes),
        max_decodes=0,
        max_seq_len=metadata.max_prefill_len,
        cu_seqlens_q=metadata.cu_seqlens_q[num:] - num,
        # A copy begins at a multiple of 16 bytes, whatever `num` is: kernels are compiled apart for pointers that
        # do not.
        seq_lens=metadata.seq_lens[num:].clone(),
        block_table=metadata.block_table[num:],
        slot_mapping=metadata.slot_mapping[num:],
    )


def each_sequence(metadata: AttentionMetadata) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, first row, end row and length of each sequence, for implementations that loop in Python."""
    bounds = metadata.cu_seqlens_q.tolist()
    return zip(range(metadata.num_sequences), bounds, bounds[1:], metadata.seq_lens.tolist(), strict=False)


class RopeAndCache(Protocol):
    """Normalisation, rotary embedding and cache write; see `rope_and_cache`."""

    def __call__(
        self,
        qkv_Thd: Tensor,
        norm_hd: Tensor | None,
        eps: float,
        rope: RopeInputs,
        k_cache: Tensor,
        v_cache: Tensor,
        kv_scales_2G: Tensor | None = None,
    ) -> Tensor:
        """Return the queries [T, H, d]; write the caches."""
        ...


class Attend(Protocol):
    """Attention of a step; see `reference`."""

    def __call__(
        self,
        q_THd: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        seqs: AttentionMetadata,
        options: AttentionOptions = PLAIN,
    ) -> Tensor:
        """Return [T, H, d]."""
        ...


def first_visible(position: int, options: AttentionOptions) -> int:
    """Return the first position that a query at `position` sees."""
    window, chunk = options.window, options.chunk
    first = max(0, position + 1 - window) if window else 0
    return max(first, position // chunk * chunk) if chunk else first


def reference(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """Attend one query at a time in fp32; return [T, H, d] in q's dtype.

    Args:
        q_THd: queries, with positional encoding.
        k_cache, v_cache: [B, block_size, G, d].
        seqs: of the step.
    """
    out_THd, sinks_H, scale = torch.empty_like(q_THd), options.sinks_H, options.scale_for(q_THd.shape[-1])
    scales_2G11 = scales_of(options.kv_scales_2G, k_cache)[:, :, None, None]
    for b, start, end, seq_len in each_sequence(seqs):
        for row in range(start, end):
            stop = seq_len - (end - 1 - row)
            visible = slice(first_visible(stop - 1, options), stop)
            rows = (c[seqs.block_table[b]].flatten(0, 1)[visible].float().transpose(0, 1) for c in (k_cache, v_cache))
            k_GYd, v_GYd = (row * scale_G11 for row, scale_G11 in zip(rows, scales_2G11, strict=True))
            q_Gqd = q_THd[row].float().view(k_GYd.shape[0], -1, q_THd.shape[-1])
            logits = [q_Gqd @ k_GYd.transpose(1, 2) * scale]
            if sinks_H is not None:
                logits.append(sinks_H.float().view(*q_Gqd.shape[:2], 1))
            weights = torch.cat(logits, -1).softmax(-1)[..., : k_GYd.shape[1]]
            out_THd[row] = (weights @ v_GYd).flatten(0, 1).to(q_THd.dtype)
    return out_THd


def rope_and_cache(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    rope: RopeInputs,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_scales_2G: Tensor | None = None,
) -> Tensor:
    """Normalise query and key heads, apply rotary embedding, and store keys and values in the caches.

    Args:
        qkv_Thd: [T, H + 2G, d], query, key and value heads.
        norm_hd: weights [H + G, d] of the RMS norms of query and key heads, or None.
        eps: of the norms.
        rope: of the first r <= d dimensions.
        k_cache, v_cache: [B, block_size, G, d], written.
        kv_scales_2G: as in `AttentionOptions`.

    Returns:
        Queries [T, H, d].
    """
    num_kv, dim = k_cache.shape[2:]
    num_heads = qkv_Thd.shape[1] - 2 * num_kv
    qk, v_TGd = qkv_Thd[:, : num_heads + num_kv].float(), qkv_Thd[:, num_heads + num_kv :]
    if norm_hd is not None:
        qk = F.rms_norm(qk, (dim,), None, eps) * norm_hd.float()
    turned, kept = qk.split((rope.size, dim - rope.size), -1)
    qk = torch.cat((rotate_at(turned, rope), kept), -1).to(qkv_Thd.dtype)
    scales_2G1 = scales_of(kv_scales_2G, k_cache)[:, :, None]
    for cache, x_TGd, scale_G1 in zip((k_cache, v_cache), (qk[:, num_heads:], v_TGd), scales_2G1, strict=True):
        rows_TGd = as_bytes(quantize(x_TGd, scale_G1, cache.dtype))
        as_bytes(cache).flatten(0, 1).index_copy_(0, rope.slot_mapping_T, rows_TGd)
    return qk[:, :num_heads]


def attend(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: AttentionMetadata,
    options: AttentionOptions = PLAIN,
) -> Tensor:
    """As `reference`, one sequence at a time: torch's fused attention, or with sinks matrix products."""
    outputs = [q_THd[:0]]
    for b, start, end, length in each_sequence(seqs):
        q = q_THd[start:end]
        begin = first_visible(length - len(q), options)
        k_GYd, v_GYd = (_gather(cache, seqs.block_table[b], begin, length) for cache in (k_cache, v_cache))
        if options.kv_scales_2G is not None:
            rows = zip((k_GYd, v_GYd), options.kv_scales_2G, strict=True)
            k_GYd, v_GYd = (row.float() * scale_G[:, None, None] for row, scale_G in rows)
        mask = visible(len(q), begin, length, q.device, options)
        found_HTd = _attend_one(q.to(k_GYd.dtype).transpose(0, 1), k_GYd, v_GYd, mask, options)
        outputs.append(found_HTd.transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def visible(num: int, begin: int, length: int, device: torch.device, options: AttentionOptions = PLAIN) -> Tensor:
    """Return bool [num, length - begin]: which positions from `begin` to `length` the last `num` queries see."""
    key_Y = torch.arange(begin, length, device=device)
    query_q1 = torch.arange(length - num, length, device=device)[:, None]
    found = key_Y <= query_q1
    if options.window:
        found &= key_Y > query_q1 - options.window
    if options.chunk:
        found &= key_Y >= query_q1 // options.chunk * options.chunk
    return found


def _gather(cache: Tensor, table: Tensor, begin: int, end: int) -> Tensor:
    """Return [G, Y, d], positions `begin` to `end`."""
    block_size = cache.shape[1]
    first = begin // block_size
    rows_YGd = cache[table[first : -(-end // block_size)]].flatten(0, 1)
    return rows_YGd[begin - first * block_size : end - first * block_size].transpose(0, 1)


def _attend_one(q_HTd: Tensor, k_GYd: Tensor, v_GYd: Tensor, mask_TY: Tensor, options: AttentionOptions) -> Tensor:
    if options.sinks_H is None:
        shared = len(q_HTd) != len(k_GYd)
        return F.scaled_dot_product_attention(
            q_HTd[None], k_GYd[None], v_GYd[None], attn_mask=mask_TY, scale=options.scale, enable_gqa=shared
        )[0]
    k_HYd, v_HYd = (kv.repeat_interleave(len(q_HTd) // len(kv), 0).float() for kv in (k_GYd, v_GYd))
    scores_HTY = q_HTd.float() @ k_HYd.transpose(1, 2) * options.scale_for(q_HTd.shape[-1])
    logits_HTY = scores_HTY.masked_fill(~mask_TY, float("-inf"))
    sinks_HT1 = options.sinks_H.float()[:, None, None].expand(*q_HTd.shape[:2], 1)
    weights_HTY = torch.cat((logits_HTY, sinks_HT1), -1).softmax(-1)[..., :-1]
    return (weights_HTY @ v_HYd).to(q_HTd.dtype)
