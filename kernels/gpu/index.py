"""The indexer of sparse attention in Triton: `kernels.ops.index`.

A query that sees no more than `top_k` positions sees them all, and nothing is computed for it. For the others, scores of all
positions are written to a workspace, by tiles of keys at absolute positions, so that a score's bits depend on the query and its
sequence alone; then `select` takes the best.

Keys are the left operand, as they are the many, and a token's heads the columns: products [keys, heads] are clipped at 0,
weighted and summed up along a row. Four tokens of a prompt read a tile of keys once.

T tokens, H index heads, d their size; N keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertwire.kernels.gpu.compile import Case
from expertwire.kernels.gpu.device import Device
from expertwire.kernels.gpu.early import EARLY, wait_for_previous
from expertwire.kernels.gpu.select import position_of, select_best
from expertwire.kernels.gpu.splits import sharing_programs
from expertwire.kernels.ops.attention import AttentionMetadata

WORKSPACE_SCORES = 1 << 26  # fp32: 256 MiB


@triton.jit
def load_keys(cache, table, tile, end, stride_block, DIM: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
              BLOCK_SIZE: tl.constexpr):  # fmt: skip
    """The tile [N, d] of index keys at the positions from `tile` on, zeros from `end` on: the place that knows
    their format."""
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
    """Grid (groups of QUERIES tokens, programs that share out a group's keys): scores [tokens from `first_token` on, stride_row],
    written up to each token's own position, of tokens that see more than TOP_K.

    A group's tokens of another sequence than its first one's are a turn of their own, one after another.
    """
    wait_for_previous()
    # Later tokens see more keys: they start first.
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
class Tiles:
    """One for all steps."""

    queries: int  # that share a tile of keys
    keys: int
    num_warps: int
    num_stages: int


TILES = Tiles(queries=4, keys=128, num_warps=4, num_stages=2)


def choose_positions(
    q_THd: Tensor,
    weights_TH: Tensor,
    index_cache: Tensor,
    seqs: AttentionMetadata,
    top_k: int,
    device: Device,
    *,
    tiling: Tiles = TILES,
    workspace_scores: int = WORKSPACE_SCORES,
) -> Tensor:
    """`kernels.ops.index.reference`, of sequences that the device describes; rows that belong to none choose nothing.

    Two launches for as many tokens as `workspace_scores` numbers take; one where no sequence can be longer than `top_k`.
    """
    num_tokens, num_heads, dim = q_THd.shape
    assert q_THd.is_contiguous(), f"strides {q_THd.stride()}"
    assert weights_TH.is_contiguous(), f"strides {weights_TH.stride()}"
    assert weights_TH.shape == (num_tokens, num_heads), f"weights {tuple(weights_TH.shape)}"
    assert index_cache.stride()[1:] == (dim, 1), f"rows of the cache apart: strides {index_cache.stride()}"
    assert index_cache.shape[2] == dim, f"keys of {index_cache.shape[2]} numbers, queries of {dim}"
    chosen_Tk = torch.empty(num_tokens, top_k, dtype=torch.int64, device=q_THd.device)
    width = triton.cdiv(seqs.max_seq_len, tiling.keys) * tiling.keys if seqs.max_seq_len > top_k else 0
    step = max(1, workspace_scores // max(1, width))
    for first in range(0, num_tokens, step):
        chosen_Xk = chosen_Tk[first : first + step]
        scores_XL = q_THd.new_empty(len(chosen_Xk), width, dtype=torch.float32)
        if width > 0:
            _score(q_THd, weights_TH, index_cache, seqs, device, tiling, top_k, first, scores_XL)
        select_best(scores_XL, seqs, first, chosen_Xk)
    return chosen_Tk


def _score(
    q_THd: Tensor,
    weights_TH: Tensor,
    index_cache: Tensor,
    seqs: AttentionMetadata,
    device: Device,
    tiling: Tiles,
    top_k: int,
    first: int,
    scores_XL: Tensor,
) -> None:
    num, stride_row = scores_XL.shape
    groups = triton.cdiv(num, tiling.queries)
    shares, _ = sharing_programs(device, groups, stride_row // tiling.keys, is_decode=False)
    score_kernel[groups, shares](
        q_THd, weights_TH, index_cache, scores_XL, seqs.cu_seqlens_q, seqs.seq_lens, seqs.block_table, seqs.num_sequences,
        first, first + num, index_cache.stride(0), seqs.block_table.stride(0), stride_row,
        **_score_constexprs(tiling, top_k, q_THd.shape[1], q_THd.shape[2], index_cache.shape[1]),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **EARLY,
    )  # fmt: skip


def _score_constexprs(tiling: Tiles, top_k: int, num_heads: int, dim: int, block_size: int) -> dict[str, int]:
    padded_heads, padded = (max(16, triton.next_power_of_2(size)) for size in (num_heads, dim))
    return {
        **{"H": num_heads, "PADDED_H": padded_heads, "DIM": dim, "PADDED": padded, "TOP_K": top_k},
        **{"BLOCK_SIZE": block_size, "QUERIES": tiling.queries, "KEYS": tiling.keys, "STAGES": tiling.num_stages},
    }


def _score_case(name: str, heads: int, block_size: int, arch: int) -> Case:
    tiling, dim, top_k = TILES, 128, 2048
    return Case(
        name=f"index.score {name} blocks of {block_size} sm_{arch}",
        kernel=score_kernel,
        args={
            **dict.fromkeys(("q", "cache"), torch.bfloat16),
            **dict.fromkeys(("weights", "scores"), torch.float32),
            **dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_table"), torch.int32),
            **{"num_sequences": 256, "first_token": 0, "end_token": 256, "stride_block": block_size * dim},
            **{"table_width": 2560, "stride_row": 163840},
        },
        constexprs=_score_constexprs(tiling, top_k, heads, dim, block_size),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        expect={arch: "HGMMA" if arch == 90 else "UTC"},
        blocks_per_sm=2,
        store_bytes=4,  # a score a thread
        narrow_copies=True,  # of the block table
        options=EARLY,
    )


def cases() -> list[Case]:
    """DeepSeek-V3.2 (64 heads of 128 numbers, 2,048 positions) and GLM-5 (32 heads)."""
    found = []
    for arch in (90, 100):
        found += [
            _score_case("deepseek-v3.2", 64, 64, arch),
            _score_case("deepseek-v3.2", 64, 16, arch),
            _score_case("glm-5", 32, 64, arch),
        ]
    return found
