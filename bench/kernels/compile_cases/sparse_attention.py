"""Compile cases of the sparse-attention indexer: scores, top-k positions, and the index key cache."""

from __future__ import annotations

import torch

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import index, index_rope_and_cache, top_k_positions
from expertwire.kernels.gpu.dependent_launch import PDL


def _score_case(name: str, heads: int, block_size: int, arch: int) -> Case:
    config, dim, top_k = index.CONFIG, 128, 2048
    return Case(
        name=f"index.score {name} blocks of {block_size} sm_{arch}",
        kernel=index.score_kernel,
        args={
            **dict.fromkeys(("q", "cache"), torch.bfloat16),
            **dict.fromkeys(("weights", "scores"), torch.float32),
            **dict.fromkeys(("cu_seqlens_q", "seq_lens", "block_table"), torch.int32),
            "num_sequences": 256,
            "first_token": 0,
            "end_token": 256,
            "stride_block": block_size * dim,
            "table_width": 2560,
            "stride_row": 163840,
        },
        constexprs=index.score_constexprs(config, top_k, heads, dim, block_size),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expect={arch: "HGMMA" if arch == 90 else "UTC"},
        blocks_per_sm=2,
        store_bytes=4,  # a score a thread
        narrow_copies=True,  # of the block table
        options=PDL,
    )


def index_cases() -> list[Case]:
    """Return the shapes of DeepSeek-V3.2 (64 heads of 128 numbers, 2,048 positions) and GLM-5 (32 heads)."""
    found = []
    for arch in (90, 100):
        found += [
            _score_case("deepseek-v3.2", 64, 64, arch),
            _score_case("deepseek-v3.2", 64, 16, arch),
            _score_case("glm-5", 32, 64, arch),
        ]
    return found


def index_rope_and_cache_cases() -> list[Case]:
    """Return the shapes of DeepSeek-V3.2 and GLM-5."""
    return [
        Case(
            name=f"index_rope_and_cache {'interleaved' if interleaved else 'halves'} bf16",
            kernel=index_rope_and_cache.rope_and_cache_kernel,
            args={
                **dict.fromkeys(("q", "k", "norm", "norm_bias", "q_out", "cache"), torch.bfloat16),
                **dict.fromkeys(("cos_table", "sin_table"), torch.float32),
                **dict.fromkeys(("positions", "slots"), torch.int64),
                "eps": 1e-6,
                "stride_token": 64 * 128,
                "stride_k": 128,
                "stride_block": 64 * 128,
            },
            constexprs={
                "H": 64,
                "DIM": 128,
                "PAIRS": 32,
                "PLAIN": 64,
                "BLOCK_SIZE": 64,
                "INTERLEAVED": interleaved,
                "HEADS": index_rope_and_cache.HEADS,
            },
            num_warps=1,
            blocks_per_sm=8,
            options=PDL,
        )
        for interleaved in (False, True)
    ]


def top_k_positions_cases() -> list[Case]:
    """Return 2,048 positions (DeepSeek-V3.2, GLM-5) and 512 (models like DeepSeek-V4)."""
    return [
        Case(
            name=f"top_k_positions {top_k}",
            kernel=top_k_positions.top_k_kernel,
            args={
                "scores": torch.float32,
                **dict.fromkeys(("cu_seqlens_q", "seq_lens", "keys_buffer", "positions_buffer"), torch.int32),
                "chosen": torch.int64,
                "num_sequences": 256,
                "first_token": 0,
                "width": 163840,
            },
            constexprs=top_k_positions.buffer_sizes(top_k),
            num_warps=top_k_positions.num_warps_for(top_k),
            options=top_k_positions.OPTIONS,
        )
        for top_k in (512, 2048)
    ]


def cases() -> list[Case]:
    return [*index_cases(), *index_rope_and_cache_cases(), *top_k_positions_cases()]
