"""Causal attention over a paged KV cache, grouped-query form.

A sequence's keys and values lie in blocks of `block_size` tokens; its block table lists them in order. The queries of this
step are the last ones of their sequences: query i of a sequence with `length` known tokens and `num` queries is at position
`length - num + i` and sees the positions up to its own.

Two variants: a sliding window of `window` tokens (0: none) shows a query the last `window` positions up to its own; a sink is a
learned logit a head that takes part in the softmax's sum and brings no value (gpt-oss).

T tokens, H query heads, G key/value heads (H/G queries share one), d head size, B sequences, L padded length, s block size,
W blocks in a row of the block table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from expertwire.kernels import linear, rotary


@dataclass(frozen=True, kw_only=True)
class PagedSequences:
    """Which tokens of the step belong to which sequence, and where their caches lie.

    Sequences with one query come first (`num_single` of them), so that they can run as one batch.
    """

    num_single: int
    cu_queries: np.ndarray  # i64 [B + 1]: query rows of sequence b are [cu_queries[b], cu_queries[b + 1])
    lengths: np.ndarray  # i64 [B]: tokens whose keys are in the cache once this step's are stored
    block_table: Tensor  # i64 [B, W], padded with the null block
    block_size: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def single_lengths(self) -> Tensor:
        """i64 [num_single]."""
        return torch.from_numpy(self.lengths[: self.num_single]).to(self.block_table.device)

    @property
    def single_block_table(self) -> Tensor:
        """i64 [num_single, blocks of the longest of them]."""
        return self.block_table[: self.num_single, : self._blocks(self.lengths[: self.num_single].max(initial=0))]

    @property
    def block_tables(self) -> list[Tensor]:
        """Of the sequences with several queries: i64 [blocks]."""
        several = range(self.num_single, self.num_sequences)
        return [self.block_table[b, : self._blocks(self.lengths[b])] for b in several]

    def _blocks(self, length: int) -> int:
        return -(-int(length) // self.block_size)


def describe(
    cu_queries: np.ndarray, lengths: np.ndarray, block_tables: np.ndarray, block_size: int, device: str
) -> PagedSequences:
    """Build the description on the host.

    cu_queries i64 [B + 1], lengths i64 [B], block_tables i32 [B, blocks] (the null block 0 where unused); sequences with one
    query first.
    """
    nums = np.diff(cu_queries)
    single = int((nums == 1).sum())
    assert (nums[:single] == 1).all(), f"sequences with one query must come first, got {nums.tolist()}"
    widest = -(-int(lengths.max(initial=0)) // block_size)
    return PagedSequences(
        num_single=single,
        cu_queries=cu_queries,
        lengths=lengths,
        block_table=torch.from_numpy(block_tables[:, :widest].astype(np.int64)).to(device),
        block_size=block_size,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceSequences:
    """The same for a GPU: only device tensors, and the bounds that the host knows; nothing is read back.

    Sequences without queries may stand last, so that a captured graph keeps its shapes.
    """

    num_single: int  # sequences with at most one query; they come first, and row b is theirs
    max_length: int  # no sequence is longer
    cu_queries: Tensor  # i32 [B + 1], as in PagedSequences; the last one may be less than the rows of the step
    lengths: Tensor  # i32 [B]
    block_table: Tensor  # i32 [B, W], padded with the null block

    @property
    def num_sequences(self) -> int:
        return self.lengths.shape[0]


class Fused(Protocol):
    """A layer's attention and the norm behind it in one call: the ops' bits, fewer calls."""

    def step(self, tables: tuple[Tensor, Tensor], positions_T: Tensor, slots_T: Tensor, seqs: PagedSequences) -> Any:
        """What the layers of a step share, for `__call__`."""
        ...

    def __call__(
        self, x_TD: Tensor, normed_TD: Tensor, k_cache: Tensor, v_cache: Tensor, step: Any
    ) -> tuple[Tensor, Tensor]:
        """x plus the attention of its norm, and the norm of that."""
        ...


def fuse(
    qkv: linear.Linear, output: linear.Linear, qk_norm_hd: Tensor | None, norm_D: Tensor, eps: float, head_dim: int
) -> Fused | None:
    """Of prepared layers to (H + 2G) * d and from H * d, where there is an implementation."""
    from expertwire.kernels.cpu import fused, gemm  # numba is slow to import and of no use elsewhere

    if not (isinstance(qkv, gemm.PackedLinear) and isinstance(output, gemm.PackedLinear)):
        return None
    return fused.AttentionAndNorm(qkv, output, qk_norm_hd, norm_D, eps, head_dim)


def reference(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: PagedSequences,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """One query at a time in fp32; caches [blocks, s, G, d]; `scale` is d^-0.5 unless given; returns [T, H, d]."""
    out_THd = torch.empty_like(q_THd)
    scale = q_THd.shape[-1] ** -0.5 if scale is None else scale
    for b, table in enumerate([*seqs.single_block_table, *seqs.block_tables]):
        start, end = seqs.cu_queries[b], seqs.cu_queries[b + 1]
        for row in range(start, end):
            stop = seqs.lengths[b] - (end - 1 - row)
            visible = slice(max(0, stop - window) if window else 0, stop)
            k_GLd, v_GLd = (c[table].flatten(0, 1)[visible].float().transpose(0, 1) for c in (k_cache, v_cache))
            q_Gqd = q_THd[row].float().view(k_GLd.shape[0], -1, q_THd.shape[-1])
            logits = [q_Gqd @ k_GLd.transpose(1, 2) * scale]
            if sinks_H is not None:
                logits.append(sinks_H.float().view(*q_Gqd.shape[:2], 1))
            weights = torch.cat(logits, -1).softmax(-1)[..., : k_GLd.shape[1]]
            out_THd[row] = (weights @ v_GLd).flatten(0, 1).to(q_THd.dtype)
    return out_THd


def rotate_and_store(
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

    Returns:
        Queries [T, H, d].
    """
    num_kv, dim = k_cache.shape[2:]
    num_heads = qkv_Thd.shape[1] - 2 * num_kv
    qk, v_TGd = qkv_Thd[:, : num_heads + num_kv].float(), qkv_Thd[:, num_heads + num_kv :]
    if norm_hd is not None:
        qk = F.rms_norm(qk, (dim,), None, eps) * norm_hd.float()
    turned, kept = qk.split((tables[0].shape[1], dim - tables[0].shape[1]), -1)
    qk = torch.cat((rotate_at(turned, tables, positions_T, interleaved), kept), -1).to(qkv_Thd.dtype)
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping_T, qk[:, num_heads:])
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping_T, v_TGd)
    return qk[:, :num_heads]


