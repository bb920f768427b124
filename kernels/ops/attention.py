"""Causal attention over a paged KV cache, grouped-query form.

A sequence's keys and values lie in blocks of `block_size` tokens; its block table lists them in order. The queries of this
step are the last ones of their sequences: query i of a sequence with `length` known tokens and `num` queries is at position
`length - num + i` and sees the positions up to its own.

Variants: a sliding window of `window` tokens (0: none) shows a query the last `window` positions up to its own; with chunks of
`chunk` positions (0: none) a query sees those of its own chunk, from (position // chunk) * chunk on (Llama 4). Before the first
position that is visible the cache may hold anything: its blocks may have been given back. A sink is a learned logit a head that
takes part in the softmax's sum and brings no value (gpt-oss).

A cache may be fp8 (e4m3), half of bf16's bytes: keys and values, rounded to the queries' dtype, are divided by `kv_scales_2G`, a
scale for the keys and one for the values of each head, and saturate at +-448 (`quantize`). Attention multiplies them back: scores
by the keys' scale, outputs by the values'.

T tokens, H query heads, G key/value heads (H/G queries share one), d head size, B sequences, L padded length, s block size,
W blocks in a row of the block table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels.ops import rotary


@dataclass(frozen=True, kw_only=True)
class PagedSequences:
    """Which tokens of the step belong to which sequence, and where their caches lie.

    Sequences with one query, the decodes, come first, so that they can run as one batch; the others are prefills.
    """

    num_decodes: int
    cu_queries: np.ndarray  # i64 [B + 1]: query rows of sequence b are [cu_queries[b], cu_queries[b + 1])
    lengths: np.ndarray  # i64 [B]: tokens whose keys are in the cache once this step's are stored
    block_table: Tensor  # i64 [B, W], padded with the null block
    block_size: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return int(self.lengths.max(initial=0))


def describe(
    cu_queries: np.ndarray, lengths: np.ndarray, block_tables: np.ndarray, block_size: int, device: str
) -> PagedSequences:
    """Build the description on the host.

    cu_queries i64 [B + 1], lengths i64 [B], block_tables i32 [B, blocks] (the null block 0 where unused); sequences with one
    query first.
    """
    nums = np.diff(cu_queries)
    num_decodes = int((nums == 1).sum())
    assert (nums[:num_decodes] == 1).all(), f"sequences with one query must come first, got {nums.tolist()}"
    widest = -(-int(lengths.max(initial=0)) // block_size)
    return PagedSequences(
        num_decodes=num_decodes,
        cu_queries=cu_queries,
        lengths=lengths,
        block_table=torch.from_numpy(block_tables[:, :widest].astype(np.int64)).to(device),
        block_size=block_size,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceSequences:
    """The same for a GPU: the numbers are on the device and nothing is read back; the host knows bounds, for the sizes of grids
    and workspaces.

    So one captured graph serves every mixture of decodes and prefills within its bounds. Sequences without queries may stand
    last. Where the bounds are exact, `max_decodes + max_prefill_tokens` is the number of the step's rows.
    """

    num_decodes: Tensor  # i32 [1]: the first sequences, with one query each: row b is sequence b's
    max_decodes: int
    max_prefills: int
    max_prefill_tokens: int
    max_length: int  # no sequence is longer
    max_prefill_length: int  # nor is a prefill longer than this
    cu_queries: Tensor  # i32 [B + 1], as in PagedSequences; the last one may be less than the rows of the step
    lengths: Tensor  # i32 [B]
    block_table: Tensor  # i32 [B, W], padded with the null block

    @property
    def num_sequences(self) -> int:
        return self.lengths.shape[0]


FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max  # 448


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache of `dtype` keeps it: as it is, or, if that is fp8, x / scale, saturated and rounded to nearest even."""
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8) if dtype == FP8 else x.to(dtype)


