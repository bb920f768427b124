"""Compile cases of multi-head latent attention."""

from __future__ import annotations

import torch

from expertwire.bench.kernels.compile_check import Case
from expertwire.kernels.gpu import mla, mla_rope_and_cache, mla_split_kv
from expertwire.kernels.gpu.dependent_launch import PDL
from expertwire.kernels.gpu.split_kv import SPLIT
from expertwire.kernels.ops.attention import FP8


def _mla_case(name: str, heads: int, block_size: int, arch: int, *, fp8: bool = False, top_k: int = 0) -> Case:
    rank, rotated = 512, 64
    config = mla.tile_config(rank=rank, element_size=2, arch=arch, fp8=fp8)
    width = rank + rotated
    return Case(
        name=f"mla.{name}{' fp8' * fp8}{' chosen' * (top_k > 0)} blocks of {block_size} sm_{arch}",
        kernel=mla.mla_kernel,
        args={
            "q": torch.bfloat16,
            "cache": FP8 if fp8 else torch.bfloat16,
            "kv_scale": torch.float32 if fp8 else None,
            "chosen": torch.int64 if top_k else None,
            **dict.fromkeys(("partials", "statistics"), torch.float32),
            **dict.fromkeys(("units", "block_table"), torch.int32),
            "num_rows": 1 << 18,
            "scale": 0.1,
            "stride_token": heads * width,
            "stride_head": width,
            "stride_block": block_size * width,
            "table_width": 2048,
        },
        constexprs={
            "STRIDE_SLOT": width,
            "H": heads,
            "RANK": rank,
            "ROTATED": rotated,
            "BLOCK_SIZE": block_size,
            "ROWS": config.rows,
            "KEYS": config.keys,
            "SPLIT_KEYS": config.split,
            "COLUMN_SPLITS": config.column_splits,
            "TOP_K": top_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expect={arch: "HGMMA" if arch == 90 else "UTC"},
        narrow_copies=(fp8 and config.keys == 32) or top_k > 0,  # the rotated numbers of a tile are 2 KB; lists
        options=mla.launch_options(arch),
    )


def _store_case(interleaved: bool, *, fp8: bool = False) -> Case:
    return Case(
        name=f"mla_rope_and_cache {'interleaved' if interleaved else 'halves'} {'fp8' if fp8 else 'bf16'}",
        kernel=mla_rope_and_cache.rope_and_cache_kernel,
        args={
            **dict.fromkeys(("q", "kv", "norm", "q_out"), torch.bfloat16),
            "cache": FP8 if fp8 else torch.bfloat16,
            "kv_scale": torch.float32 if fp8 else None,
            **dict.fromkeys(("cos_table", "sin_table"), torch.float32),
            **dict.fromkeys(("positions", "slots"), torch.int64),
            "eps": 1e-6,
            "stride_token": 128 * 192,
            "stride_head": 192,
            "stride_kv": 2112,
            "stride_out_token": 128 * 576,
            "stride_out_head": 576,
            "stride_block": 64 * 576,
            "stride_slot": 576,
        },
        constexprs={
            "H": 128,
            "RANK": 512,
            "PAIRS": 32,
            "BLOCK_SIZE": 64,
            "INTERLEAVED": interleaved,
            "HEADS": mla_rope_and_cache.HEADS,
        },
        num_warps=1,
        blocks_per_sm=8,
        options=PDL,
    )


def mla_cases() -> list[Case]:
    """Return the shapes of DeepSeek-V3 (128 heads) and V2-Lite (16), and the cache writes."""
    found = [_store_case(interleaved, fp8=fp8) for fp8 in (False, True) for interleaved in (True, False)]
    for arch in (90, 100):
        found += [
            _mla_case("deepseek-v3", 128, 64, arch),
            _mla_case("deepseek-v3", 128, 16, arch),
            _mla_case("deepseek-v2-lite", 16, 64, arch),
            _mla_case("deepseek-v3", 128, 64, arch, fp8=True),
            _mla_case("deepseek-v3.2", 128, 64, arch, top_k=2048),
            _mla_case("deepseek-v3.2", 128, 64, arch, fp8=True, top_k=2048),
        ]
    return found


def mla_split_kv_cases() -> list[Case]:
    """Return the shapes of DeepSeek-V3, V3.2 and V2-Lite."""
    bounds = {"num_sequences": 64, "first_token": 0, "end_token": 64}
    plans = [
        Case(
            name=f"mla_split_kv.plan{f' chosen {top_k}' if top_k else ''}",
            kernel=mla_split_kv.plan_kernel,
            args={
                **dict.fromkeys(("units", "slots", "cu_seqlens_q", "seq_lens"), torch.int32),
                **bounds,
                "num_slots": 2048,
            },
            constexprs=mla_split_kv.plan_constexprs(128, 64, SPLIT, top_k),
            wide=False,  # numbers
            options=PDL,
        )
        for top_k in (0, 2048)
    ]
    return plans + [
        Case(
            name=f"mla_split_kv.merge {num_heads}x512{f' chosen {top_k}' if top_k else ''}",
            kernel=mla_split_kv.merge_kernel,
            args={
                **dict.fromkeys(("partials", "statistics"), torch.float32),
                "out": torch.bfloat16,
                **dict.fromkeys(("slots", "cu_seqlens_q", "seq_lens"), torch.int32),
                **bounds,
            },
            constexprs=mla_split_kv.merge_constexprs(num_heads, 512, SPLIT, top_k),
            blocks_per_sm=2,
            wide=False,  # the statistics are a number a row
            options=PDL,
        )
        for num_heads, top_k in ((128, 0), (128, 2048), (16, 0))
    ]


def cases() -> list[Case]:
    return [*mla_cases(), *mla_split_kv_cases()]
