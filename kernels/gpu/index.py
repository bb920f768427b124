"""The indexer of sparse attention in Triton: `kernels.ops.index`.

A query that sees at most `top_k` positions attends to all of them, and nothing is computed for it.
For the others, scores of all positions are written to a workspace, by tiles of keys at absolute
positions, so that a score's bits depend on the query and its sequence alone. Then `top_k_positions`
selects.

Keys are the left operand, since there are many, and a token's heads are the columns: products
[keys, heads] are clipped at 0, weighted and summed along a row. Four tokens of a prefill read a
tile of keys once.

T tokens, H query heads of the indexer, d their size. Inside the kernel N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.dependent_launch import PDL, wait_for_previous_kernel
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.split_kv import split_grid
from expertwire.kernels.gpu.top_k_positions import position_of, select_top_k
from expertwire.kernels.ops.attention import AttentionMetadata

WORKSPACE_SCORES = 1 << 26  # fp32: 256 MiB


@triton.jit
def load_keys(cache, table, tile, end, stride_block, DIM: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
              BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """Load the tile [N, d] of index keys at the positions from `tile` on, with zeros from `end` on.

    This is the only place that knows the format of the cache.
    """
    position = tile + tl.arange(0, KEYS)
    dim = tl.arange(0, PADDED)
    known = position < end
    block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
    row = cache + block * stride_block + position % BLOCK_SIZE * DIM
    return tl.load(row[:, None] + dim, mask=known[:, None] & (dim < DIM), other=0.0)


@triton.jit(do_not_specialize=["num_sequences", "first_token", "end_token", "table_width"])
def score_kernel(
    q,
    weights,
    cache,
    scores,
    cu_seqlens_q,
    seq_lens,
    block_table,
    num_sequences,
    first_token,
    end_token,
    stride_block,
    table_width,
    stride_row,
    H: tl.constexpr,
    PADDED_H: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (groups of QUERIES tokens, programs that share a group's keys): scores [tokens from
    `first_token` on, stride_row].

    They are written up to each token's own position, for tokens that see more than TOP_K. Tokens of
    a group that belong to different sequences are processed one sequence after another.
    """
    wait_for_previous_kernel()
    # Later tokens see more keys, so they start first.
    first = first_token + (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    stop = tl.minimum(first + QUERIES, end_token)
    head, dim = tl.arange(0, PADDED_H), tl.arange(0, PADDED)
    token = first
    while token < stop:
        sequence, position = position_of(cu_seqlens_q, seq_lens, token, num_sequences)
        behind = stop
        if sequence < num_sequences:
            behind = tl.minimum(stop, tl.load(cu_seqlens_q + sequence + 1))
        last = position + behind - token - 1
        if (sequence < num_sequences) & (last >= TOP_K):
            table = block_table + sequence.to(tl.int64) * table_width
            for tile in tl.range(tl.program_id(1) * KEYS, last + 1, tl.num_programs(1) * KEYS, num_stages=STAGES):
                k_Nd = load_keys(cache, table, tile, last + 1, stride_block, DIM, PADDED, KEYS, BLOCK_SIZE)
                key = tile + tl.arange(0, KEYS)
                for i in tl.static_range(QUERIES):
                    row = token + i
                    if row < behind:
                        at = q + row.to(tl.int64) * (H * DIM) + head[:, None] * DIM + dim
                        q_Hd = tl.load(at, mask=(head < H)[:, None] & (dim < DIM), other=0.0)
                        weight_H = tl.load(weights + row.to(tl.int64) * H + head, mask=head < H, other=0.0)
                        products_NH = tl.dot(k_Nd, tl.trans(q_Hd), input_precision="ieee")
                        score_N = tl.sum(tl.maximum(products_NH, 0.0) * weight_H.to(tl.float32)[None, :], 1)
                        target = scores + (row - first_token).to(tl.int64) * stride_row + key
                        tl.store(target, score_N, mask=key <= position + i)
        token = behind


@dataclass(frozen=True, kw_only=True)
class IndexerTileConfig:
    """Tile sizes and launch options, the same for all steps."""

    queries: int  # that share a tile of keys
    keys: int
    num_warps: int
    num_stages: int


CONFIG = IndexerTileConfig(queries=4, keys=128, num_warps=4, num_stages=2)


def choose_positions(
    q_THd: Tensor,
    weights_TH: Tensor,
    index_cache: Tensor,
    seqs: AttentionMetadata,
    top_k: int,
    device: Device,
    *,
    config: IndexerTileConfig = CONFIG,
    workspace_scores: int = WORKSPACE_SCORES,
) -> Tensor:
    """Choose positions as `kernels.ops.index.reference` does; rows that belong to no sequence choose none.

    Two launches handle as many tokens as `workspace_scores` has room for; one where no sequence can
    be longer than `top_k`.
    """
    num_tokens, num_heads, dim = q_THd.shape
    assert q_THd.is_contiguous(), f"strides {q_THd.stride()}"
    assert weights_TH.is_contiguous(), f"strides {weights_TH.stride()}"
    assert weights_TH.shape == (num_tokens, num_heads), f"weights {tuple(weights_TH.shape)}"
    assert index_cache.stride()[1:] == (dim, 1), f"rows of the cache apart: strides {index_cache.stride()}"
    assert index_cache.shape[2] == dim, f"keys of {index_cache.shape[2]} numbers, queries of {dim}"
    chosen_Tk = torch.empty(num_tokens, top_k, dtype=torch.int64, device=q_THd.device)
    width = triton.cdiv(seqs.max_seq_len, config.keys) * config.keys if seqs.max_seq_len > top_k else 0
    step = max(1, workspace_scores // max(1, width))
    for first in range(0, num_tokens, step):
        part_Tk = chosen_Tk[first : first + step]
        scores = q_THd.new_empty(len(part_Tk), width, dtype=torch.float32)
        if width > 0:
            _score(q_THd, weights_TH, index_cache, seqs, device, config, top_k, first, scores)
        select_top_k(scores, seqs, first, part_Tk)
    return chosen_Tk


def _score(
    q_THd: Tensor,
    weights_TH: Tensor,
    index_cache: Tensor,
    seqs: AttentionMetadata,
    device: Device,
    config: IndexerTileConfig,
    top_k: int,
    first: int,
    scores: Tensor,
) -> None:
    num, stride_row = scores.shape
    groups = triton.cdiv(num, config.queries)
    num_programs, _ = split_grid(device, groups, stride_row // config.keys, is_decode=False)
    score_kernel[groups, num_programs](
        q_THd, weights_TH, index_cache, scores, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table, seqs.num_sequences,
        first, first + num, index_cache.stride(0), seqs.block_table.stride(0), stride_row,
        **score_constexprs(config, top_k, q_THd.shape[1], q_THd.shape[2], index_cache.shape[1]),
        num_warps=config.num_warps, num_stages=config.num_stages, **PDL,
    )  # fmt: skip


def score_constexprs(
    config: IndexerTileConfig, top_k: int, num_heads: int, dim: int, block_size: int
) -> dict[str, int]:
    padded_heads, padded = (max(16, triton.next_power_of_2(size)) for size in (num_heads, dim))
    return {
        **{"H": num_heads, "PADDED_H": padded_heads, "DIM": dim, "PADDED": padded, "TOP_K": top_k},
        **{"BLOCK_SIZE": block_size, "QUERIES": config.queries, "KEYS": config.keys, "STAGES": config.num_stages},
    }