def as_bytes(cache: Tensor) -> Tensor:
    """A view of an fp8 cache for torch's indexed copies, which do not know fp8; another cache as it is."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def scales_of(kv_scales_2G: Tensor | None, k_cache: Tensor) -> Tensor:
    """fp32 [2, G], ones for caches that have none. Caches in fp8 have scales, and others have none."""
    assert (kv_scales_2G is not None) == (k_cache.dtype == FP8), f"scales {kv_scales_2G} of a cache of {k_cache.dtype}"
    return k_cache.new_ones(2, k_cache.shape[2], dtype=torch.float32) if kv_scales_2G is None else kv_scales_2G


def describe_on_device(
    nums: Sequence[int], lengths: Sequence[int], block_table: Tensor, max_length: int | None = None
) -> DeviceSequences:
    """Exact bounds for sequences of so many queries and tokens, those with one query first; B of each.

    block_table i32 [B, W]; `max_length` may be more than the longest.
    """
    num_decodes = sum(num == 1 for num in nums)
    assert all(num == 1 for num in nums[:num_decodes]), f"sequences with one query must come first, got {list(nums)}"

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=block_table.device)

    return DeviceSequences(
        num_decodes=tensor([num_decodes]),
        max_decodes=num_decodes,
        max_prefills=len(nums) - num_decodes,
        max_prefill_tokens=sum(nums[num_decodes:]),
        max_length=max(lengths, default=0) if max_length is None else max_length,
        max_prefill_length=max(lengths[num_decodes:], default=0) if max_length is None else max_length,
        cu_queries=tensor([0, *accumulate(nums)]),
        lengths=tensor(lengths),
        block_table=block_table,
    )


Sequences = TypeVar("Sequences", PagedSequences, DeviceSequences)


def known_decodes(seqs: PagedSequences | DeviceSequences, num_tokens: int) -> int | None:
    """The number of decodes in a step of so many rows; None where the host has only bounds."""
    if isinstance(seqs, PagedSequences):
        return seqs.num_decodes
    return seqs.max_decodes if seqs.max_decodes + seqs.max_prefill_tokens == num_tokens else None


def decodes(seqs: Sequences, num: int) -> Sequences:
    """The first `num` sequences, which are `known_decodes`: the first rows of the step."""
    first = {
        "cu_queries": seqs.cu_queries[: num + 1],
        "lengths": seqs.lengths[:num],
        "block_table": seqs.block_table[:num],
    }
    if isinstance(seqs, PagedSequences):
        return replace(seqs, **first)
    return replace(seqs, **first, max_prefills=0, max_prefill_tokens=0)


def prefills(seqs: Sequences, num: int) -> Sequences:
    """The sequences behind `num`, which are `known_decodes`: the other rows."""
    rest = {
        "cu_queries": seqs.cu_queries[num:] - num,
        "lengths": seqs.lengths[num:],
        "block_table": seqs.block_table[num:],
    }
    if isinstance(seqs, PagedSequences):
        return replace(seqs, num_decodes=0, **rest)
    # A copy begins at a multiple of 16 bytes, whatever `num` is: kernels are compiled apart for pointers that do not.
    rest |= {"num_decodes": torch.zeros_like(seqs.num_decodes), "lengths": rest["lengths"].clone()}
    return replace(seqs, max_decodes=0, max_length=seqs.max_prefill_length, **rest)


class RopeAndCache(Protocol):
    """What lies between the projections and attention; see `rope_and_cache`."""

    def __call__(
        self,
        qkv_Thd: Tensor,
        norm_hd: Tensor | None,
        eps: float,
        tables: tuple[Tensor, Tensor],
        positions_T: Tensor,
        slot_mapping_T: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        interleaved: bool = False,
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
        seqs: Any,
        *,
        scale: float | None = None,
        window: int = 0,
        chunk: int = 0,
        sinks_H: Tensor | None = None,
        kv_scales_2G: Tensor | None = None,
    ) -> Tensor:
        """Return [T, H, d]. `seqs`: `PagedSequences`, or `DeviceSequences` where `Ops.on_device`."""
        ...


def first_visible(position: int, window: int, chunk: int) -> int:
    """The first position that a query at `position` sees."""
    first = max(0, position + 1 - window) if window else 0
    return max(first, position // chunk * chunk) if chunk else first


def reference(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: PagedSequences,
    *,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    sinks_H: Tensor | None = None,
    kv_scales_2G: Tensor | None = None,
) -> Tensor:
    """One query at a time in fp32; caches [blocks, s, G, d]; `scale` is d^-0.5 unless given; `kv_scales_2G`: fp32, of caches in
    fp8 and only of those; returns [T, H, d]."""
    out_THd = torch.empty_like(q_THd)
    scale = q_THd.shape[-1] ** -0.5 if scale is None else scale
    scales_2G11 = scales_of(kv_scales_2G, k_cache)[:, :, None, None]
    for b, table in enumerate(seqs.block_table):
        start, end = seqs.cu_queries[b], seqs.cu_queries[b + 1]
        for row in range(start, end):
            stop = seqs.lengths[b] - (end - 1 - row)
            visible = slice(first_visible(stop - 1, window, chunk), stop)
            rows = (c[table].flatten(0, 1)[visible].float().transpose(0, 1) for c in (k_cache, v_cache))
            k_GLd, v_GLd = (row * scale_G11 for row, scale_G11 in zip(rows, scales_2G11, strict=True))
            q_Gqd = q_THd[row].float().view(k_GLd.shape[0], -1, q_THd.shape[-1])
            logits = [q_Gqd @ k_GLd.transpose(1, 2) * scale]
            if sinks_H is not None:
                logits.append(sinks_H.float().view(*q_Gqd.shape[:2], 1))
            weights = torch.cat(logits, -1).softmax(-1)[..., : k_GLd.shape[1]]
            out_THd[row] = (weights @ v_GLd).flatten(0, 1).to(q_THd.dtype)
    return out_THd


def rope_and_cache(
    qkv_Thd: Tensor,
    norm_hd: Tensor | None,
    eps: float,
    tables: tuple[Tensor, Tensor],
    positions_T: Tensor,
    slot_mapping_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    interleaved: bool = False,
    kv_scales_2G: Tensor | None = None,
) -> Tensor:
    """What lies between the projections and the attention: norms of query and key heads, rotation, storing keys and values.

    Args:
        qkv_Thd: [T, H + 2G, d]: query, key and value heads.
        norm_hd: weights of the heads' RMS norms [H + G, d], or None.
        eps: of the norms.
        tables: `rotary.tables` for the dimensions that are rotated: the first r <= d.
        positions_T: i64.
        slot_mapping_T: i64, block * s + offset.
        k_cache: [blocks, s, G, d], written, as is `v_cache`.
        interleaved: the pairs are (x_2i, x_2i+1), not (x_i, x_i+r/2).
        kv_scales_2G: as in `reference`.

    Returns:
        Queries [T, H, d].
    """
    num_kv, dim = k_cache.shape[2:]
    num_heads = qkv_Thd.shape[1] - 2 * num_kv
    qk, v_TGd = qkv_Thd[:, : num_heads + num_kv].float(), qkv_Thd[:, num_heads + num_kv :]
    if norm_hd is not None:
        qk = F.rms_norm(qk, (dim,), None, eps) * norm_hd.float()
    turned, kept = qk.split((tables[0].shape[1], dim - tables[0].shape[1]), -1)
    qk = torch.cat((rotary.rotate_at(turned, tables, positions_T, interleaved), kept), -1).to(qkv_Thd.dtype)
    scales_2G1 = scales_of(kv_scales_2G, k_cache)[:, :, None]
    for cache, x_TGd, scale_G1 in zip((k_cache, v_cache), (qk[:, num_heads:], v_TGd), scales_2G1, strict=True):
        rows_TGd = as_bytes(quantize(x_TGd, scale_G1, cache.dtype))
        as_bytes(cache).flatten(0, 1).index_copy_(0, slot_mapping_T, rows_TGd)
    return qk[:, :num_heads]


def attend(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: PagedSequences,
    *,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    sinks_H: Tensor | None = None,
    kv_scales_2G: Tensor | None = None,
) -> Tensor:
    """As `reference`, one sequence at a time: torch's fused attention, or, with sinks, which that lacks, its parts."""
    outputs = [q_THd[:0]]
    for b, length in enumerate(seqs.lengths.tolist()):
        q = q_THd[seqs.cu_queries[b] : seqs.cu_queries[b + 1]]
        begin = first_visible(length - len(q), window, chunk)
        k_GLd, v_GLd = (_gather(cache, seqs.block_table[b], begin, length) for cache in (k_cache, v_cache))
        if kv_scales_2G is not None:
            rows = zip((k_GLd, v_GLd), kv_scales_2G, strict=True)
            k_GLd, v_GLd = (row.float() * scale_G[:, None, None] for row, scale_G in rows)
        mask = visible(len(q), begin, length, window, chunk, q.device)
        found_HTd = _attend_one(q.to(k_GLd.dtype).transpose(0, 1), k_GLd, v_GLd, mask, scale, sinks_H)
        outputs.append(found_HTd.transpose(0, 1).to(q.dtype))
    return torch.cat(outputs)