def rotate_at(x_THr: Tensor, tables: tuple[Tensor, Tensor], positions_T: Tensor, interleaved: bool) -> Tensor:
    """`rotary.rotate` at these positions, of pairs (x_i, x_i+r/2) or, interleaved, (x_2i, x_2i+1)."""
    if interleaved:
        x_THr = x_THr.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    x_THr = rotary.rotate(x_THr, *(table[positions_T].unsqueeze(1) for table in tables))
    return x_THr.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if interleaved else x_THr


def attend(q_THd: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences) -> Tensor:
    """As `reference`, by torch's fused attention: one batch of single queries, then one call a longer sequence."""
    single = _attend_single(q_THd[: seqs.num_single], k_cache, v_cache, seqs)
    return torch.cat((single, attend_several(q_THd, k_cache, v_cache, seqs)))


def attend_several(q_THd: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences) -> Tensor:
    """The sequences with several queries only: [T - num_single, H, d]."""
    outputs = [q_THd[:0]]
    for b, table in enumerate(seqs.block_tables, seqs.num_single):
        q = q_THd[seqs.cu_queries[b] : seqs.cu_queries[b + 1]]
        outputs.append(_attend_one(q, k_cache, v_cache, table, seqs.lengths[b]))
    return torch.cat(outputs)


def _gather(cache: Tensor, table: Tensor, batch: int) -> Tensor:
    """[batch, G, L, d] of the blocks in `table`."""
    _, _, heads, dim = cache.shape
    return cache.index_select(0, table.flatten()).view(batch, -1, heads, dim).transpose(1, 2)


def _attend_single(q_BHd: Tensor, k_cache: Tensor, v_cache: Tensor, seqs: PagedSequences) -> Tensor:
    if not len(q_BHd):
        return q_BHd
    batch, num_heads, dim = q_BHd.shape
    k_BGLd, v_BGLd = (_gather(c, seqs.single_block_table, batch) for c in (k_cache, v_cache))
    visible = torch.arange(k_BGLd.shape[2], device=q_BHd.device) < seqs.single_lengths[:, None]
    # The heads that share a key head are its queries: nothing is repeated.
    q_BGqd = q_BHd.view(batch, k_BGLd.shape[1], -1, dim)
    out = F.scaled_dot_product_attention(q_BGqd, k_BGLd, v_BGLd, attn_mask=visible[:, None, None, :])
    return out.reshape(batch, num_heads, dim)


def _attend_one(q_THd: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: int) -> Tensor:
    num, num_heads, _ = q_THd.shape
    k_1GLd, v_1GLd = (_gather(c, table, 1)[:, :, :length] for c in (k_cache, v_cache))
    q_1HTd = q_THd.transpose(0, 1).unsqueeze(0)
    mask = None
    if num < length:
        mask = torch.ones(num, length, dtype=torch.bool, device=q_THd.device).tril(length - num)
    out = F.scaled_dot_product_attention(
        q_1HTd, k_1GLd, v_1GLd, attn_mask=mask, is_causal=mask is None, enable_gqa=num_heads != k_1GLd.shape[1]
    )
    return out[0].transpose(0, 1)