def visible(num: int, begin: int, length: int, window: int, chunk: int, device: torch.device) -> Tensor:
    """Which of the positions from `begin` to `length` the last `num` see: bool [num, positions]."""
    key_L = torch.arange(begin, length, device=device)
    query_q1 = torch.arange(length - num, length, device=device)[:, None]
    found = key_L <= query_q1
    if window:
        found &= key_L > query_q1 - window
    if chunk:
        found &= key_L >= query_q1 // chunk * chunk
    return found


def _gather(cache: Tensor, table: Tensor, begin: int, end: int) -> Tensor:
    """[G, L, d]: the positions from `begin` to `end`."""
    block_size = cache.shape[1]
    first = begin // block_size
    rows_LGd = cache[table[first : -(-end // block_size)]].flatten(0, 1)
    return rows_LGd[begin - first * block_size : end - first * block_size].transpose(0, 1)


def _attend_one(
    q_HTd: Tensor, k_GLd: Tensor, v_GLd: Tensor, mask_TL: Tensor, scale: float | None, sinks_H: Tensor | None
) -> Tensor:
    if sinks_H is None:
        shared = len(q_HTd) != len(k_GLd)
        batch = (tensor.unsqueeze(0) for tensor in (q_HTd, k_GLd, v_GLd))
        return F.scaled_dot_product_attention(*batch, attn_mask=mask_TL, scale=scale, enable_gqa=shared)[0]
    k_HLd, v_HLd = (kv.repeat_interleave(len(q_HTd) // len(kv), 0).float() for kv in (k_GLd, v_GLd))
    scale = q_HTd.shape[-1] ** -0.5 if scale is None else scale
    logits_HTL = (q_HTd.float() @ k_HLd.transpose(1, 2) * scale).masked_fill(~mask_TL, float("-inf"))
    sinks_HT1 = sinks_H.float()[:, None, None].expand(*q_HTd.shape[:2], 1)
    weights_HTL = torch.cat((logits_HTL, sinks_HT1), -1).softmax(-1)[..., :-1]
    return (weights_HTL @ v_HLd).to(q_HTd.dtype)
